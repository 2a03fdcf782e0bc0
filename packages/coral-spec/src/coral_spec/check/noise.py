"""Tie or bug: whether two ways of decoding the same model differ by more than its working precision explains.

In bf16 even plain decoding gives other ids when its matrix products have other shapes, so a first mismatch by itself
proves nothing. The rule (ours): it is a **tie** when the gap of the two tokens in fp32 is at most the noise, the
largest |top-2 margin in working precision - the same in fp32|, capped; and when the drafted run's logits are no
farther from fp32 than twice the baseline's. The noise is that of all the baseline's positions. A mismatch needs an
error as large as its gap in one of the two runs, though, so that the drafted answer's own noise counts too where its
logits are no farther from fp32 than the baseline's. Anything else is a **bug**. In fp32 only a gap under 1e-3 is a tie.

Some texts multiply rounding: on one answer of Gemma3-270M bf16 is 0.2 to 1.6 from fp32 at a single position, by how
many rows its forward has (`benchmarks/rounding.py`). So before logits count as too far they are held, position by
position, against the model's own forward of the same text as well (:func:`forward_distances`).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from coral_spec.cache import cache_argument

Verdict = Literal["exact", "tie", "bug"]
Identical = Literal["exact", "ties", "bug"]

FP32_GAP = 1e-3
# Largest gap that noise may excuse, whatever the run's own noise: so many steps of the working precision at logits of
# that size, but at least of the size that most models' have. In bf16 that is 0.5 below 32, 1 from there to 64.
NOISE_STEPS, USUAL_SIZE = 4, 16.0
# Farther from fp32 than the baseline by this factor is no longer rounding; below the floor it always is.
DISTANCE_FACTOR = 2.0
DISTANCE_FLOOR = 1e-3
PIECES = (1, 3, 7, 16, 61)  # rows of the forwards that `forward_distance` tries


@dataclass(frozen=True)
class Judgement:
    """What became of one prompt.

    Attributes:
        verdict: "exact", "tie" or "bug".
        position: index of the first token that differs; None when none does.
        tokens: the baseline's and the other run's token there; None past a run's end.
        gap: fp32 distance of the two tokens' logits; None without a mismatch, infinite when a run ended early.
        noise: what the gap was held against, its cap left out.
        distance: how far the run's logits are from fp32; None when they were not recorded.
        baseline_distance: the same of the baseline, over the whole run.
        forward_distance: the same of the model's own forward of this text, where that was asked.
    """

    verdict: Verdict
    position: int | None = None
    tokens: tuple[int | None, int | None] | None = None
    gap: float | None = None
    noise: float | None = None
    distance: float | None = None
    baseline_distance: float | None = None
    forward_distance: float | None = None


def judge(
    mismatch: Mismatch | None,
    dtype: torch.dtype,
    *,
    noise: float,
    own_noise: float = 0.0,
    distance: float | None = None,
    baseline_distance: float | None = None,
    rounding: Rounding | None = None,
) -> Judgement:
    """Apply the rule to one prompt.

    Args:
        mismatch: the first one with its fp32 gap, or None.
        dtype: working precision.
        noise: largest `margin_noise` over the baseline's positions of the run.
        own_noise: the same of the judged run.
        distance: largest `logit_distance` of the judged run.
        baseline_distance: largest `logit_distance` of the baseline over the run.
        rounding: of the judged run's text, which tells whether the logits are too far; without it the distances do.
    """
    far = is_far(distance, baseline_distance) if rounding is None else rounding.exceeded
    verdict: Verdict = "bug" if far else "exact"
    if distance is not None and baseline_distance is not None and distance <= baseline_distance:
        noise = max(noise, own_noise)
    if mismatch is not None and not far:
        verdict = "tie" if is_tie(mismatch, noise, dtype) else "bug"
    return Judgement(
        verdict,
        position=mismatch.position if mismatch else None,
        tokens=mismatch.tokens if mismatch else None,
        gap=mismatch.gap if mismatch else None,
        noise=noise,
        distance=distance,
        baseline_distance=baseline_distance,
        forward_distance=None if rounding is None else rounding.distance,
    )


@dataclass(frozen=True)
class Rounding:
    """Whether a run's logits are farther from fp32 than rounding takes the model's own forward of the text.

    Attributes:
        exceeded: at some position they are farther than twice both the baseline's distance and that forward's there.
        distance: largest of that forward.
    """

    exceeded: bool
    distance: float

    @classmethod
    def of(cls, distances: Tensor, baseline_distance: float, forward: Tensor) -> Rounding:
        """From `position_distances` of a run and `forward_distances` of its text."""
        allowed = (DISTANCE_FACTOR * forward.clamp(min=baseline_distance)).clamp(min=DISTANCE_FLOOR)
        return cls(bool((distances > allowed).any()), float(forward.max()))


def is_far(distance: float | None, baseline_distance: float | None) -> bool:
    """Whether logits are farther from fp32 than rounding takes them."""
    return distance is not None and distance > max(DISTANCE_FACTOR * (baseline_distance or 0.0), DISTANCE_FLOOR)


def is_tie(mismatch: Mismatch, noise: float, dtype: torch.dtype) -> bool:
    """Whether working precision explains a mismatch's fp32 gap."""
    if not math.isfinite(mismatch.gap):
        return False
    if dtype == torch.float32:
        return mismatch.gap < FP32_GAP
    step = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(max(mismatch.size, USUAL_SIZE)))
    return mismatch.gap <= min(noise, NOISE_STEPS * step)


def summarise(verdicts: Iterable[Verdict]) -> Identical:
    """One word for many prompts: any bug is "bug", else any tie is "ties"."""
    found = set(verdicts)
    return "bug" if "bug" in found else "ties" if "tie" in found else "exact"


@dataclass(frozen=True)
class Mismatch:
    """The first token in which two runs differ, the fp32 gap of the two there, and the larger of their logits."""

    position: int
    tokens: tuple[int | None, int | None]
    gap: float
    size: float


def find_mismatch(
    reference: nn.Module, prompt: Sequence[int], baseline: Sequence[int], other: Sequence[int]
) -> Mismatch | None:
    """Compare ids; the fp32 gap at the first difference takes one forward of the common prefix.

    A run that ends where the other goes on has no token to compare: its gap is infinite.
    """
    position = first_difference(baseline, other)
    if position is None:
        return None
    a = baseline[position] if position < len(baseline) else None
    b = other[position] if position < len(other) else None
    if a is None or b is None:
        return Mismatch(position, (a, b), float("inf"), 0.0)
    logits = reference_logits(reference, prompt, [*baseline[:position], a])[-1]
    of_a, of_b = float(logits[a]), float(logits[b])
    return Mismatch(position, (a, b), abs(of_a - of_b), max(abs(of_a), abs(of_b)))


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first difference, the shorter one's length when it is the other's beginning, None when equal."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))


def reference_model(model: nn.Module) -> nn.Module:
    """The model in fp32: itself, or an upcast copy (which takes 4 bytes a parameter on the same device)."""
    if all(parameter.dtype == torch.float32 for parameter in model.parameters()):
        return model
    return copy.deepcopy(model).float()


@torch.inference_mode()
def reference_logits(model: nn.Module, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """fp32 logits from which each of `ids` would be drawn, by one causal forward of prompt and ids.

    Returns:
        ``(len(ids), vocab)`` on the model's device; row i saw the prompt and ``ids[:i]``.
    """
    device = next(model.parameters()).device
    text = torch.tensor([[*prompt, *ids[:-1]]], device=device)
    logits: Tensor = model(input_ids=text, use_cache=False, logits_to_keep=len(ids)).logits
    return logits[0].float()


def margin_noise(working: Tensor, reference: Tensor) -> float:
    """Largest |margin of the two best tokens in working precision - margin of the same two in fp32|.

    Args:
        working: logits ``(positions, vocab)`` of a run in working precision.
        reference: fp32 logits of the same positions.
    """
    best = working.to(reference.device, torch.float32).topk(2, dim=-1)
    same = reference.gather(-1, best.indices)
    margin, exact = (pair[:, 0] - pair[:, 1] for pair in (best.values, same))
    return float((margin - exact).abs().max())


def logit_distance(working: Tensor, reference: Tensor) -> float:
    """Largest of :func:`position_distances`; 0 for an answer of one token."""
    return largest_distance(position_distances(working, reference))


def largest_distance(distances: Tensor) -> float:
    """Of :func:`position_distances`; 0 for an answer of one token."""
    return float(distances.max()) if len(distances) else 0.0


def position_distances(working: Tensor, reference: Tensor) -> Tensor:
    """Root mean square difference over the vocabulary at all positions after the first.

    The first token comes from the prefill, which both runs share: its error, often the largest, would hide that of
    the verified tree.

    Args:
        working, reference: logits ``(positions, vocab)`` of one answer.

    Returns:
        fp32 ``(positions - 1,)``.
    """
    working = working.to(reference.device, torch.float32)
    return (working[1:] - reference[1:]).square().mean(dim=-1).sqrt()


@torch.inference_mode()
def forward_distances(
    model: nn.Module,
    reference: nn.Module,
    prompt: Sequence[int],
    ids: Sequence[int],
    pieces: Sequence[int] = PIECES,
) -> Tensor:
    """How far rounding takes the model's own forward from fp32 on an answer, whoever wrote it.

    Args:
        model: in working precision, as transformers made it.
        reference: the same in fp32.
        prompt, ids: the answer, of two tokens at least.
        pieces: rows of the forwards that are tried.

    Returns:
        the largest `position_distances` of them, ``(positions - 1,)``.
    """
    exact = reference_logits(reference, prompt, ids)
    device, config, text = next(model.parameters()).device, cast("PreTrainedConfig", model.config), [*prompt, *ids[:-1]]
    largest = exact.new_zeros(len(ids) - 1)
    for rows in pieces:
        cuts = [0, *range(len(prompt), len(text), rows), len(text)]
        held = {cache_argument(model): DynamicCache(config=config), "use_cache": True}
        logits = []
        for start, end in itertools.pairwise(cuts):
            part = torch.tensor([text[start:end]], device=device)
            kept = end - start if start else 1  # of the prompt the last row
            logits.append(model(input_ids=part, logits_to_keep=kept, **held).logits[0])
        largest = torch.maximum(largest, position_distances(torch.cat(logits), exact))
    return largest
