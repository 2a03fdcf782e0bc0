"""What a generator and a task model minimise in a step (PDEN, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pden.generators import Generator, build_generator, draw_noise
from pden.losses import (
    adversarial_contrast,
    barlow_twins,
    cycle_loss,
    diversity,
    diversity_loss,
    instance_contrast,
    jensen_shannon,
    safety_loss,
    supervised_contrast,
)
from pden.losses.safety import IGNORED
from pden.models import TaskModel, TaskOutput
from pden.training.config import LossConfig


class Expansion(nn.Module):
    """A generator with the reverse one of its cycle loss, which has no noise."""

    def __init__(
        self, kind: str, channels: int, width: int, noise: int, grid: int = 0, grid_share: float = 1.0
    ) -> None:
        super().__init__()
        self.generator: Generator = build_generator(
            kind, channels=channels, width=width, noise=noise, grid=grid, grid_share=grid_share
        )
        self.reverse: Generator = build_generator(kind, channels=channels, width=width, noise=0)


def generator_loss(
    task: TaskModel,
    expansion: Expansion,
    images: Tensor,
    labels: Tensor,
    noises: Sequence[Tensor],
    weights: LossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Safety - diversity + cycle + adversarial contrast, and each by itself.

    Args:
        task: in eval mode, so that nothing of it changes.
        images: of the source, in [0, 1].
        noises: of two draws, each ``(batch, noise)``.
        weights: a loss of weight 0 is not computed.
    """
    draws = expansion.generator.draws(images, noises)
    parts = {"diversity": diversity(draws[0], draws[1])}
    total = weights.diversity * diversity_loss(parts["diversity"], weights.diversity_limit)
    if weights.safety or weights.adversarial:
        seen = task.full(draws[0])
        if weights.safety:
            parts["safety"] = safety_loss(seen.logits, labels)
            total = total + weights.safety * parts["safety"]
        if weights.adversarial:
            with torch.no_grad():
                own = task.full(images).embeddings
            with torch.autocast(images.device.type, enabled=False):  # similarities in fp32
                parts["adversarial"] = adversarial_contrast(seen.embeddings, own, weights.temperature)
            total = total + weights.adversarial * parts["adversarial"]
    if weights.cycle:
        restored = expansion.reverse.transform(draws[0], draw_noise(images, expansion.reverse.noise))
        parts["cycle"] = cycle_loss(restored, images)
        total = total + weights.cycle * parts["cycle"]
    return total, parts


def task_loss(output: TaskOutput, labels: Tensor, weights: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the views' cross-entropies, the contrast across views, their consistency, and each by itself.

    Args:
        output: fields ``(views, batch, ...)``.
        labels: ``(batch,)`` or ``(batch, height, width)``.
    """
    views = len(output.logits)
    repeated = labels.repeat(views, *[1] * (labels.dim() - 1))
    parts = {"cross_entropy": views * safety_loss(output.logits.flatten(0, 1), repeated)}
    total = parts["cross_entropy"]
    if weights.contrast != "none" and weights.contrast_weight and views > 1:
        parts["contrast"] = contrast(output.embeddings, labels, weights)
        total = total + weights.contrast_weight * parts["contrast"]
    if weights.consistency and views > 1:
        counts = labels != IGNORED if labels.dim() == 3 else None
        parts["consistency"] = jensen_shannon(output.logits.float(), counts)
        total = total + weights.consistency * parts["consistency"]
    return total, parts


def contrast(embeddings: Tensor, labels: Tensor, weights: LossConfig) -> Tensor:
    """The contrast that `weights` names, over embeddings ``(views, batch, size)``. Dense labels have no classes to
    gather, so supervised contrast is instance contrast for them."""
    if weights.contrast == "barlow":
        return barlow_twins(embeddings, weights.off_diagonal)
    if weights.contrast == "supervised" and labels.dim() == 1:
        return supervised_contrast(embeddings, labels, weights.temperature)
    return instance_contrast(embeddings, weights.temperature)
