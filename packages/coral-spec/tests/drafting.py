"""Helpers for the engine's tests: tiny models in fp32 with any draft."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from coral_spec.drafter import Drafter, DrafterConfig
from coral_spec.drafts import NoDraft
from coral_spec.model import Model, load
from coral_spec.statistics import Stopwatch
from coral_spec.targets import Target
from coral_spec.tree import Tree, TreeShape
from tiny import tiny_target

SMALL = TreeShape(4, 3, 10)
# Seeds whose greedy text after PROMPT has no near tie (two best logits closer than 0.01), which rounding could turn.
PROMPT = [5, 9, 40, 7, 5, 9, 40, 8, 100, 3]
CLEAR_SEEDS = {"llama": 3, "qwen2": 0, "qwen3": 1, "mistral": 3, "mistral-window": 3, "gemma3": 5}


def clear_target(architecture: str) -> Target:
    """A tiny random target whose greedy text is the same on every machine and release."""
    return tiny_target(architecture, seed=CLEAR_SEEDS[architecture])


def save_drafter(target: Target, folder: Path, seed: int = 0) -> Path:
    """A random drafter of the target's sizes, with a ranking of all its tokens."""
    torch.manual_seed(seed)
    config = DrafterConfig.from_target(target)
    drafter = Drafter(config)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.mul_(8)  # wide enough that candidates differ from node to node
    drafter.save(folder, model_card="# tiny", ranking=torch.arange(config.vocab_size))
    return folder


def drafting_model(target: Target, folder: Path, tree: TreeShape = SMALL, head: str | int = "full") -> Model:
    """``target`` with a random drafter."""
    return load(target, draft=str(save_drafter(target, folder)), tree=tree, head=head)


class OracleDraft(NoDraft):
    """Knows the text; every tree holds it at a random place among wrong siblings, cut off at a random depth."""

    def __init__(self, text: list[int], depth: int) -> None:
        self.text, self.depth = text, depth
        self.slack = 3 * depth + 1
        self._generator = torch.Generator().manual_seed(0)

    def propose(self, history: Tensor, lengths: Tensor, filled: int, watch: Stopwatch) -> Tree:
        known = (self.text[filled + 1 :] + [0] * self.depth)[: self.depth]
        known = known[: int(torch.randint(2, self.depth + 1, (1,), generator=self._generator))]
        tokens, parents, parent = [int(history[0, filled])], [0], 0
        for token in known:
            place = int(torch.randint(3, (1,), generator=self._generator))
            siblings = [(token + 1 + other) % 200 for other in range(2)]
            siblings.insert(place, token)
            tokens += siblings
            parents += [parent] * 3
            parent = len(tokens) - 3 + place
        return Tree.build(torch.tensor([tokens]), torch.tensor([parents]), self.depth)
