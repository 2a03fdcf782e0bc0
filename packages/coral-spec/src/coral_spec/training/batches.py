"""Which answers make up which batch: a pure function of seed and batch number, so that nothing need be saved.

Rows of similar length share a batch. Rows are padded on the right, where a causal model needs no mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coral_spec.training.data import Answers

POOL = 2048  # shuffled rows that are sorted by length together: fewer means more padding, more means less shuffling
TILE = 16  # padded lengths are multiples of this, as fused attention likes them


@dataclass(frozen=True)
class Batch:
    """Rows ready for the device.

    Attributes:
        tokens: int64 ``(rows, length)``, zeros after each row's end.
        first: ``(rows,)`` index from which drafting starts: the prompt's last token.
        last: ``(rows,)`` last index whose next feature is wanted. A feature at the end-of-text token is not, since
            nothing is ever drafted from there.
    """

    tokens: Tensor
    first: Tensor
    last: Tensor

    def positions(self, step: int) -> Tensor:
        """Flat indices (row * length + index) that count in the loss of harmonised step `step` (1 is the first).

        Answers only, never prompt or padding: a draft that starts at the prompt's last token reaches step j at
        index ``first + j - 1``.
        """
        index = torch.arange(self.tokens.shape[1])
        counts = (index >= (self.first + step - 1)[:, None]) & (index <= self.last[:, None])
        return counts.flatten().nonzero().squeeze(1)

    def count(self, step: int) -> int:
        """How many positions there are in `positions(step)`."""
        return int((self.last - self.first - (step - 1) + 1).clamp(min=0).sum())


def make_batch(answers: Answers, rows: Tensor, max_length: int) -> Batch:
    """Pad the chosen rows, cut after `max_length` tokens, to a common length."""
    whole = answers.lengths[rows]
    lengths = whole.clamp(max=max_length)
    width = -(-int(lengths.max()) // TILE) * TILE
    column = torch.arange(width)
    inside = column < lengths[:, None]
    where = (answers.offsets[rows, None] + column).clamp(max=len(answers.tokens) - 1)
    tokens = answers.tokens[where].long() * inside
    complete = answers.ended[rows] & (whole == lengths)
    last = lengths - 2 - complete.long()
    return Batch(tokens, answers.prompt_lengths[rows] - 1, last)


def split_rows(answers: Answers, held_out_prompts: int, max_length: int) -> tuple[Tensor, Tensor]:
    """Rows for training and rows held out, by prompt: no prompt is in both. Rows without a usable answer are in none.

    The same prompts are held out whatever a run's seed: runs are compared on them, and what is trained on a drafter has
    not seen what that one was chosen by.

    Raises:
        ValueError: nothing is left to train on.
    """
    prompts = torch.unique(answers.prompt_index)
    held = prompts[torch.randperm(len(prompts), generator=_generator(0, 0))[:held_out_prompts]]
    usable = answers.lengths.clamp(max=max_length) - answers.prompt_lengths >= 3
    is_held = torch.isin(answers.prompt_index, held)
    training = (usable & ~is_held).nonzero().squeeze(1)
    if len(training) == 0:
        raise ValueError(f"{len(prompts)} prompts, {held_out_prompts} of them held out, leave nothing to train on")
    return training, (usable & is_held).nonzero().squeeze(1)


class BatchPlan:
    """Batches of training rows, numbered through all epochs; batch k is the same whenever it is asked for."""

    def __init__(self, answers: Answers, rows: Tensor, *, tokens: int, max_length: int, seed: int) -> None:
        self.answers, self.rows, self.tokens, self.max_length, self.seed = answers, rows, tokens, max_length, seed
        self.lengths = answers.lengths[rows].clamp(max=max_length)
        self._starts = [0]  # number of the first batch of every epoch seen so far
        self._epochs: dict[int, list[Tensor]] = {}

    def batch(self, number: int) -> Batch:
        """Batch `number`, counted from 0 through all epochs."""
        epoch = 0
        while True:
            if epoch + 1 >= len(self._starts):
                self._starts.append(self._starts[epoch] + len(self._epoch(epoch)))
            if number < self._starts[epoch + 1]:
                rows = self._epoch(epoch)[number - self._starts[epoch]]
                return make_batch(self.answers, rows, self.max_length)
            epoch += 1

    def epoch_of(self, number: int) -> int:
        """The epoch that batch `number` belongs to; the batch must have been asked for."""
        return sum(start <= number for start in self._starts) - 1

    def _epoch(self, epoch: int) -> list[Tensor]:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:
                self._epochs.clear()
            self._epochs[epoch] = self._plan(epoch)
        return self._epochs[epoch]

    def _plan(self, epoch: int) -> list[Tensor]:
        generator = _generator(self.seed, epoch + 1)
        order = torch.randperm(len(self.rows), generator=generator)
        batches: list[Tensor] = []
        for pool in torch.split(order, POOL):
            batches += group_by_length(self.lengths, pool, self.tokens)
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return [self.rows[batches[index]] for index in shuffled]


def group_by_length(lengths: Tensor, chosen: Tensor, tokens: int) -> list[Tensor]:
    """Cut `chosen` rows, sorted by length, into groups whose padded size is at most `tokens` (or a single row)."""
    ordered = chosen[lengths[chosen].argsort(stable=True)]
    groups, first = [], 0
    widths = (-(-lengths[ordered] // TILE) * TILE).tolist()
    for end in range(1, len(ordered) + 1):
        if end == len(ordered) or (end - first + 1) * widths[end] > tokens:
            groups.append(ordered[first:end])
            first = end
    return groups


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + stream) % 2**63)
