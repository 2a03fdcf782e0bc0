"""Accuracies and features of a split, batch by batch; the last batch is filled up so that all have one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from expkit.device import autocast
from train_adv.attacks.gradient import logits_of
from train_adv.attacks.pgd import PGD
from train_adv.data.batches import to_float
from train_adv.data.dataset import Split, stream_seed
from train_adv.models.classifier import Classifier

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
    dtype: torch.dtype = torch.float32,
    perturb: Perturb | None = None,
    seed: int = 0,
) -> Tensor:
    """Boolean (n,), on the CPU: which images, perturbed if asked for, a model in eval mode classifies rightly."""
    found = []
    for number, (images, labels, count) in enumerate(batches_of(split, size, device)):
        with autocast(device, dtype):
            if perturb is not None:
                generator = torch.Generator(device).manual_seed(stream_seed(seed, "measure", number))
                images = perturb(images, labels, generator)
            found.append((logits_of(model, images).argmax(1) == labels)[:count])
    return torch.cat(found).cpu()


def pgd_accuracy(
    model: Classifier,
    split: Split,
    attack: PGD,
    *,
    size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> float:
    """Accuracy under PGD on the cross-entropy."""

    def perturb(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        return attack(model, images, labels, generator=generator)

    right = right_answers(model, split, size=size, device=device, dtype=dtype, perturb=perturb, seed=seed)
    return float(right.float().mean())


@torch.no_grad()
def features_of(
    model: Classifier, split: Split, *, size: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Pooled features (n, dim), fp32, of natural images."""
    found = []
    for images, _, count in batches_of(split, size, device):
        with autocast(device, dtype):
            found.append(model.with_features(images).features[:count].float())
    return torch.cat(found)
