"""Accuracies and features of a split, batch by batch; the last batch is filled up so that all have one shape.

Whatever the training's precision, all of it is fp32 (without TF32), in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from expkit.device import tf32
from train_adv.attacks.gradient import logits_of, right
from train_adv.attacks.pgd import PGD
from train_adv.data.batches import to_float
from train_adv.data.dataset import Split, stream_seed
from train_adv.models.classifier import Classifier
from train_adv.modes import eval_mode

Perturb = Callable[[Tensor, Tensor, torch.Generator], Tensor]


def batches_of(split: Split, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, int]]:
    """fp32 images, labels, and how many of them are not filling: the last batch repeats its first images."""
    size = min(size, len(split))
    for indices in torch.split(torch.arange(len(split)), size):
        filled = indices[torch.arange(size) % len(indices)]
        yield (
            to_float(split.read(filled).to(device)),
            split.labels[filled.to(split.labels.device)].to(device),
            len(indices),
        )


@torch.no_grad()
def right_answers(
    model: Classifier,
    split: Split,
    *,
    size: int,
    device: torch.device,
    perturb: Perturb | None = None,
    seed: int = 0,
    advance: Callable[[int], object] | None = None,
) -> Tensor:
    """Boolean (n,), on the CPU: which images, perturbed if asked for, the model classifies rightly.

    Args:
        advance: is told how many images were done, batch by batch.
    """
    found = []
    with eval_mode(model), tf32(False):
        for number, (images, labels, count) in enumerate(batches_of(split, size, device)):
            if perturb is not None:
                generator = torch.Generator(device).manual_seed(stream_seed(seed, "measure", number))
                images = perturb(images, labels, generator)
            found.append(right(logits_of(model, images), labels)[:count])
            if advance is not None:
                advance(count)
    return torch.cat(found).cpu()


def right_under_pgd(
    model: Classifier,
    split: Split,
    attack: PGD,
    *,
    size: int,
    device: torch.device,
    seed: int = 0,
    advance: Callable[[int], object] | None = None,
) -> Tensor:
    """Boolean (n,), on the CPU: which images withstand PGD on the cross-entropy; `advance` as in `right_answers`."""

    def perturb(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        return attack(model, images, labels, generator=generator)

    return right_answers(model, split, size=size, device=device, perturb=perturb, seed=seed, advance=advance)


@torch.no_grad()
def features_of(model: Classifier, split: Split, *, size: int, device: torch.device) -> Tensor:
    """Pooled features (n, dim), fp32, of natural images."""
    with eval_mode(model), tf32(False):
        return torch.cat(
            [
                model.with_features(images).features[:count].float()
                for images, _, count in batches_of(split, size, device)
            ]
        )
