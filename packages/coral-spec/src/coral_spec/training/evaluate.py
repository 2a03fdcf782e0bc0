"""Acceptance length simulated on held-out answers, without decoding: all draft chains of all positions at once.

The chain that starts at index i drafts with the target's feature at i, then with its own features, while the tokens
are the text's (as they are for as long as the draft is right). Depth d is accepted when the drafter's most likely
token is the target's. Harmonised steps compute depth d of all chains in one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from coral_spec.drafter import Drafter
from coral_spec.training.batches import Batch
from coral_spec.training.harmonised import draft_step, harmonised_mask, shift


@dataclass(frozen=True)
class Acceptance:
    """Simulated greedy chain drafting.

    Attributes:
        tau: tokens per round when rounds follow one another through each answer: accepted ones and the target's own.
        rates: per depth, the share accepted of the chains that were right so far.
        rounds: rounds simulated.
    """

    tau: float
    rates: tuple[float, ...]
    rounds: int

    @property
    def score(self) -> float:
        """What a better drafter has more of: tau."""
        return self.tau

    @property
    def figures(self) -> dict[str, float]:
        """`tau_sim`, `rate_1`, `rate_2` ..."""
        rates = {f"rate_{depth}": rate for depth, rate in enumerate(self.rates, start=1)}
        return {"tau_sim": self.tau, **rates}


Forward = Callable[[Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def simulate(
    drafter: Drafter, forward: Forward, head: Tensor, batches: Iterable[Batch], *, depth: int, chunk: int
) -> Acceptance:
    """Acceptance over some batches.

    Args:
        forward: tokens ``(rows, length)`` to the target's features and next-token embeddings, both
            ``(rows, length, hidden)`` on the device.
        head: ``(vocab, hidden)``.
        depth: longest draft.
        chunk: positions whose logits exist at once.
    """
    reached = torch.zeros(depth, dtype=torch.long)
    right = torch.zeros(depth, dtype=torch.long)
    tokens = rounds = 0
    for batch in batches:
        accepted = count_accepted(drafter, forward, head, batch.tokens, depth=depth, chunk=chunk)
        index = torch.arange(accepted.shape[1])
        starts = (index >= batch.first[:, None]) & (index <= batch.last[:, None])
        room = (batch.last[:, None] - index + 1).clamp(min=0, max=depth)
        accepted = torch.minimum(accepted, room)  # a draft past the end of the answer is no success
        whole = starts & (room == depth)
        for level in range(depth):
            alive = whole & (accepted >= level)
            reached[level] += alive.sum()
            right[level] += (alive & (accepted > level)).sum()
        for row, first, last in zip(accepted.tolist(), batch.first.tolist(), batch.last.tolist(), strict=True):
            while first <= last:
                made = min(row[first] + 1, last - first + 1)
                tokens, rounds, first = tokens + made, rounds + 1, first + made
    rates = tuple((right / reached.clamp(min=1)).tolist())
    return Acceptance(tau=tokens / max(1, rounds), rates=rates, rounds=rounds)


@torch.no_grad()
def count_accepted(
    drafter: Drafter, forward: Forward, head: Tensor, tokens: Tensor, *, depth: int, chunk: int
) -> Tensor:
    """How many drafted tokens the target accepts of the chain that starts at each index: ``(rows, length)`` on the CPU.

    The last indices, whose chain leaves the text, count what there is of it.
    """
    features, embeddings = forward(tokens)
    rows, length, _ = features.shape
    wanted = _most_likely(features, head, chunk)
    inputs = [features]
    alive = torch.ones(rows, length, dtype=torch.bool, device=features.device)
    accepted = torch.zeros(rows, length, dtype=torch.long, device=features.device)
    for step in range(1, min(depth, length - 1) + 1):
        mask = harmonised_mask(length, step, features.dtype, features.device)
        predicted = draft_step(drafter, embeddings, inputs, mask)
        drafted = _most_likely(predicted, head, chunk)
        # index i at this step belongs to the chain that started at i - step + 1; its token is compared at i + 1
        match = drafted[:, step - 1 : length - 1] == wanted[:, step:]
        alive[:, : length - step] &= match
        alive[:, length - step :] = False
        accepted += alive
        inputs.append(shift(predicted, features).to(features.dtype))
    return accepted.cpu()


def _most_likely(features: Tensor, head: Tensor, chunk: int) -> Tensor:
    flat = features.flatten(0, 1).to(head.dtype)
    return torch.cat([(part @ head.T).argmax(-1) for part in flat.split(chunk)]).view(features.shape[:2])  # type: ignore[no-untyped-call]
