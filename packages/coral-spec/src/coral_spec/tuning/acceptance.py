"""How many tokens a round of a tree gives: measured once per drafter, corrected by what happens.

A profile holds, for every shape that may be chosen, how often at least 1, 2, 3 ... drafted tokens were accepted. One
number adapts it to other text, sampling or drafters: with *hardness* h every share s becomes ``s ** h``, that is, every
level's conditional acceptance rate is raised to h. It is 1 for the text of the profile and fitted to the acceptance of
running answers. Ours.

Profiles come from :func:`replay`: a known greedy answer tells what each round would have accepted, so all shapes are
measured on the very same text and no target runs once per shape.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coral_spec.statistics import Stopwatch
from coral_spec.tree import TreeShape, accept
from expkit.errors import UsageError

if TYPE_CHECKING:
    from coral_spec.drafts import Draft

FILE = "acceptance.json"
HARDNESS = (0.02, 50.0)


@dataclass(frozen=True)
class Acceptance:
    """Expected acceptance by tree shape.

    Attributes:
        survival: for each shape, the share of rounds that accept at least 1, 2 ... ``depth`` drafted tokens.
    """

    survival: Mapping[TreeShape, Sequence[float]]

    def tau(self, shape: TreeShape | None, hardness: float = 1.0) -> float:
        """Expected tokens per round; 1 for plain decoding (None)."""
        return 1.0 + (sum(share**hardness for share in self.survival[shape]) if shape else 0.0)

    def hardness(self, shape: TreeShape, tau: float) -> float:
        """The hardness at which ``shape`` gives ``tau`` tokens per round, within :data:`HARDNESS`."""
        low, high = (math.log(bound) for bound in HARDNESS)
        for _ in range(20):  # to a hundred-thousandth
            middle = (low + high) / 2
            low, high = (middle, high) if self.tau(shape, math.exp(middle)) > tau else (low, middle)
        return math.exp((low + high) / 2)

    @classmethod
    def load(cls, path: Path, rows: int) -> Acceptance:
        """The profiles in ``path``, of each shape the one with the number of head rows nearest to ``rows``.

        Raises:
            UsageError: the file is damaged.
        """
        try:
            profiles = json.loads(path.read_text(encoding="utf-8"))["profiles"]
            survival: dict[TreeShape, tuple[float, ...]] = {}
            for profile in sorted(profiles, key=lambda each: -abs(math.log(each["rows"] / rows))):
                survival |= {TreeShape.parse(shape): tuple(map(float, s)) for shape, s in profile["survival"].items()}
            if not survival:
                raise ValueError("no shapes")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} holds no acceptance profile: {error!r}") from error
        return cls(survival)


def survival(accept_lengths: Sequence[int], depth: int) -> list[float]:
    """Shares of the rounds that accepted at least 1, 2 ... ``depth`` drafted tokens."""
    return [sum(each >= level for each in accept_lengths) / len(accept_lengths) for level in range(1, depth + 1)]


@torch.inference_mode()
def replay(draft: Draft, features: Tensor, text: list[int], prompt: int) -> list[int]:
    """Draft tokens that the rounds of a greedy answer accept, the rounds that reach past its end left out.

    Args:
        draft: fresh; one that drafts.
        features: the target's of the whole text, ``(1, length, hidden)``.
        text: prompt and answer.
        prompt: tokens of the prompt.
    """
    device = features.device
    watch = Stopwatch(device)
    capacity = len(text) + draft.slack
    draft.resize(1, capacity, 0)
    history = torch.nn.functional.pad(torch.tensor([text], device=device), (0, draft.slack))
    accepted: list[int] = []
    begin, end = 0, prompt
    while end + draft.depth < len(text):
        starts, lengths = (torch.tensor([place], device=device) for place in (begin, end))
        draft.absorb(history[:, begin + 1 : end + 1], features[:, begin:end], starts, lengths - starts, begin)
        tree = draft.propose(history, lengths, end, watch)
        draws = history.gather(1, (end + 1 + tree.depths).clamp(max=capacity - 1))
        begin, end = end, end + int(accept(tree, draws, draft.depth).count)
        accepted.append(end - begin - 1)
    return accepted
