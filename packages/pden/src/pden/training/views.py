"""The views of a batch, and the task model's pass over them under a BatchNorm policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from expkit.norms import batch_norm_eval
from pden.baselines.randaugment import RandAugment
from pden.baselines.randconv import RandConv
from pden.data.augment import crop_flip
from pden.generators import Generator, draw_noise
from pden.models import TaskModel, TaskOutput
from pden.training.config import DataConfig
from pden.training.stream import Stream


def draw_views(
    images: Tensor, current: Generator, earlier: Generator | None, rng: torch.Generator, *, mix: bool = True
) -> list[Tensor]:
    """What is random in the views of a batch: noise of the earlier domain, the mixture's shares, noise of the current.

    Args:
        images: ``(batch, channels, height, width)``.
        earlier: None while there is no earlier domain; its noise and the shares are left out then.
        mix: whether there is a mixture; without it there are no shares.
    """
    draws = []
    if earlier is not None:
        draws.append(draw_noise(images, earlier.noise, rng))
        if mix:
            draws.append(torch.rand(len(images), 1, 1, 1, generator=rng, device=images.device))
    return [*draws, draw_noise(images, current.noise, rng)]


def augment_batch(
    images: Tensor, labels: Tensor, settings: DataConfig, stream: Stream, *, in_round: bool
) -> tuple[Tensor, Tensor]:
    """What every method's batch goes through first; RandAugment and random convolutions in rounds alone."""
    if settings.augment == "crop-flip":
        images, labels = crop_flip(images, labels, stream.torch)
    if in_round:  # without a share nothing is drawn
        if 0 < settings.randaugment > stream.host.random():
            images = RandAugment().views(images, stream)
        if settings.randconv_of == "batches" and 0 < settings.randconv > stream.host.random():
            images = RandConv().convolved(images, stream)
    return images, labels


def draw_textures(images: Tensor, count: int, settings: DataConfig, stream: Stream) -> tuple[Tensor, ...]:
    """Random convolutions of so many views, see `RandConv.draw`; nothing where views have none of their own."""
    if settings.randconv_of == "batches" or not settings.randconv:
        return ()
    return RandConv().draw(count, images.shape[1], settings.randconv, stream)


@torch.no_grad()
def make_views(
    images: Tensor, draws: Sequence[Tensor], current: Generator, earlier: Generator | None = None
) -> list[Tensor]:
    """The source x, an earlier domain x2, their mixture x3 and the current domain xg; no gradient reaches a generator.

    Args:
        images: in [0, 1], ``(batch, channels, height, width)``.
        draws: as :func:`draw_views` gives them for these generators.
        earlier: None while there is no earlier domain; x2 and x3 = u x + (1 - u) x2 are left out then.
    """
    views = [images]
    if earlier is not None:
        noise, *shares = draws[:-1]
        other = earlier(images, noise)
        views.append(other)
        views += [share * images + (1 - share) * other for share in shares]
    views.append(current(images, draws[-1]))
    return views


def forward_views(model: TaskModel, views: Sequence[Tensor], policy: str) -> TaskOutput:
    """One pass over all views, ``(views, batch, ...)`` in every field.

    Args:
        policy: "joint", "split", "source" or "frozen"; see `ModelConfig.batch_norm`. Without BatchNorm layers all
            are the same.
    """
    count = len(views)
    if policy == "joint" or not any(isinstance(each, _BatchNorm) for each in model.modules()):
        together = model.full(torch.cat(list(views)))
        return TaskOutput(*(torch.unflatten(each, 0, (count, -1)) for each in together))
    outputs = []
    with batch_norm_eval(model) if policy == "frozen" else nullcontext():
        for place, view in enumerate(views):
            with untracked_norms(model, policy == "source" and place > 0):
                outputs.append(model.full(view))
    return TaskOutput(*(torch.stack(each) for each in zip(*outputs, strict=True)))


@contextmanager
def untracked_norms(model: nn.Module, active: bool) -> Iterator[None]:
    """BatchNorm layers use the batch's statistics inside, and do not remember them."""
    norms = [each for each in model.modules() if isinstance(each, _BatchNorm)] if active else []
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
