"""Cross-Step Representation Alignment (CORAL): the steps of multi-step training learn to say the same thing.

InfoNCE with cosine similarity s and temperature t. With q_i the current step's feature at position i, a_i the
anchor's feature at the same position (of another step, or the target's own) and P a pool of positions,
``loss_i = -log( exp(s(q_i, a_i)/t) / sum_{k in P + {i}} exp(s(q_i, a_k)/t) )``.

Source: CORAL for the idea; anchor, gradient through it, temperature, weight and pool are not known from the paper's
summary, so they are fields here, chosen by measurement. All similarities are fp32 and exist for a chunk of queries at
a time: forward and backward are one pass, so no positions x positions tensor is ever made. Ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from expkit.device import to_device


@dataclass(frozen=True)
class CsraConfig:
    """Cross-Step Representation Alignment.

    Attributes:
        weight: of the loss in a step's sum; 0 leaves it out (HASS).
        anchor: whose feature a step is drawn to: that of step 1 ("first") or of the step before it ("previous"), which
            need `align_steps` of 2 or more, or the "target"'s own, which then draws step 1 too.
        stop_gradient: the anchor is a constant. Without it gradients reach the anchor's step as well, for which a
            second graph stays in memory.
        temperature: t above.
        pool: where negatives come from: answer positions of the "sequence" itself, or of the whole "batch".
        negatives: most negatives of a query; a larger pool is subsampled anew for every batch and step.
        chunk: queries whose similarities exist at once; memory is about 12 bytes x chunk x negatives.
    """

    weight: float = 0.0
    anchor: Literal["first", "previous", "target"] = "first"
    stop_gradient: bool = True
    temperature: float = 0.07
    pool: Literal["sequence", "batch"] = "batch"
    negatives: int = 2048
    chunk: int = 4096

    def __post_init__(self) -> None:
        for name, value, wrong in (
            ("weight", self.weight, not 0 <= self.weight < math.inf),
            ("temperature", self.temperature, not 0 < self.temperature < math.inf),
            ("negatives", self.negatives, self.negatives < 1),
            ("chunk", self.chunk, self.chunk < 1),
        ):
            if wrong:
                least = "0 or more" if name == "weight" else "above 0"
                raise ValueError(f"csra.{name} is {value}; it must be {least}")
        if self.anchor == "target" and not self.stop_gradient:
            raise ValueError('csra.stop_gradient is false, but csra.anchor = "target" has no gradient; use true')

    def anchor_of(self, step: int) -> int | None:
        """The step whose features are the anchor of `step` (counted from 1); 0 is the target, None is no anchor."""
        if self.weight == 0:
            return None
        if self.anchor == "target":
            return 0
        if step == 1:
            return None
        return 1 if self.anchor == "first" else step - 1

    def still_needed(self, step: int, steps: int) -> set[int]:
        """Steps that are anchors of a step after `step`."""
        found = {self.anchor_of(later) for later in range(step + 1, steps + 1)}
        return {each for each in found if each is not None}


def csra_loss(
    predicted: Tensor, anchors: Tensor, rows: Tensor, config: CsraConfig, *, scale: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Unweighted alignment of some positions; prompt and padding are left out by not being among them.

    Args:
        predicted: ``(positions, hidden)``, the step's features.
        anchors: ``(positions, hidden)``, the anchor's features there; detached where the gradient stops.
        rows: int64 ``(positions,)`` on the CPU, ascending: the row (sequence) of each position.
        scale: multiplies the sum over positions; 1 / positions gives the mean.
        seed: of the subsample of negatives.

    Returns:
        the scaled sum, fp32 with gradient; and the scaled sum of ``s(q_i, a_i)``, without.
    """
    queries = functional.normalize(predicted.float(), dim=-1)
    keys = functional.normalize(anchors.float(), dim=-1)
    pools = list(_pools(rows, config, seed, predicted.device))
    loss: Tensor = _ChunkedInfoNCE.apply(queries, keys, pools, config.temperature, config.chunk)
    return scale * loss, scale * (queries.detach() * keys.detach()).sum()


def _pools(rows: Tensor, config: CsraConfig, seed: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Queries as a slice of positions, and the positions ``(keys,)`` that are their negatives."""
    together = torch.zeros_like(rows) if config.pool == "batch" else rows
    generator = torch.Generator().manual_seed(seed)
    start = 0
    for count in torch.unique_consecutive(together, return_counts=True)[1].tolist():
        chosen = torch.arange(start, start + count)
        if count > config.negatives:
            chosen = chosen[torch.randperm(count, generator=generator)[: config.negatives].sort().values]
        yield slice(start, start + count), to_device(chosen, device)
        start += count


class _ChunkedInfoNCE(torch.autograd.Function):
    """Sum over queries of ``lse(positive, negatives) - positive``; saves gradients of unit vectors, no similarities."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, pools: list[tuple[slice, Tensor]], temperature: float, chunk: int
    ) -> Tensor:
        of_queries = torch.zeros_like(queries)
        of_keys = torch.zeros_like(keys) if ctx.needs_input_grad[1] else None
        total = queries.new_zeros(())
        for span, pool in pools:
            negatives = keys[pool]
            for first in range(span.start, span.stop, chunk):
                part = slice(first, min(first + chunk, span.stop))
                query, own = queries[part], keys[part]
                positive = (query * own).sum(-1) / temperature
                scores = (query @ negatives.T) / temperature
                index = torch.arange(part.start, part.stop, device=pool.device)
                scores = scores.masked_fill_(pool[None] == index[:, None], float("-inf"))
                norm = torch.logaddexp(positive, scores.logsumexp(-1))
                total += (norm - positive).sum()
                share = scores.sub_(norm[:, None]).exp_()
                pull = torch.expm1(positive - norm)[:, None]
                of_queries[part] = (share @ negatives + pull * own) / temperature
                if of_keys is not None:
                    of_keys[part] += pull * query / temperature
                    of_keys.index_add_(0, pool, share.T @ query / temperature)
        ctx.save_for_backward(of_queries, of_keys)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        of_queries, of_keys = ctx.saved_tensors
        (upstream,) = gradients
        return of_queries * upstream, None if of_keys is None else of_keys * upstream, None, None, None
