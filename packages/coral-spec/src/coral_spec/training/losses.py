"""Losses of a drafted feature against the target's, without ever holding logits of all positions.

Per position, with p the target's and q the drafter's distribution over the vocabulary:
``feature * SmoothL1(f', f) + soft * (-sum p log q) + top * (-sum over the target's top k of p log q)``
(EAGLE; the last term is HASS's). The head is frozen, so the gradient of a chunk's logits is turned into that of its
features at once: forward and backward are one pass over the chunks, in each of which softmax runs in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class LossParts:
    """Sums over positions, times the scale given.

    Attributes:
        total: the weighted sum, which carries the gradient.
        feature, soft, top: the unweighted parts, without gradient (`top` is 0 while its weight is).
        agreed: positions where drafter and target have the same most likely token (times scale).
        top_ids: ``(positions, top_k)`` the target's most likely tokens, to be handed to the next step; or None.
    """

    total: Tensor
    feature: Tensor
    soft: Tensor
    top: Tensor
    agreed: Tensor
    top_ids: Tensor | None


def draft_loss(
    predicted: Tensor,
    features: Tensor,
    head: Tensor,
    *,
    weights: tuple[float, float, float],
    top_k: int,
    scale: float,
    chunk: int,
    top_ids: Tensor | None = None,
    compiled: bool = False,
) -> LossParts:
    """All losses of some positions.

    Args:
        predicted, features: ``(positions, hidden)``, drafted (with gradient) and the target's.
        head: ``(vocab, hidden)``, the target's frozen output weights.
        weights: of the feature, soft and top parts.
        scale: multiplies all sums; 1 / positions gives means.
        chunk: positions whose logits exist at once.
        top_ids: the target's most likely tokens, if known already.
        compiled: run the chunks through torch.compile.
    """
    wide = functional.smooth_l1_loss(predicted.float(), features.float(), reduction="none").mean(-1)
    feature = wide.sum() * scale
    _, soft_weight, top_weight = weights
    entropy, soft, top, agreed, found = _ChunkedEntropy.apply(
        predicted, features, head, soft_weight, top_weight, top_k, scale, chunk, top_ids, compiled
    )
    return LossParts(weights[0] * feature + entropy, feature.detach(), soft, top, agreed, found)


class _ChunkedEntropy(torch.autograd.Function):
    """Both cross-entropies; saves the gradient with respect to the features instead of any logits."""

    @staticmethod
    def forward(
        ctx: Any,
        predicted: Tensor,
        features: Tensor,
        head: Tensor,
        soft_weight: float,
        top_weight: float,
        top_k: int,
        scale: float,
        chunk: int,
        top_ids: Tensor | None,
        compiled: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        gradient = torch.zeros_like(predicted)
        sums = torch.zeros(3, dtype=torch.float32, device=predicted.device)
        found: list[Tensor] = []
        run = _compiled_chunk() if compiled else _entropy_chunk
        for first in range(0, len(predicted), chunk):
            part = slice(first, min(first + chunk, len(predicted)))
            ids = None if top_ids is None else top_ids[part]
            logits = functional.linear(features[part].to(head.dtype), head)
            if top_weight > 0 and ids is None:
                ids = logits.topk(min(top_k, logits.shape[1]), dim=-1).indices
                found.append(ids)
            drafted = functional.linear(predicted[part].to(head.dtype), head)
            slope, parts = run(logits, drafted, ids if top_weight > 0 else None, soft_weight, top_weight)
            gradient[part] = (slope @ head).to(predicted.dtype)
            sums += parts
        sums *= scale
        ctx.save_for_backward(gradient)
        ctx.scale = scale
        soft, top, agreed = sums
        ids_out = torch.cat(found) if found else top_ids
        ctx.mark_non_differentiable(soft, top, agreed)
        if ids_out is not None:
            ctx.mark_non_differentiable(ids_out)
        return soft_weight * soft + top_weight * top, soft, top, agreed, ids_out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        upstream = gradients[0] * ctx.scale
        return (gradient * upstream.to(gradient.dtype), *([None] * 9))


def _entropy_chunk(
    logits: Tensor, drafted: Tensor, top_ids: Tensor | None, soft_weight: float, top_weight: float
) -> tuple[Tensor, Tensor]:
    """Gradient with respect to `drafted` ``(positions, vocab)`` in its dtype, and the sums (soft, top, agreed)."""
    target = torch.softmax(logits, dim=-1, dtype=torch.float32)
    log_draft = torch.log_softmax(drafted, dim=-1, dtype=torch.float32)
    agreed = (logits.argmax(-1) == drafted.argmax(-1)).sum()
    soft = -(target * log_draft).sum()
    draft = log_draft.exp()
    if top_ids is None:
        slope = soft_weight * (draft - target)
        return slope.to(drafted.dtype), torch.stack([soft, soft.new_zeros(()), agreed.float()])
    chosen = target.gather(-1, top_ids)
    top = -(chosen * log_draft.gather(-1, top_ids)).sum()
    slope = (soft_weight + top_weight * chosen.sum(-1, keepdim=True)) * draft - soft_weight * target
    slope = slope.scatter_add(-1, top_ids, -top_weight * chosen)
    return slope.to(drafted.dtype), torch.stack([soft, top, agreed.float()])


@functools.cache
def _compiled_chunk() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_entropy_chunk, dynamic=True)
