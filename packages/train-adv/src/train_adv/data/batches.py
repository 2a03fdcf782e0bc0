"""Batches of augmented images on the device, the same for a seed and an epoch whatever was interrupted before."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from expkit.distributed import World
from expkit.errors import UsageError
from train_adv.data.dataset import Augment, Resident, Split, stream_seed

_AREA = (0.02, 0.33)  # of what is erased, as a share of the image
_RATIO = 3.3  # of its sides, at most


class Batches:
    """All epochs of one training split, for one process.

    Each epoch is one permutation of the whole split; every global batch is dealt out over the processes. The last,
    incomplete batch is left out, so that every batch has the same shape.

    Args:
        split: resident ones are moved to the device once; others are decoded by `workers` processes.
        batch_size: of all processes together.
        device: where batches are wanted.

    Attributes:
        steps: batches of an epoch.

    Raises:
        UsageError: a batch that does not divide over the processes, or that is larger than the split.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        augment: Augment,
        device: torch.device,
        world: World,
        workers: int = 4,
    ) -> None:
        if batch_size % world.size:
            raise UsageError(f"batch_size {batch_size} does not divide over {world.size} processes")
        if not 2 <= batch_size // world.size or batch_size > len(split):
            raise UsageError(
                f"batch_size {batch_size} on {world.size} process(es) with {len(split)} images: "
                "needed at least 2 images on each (one has no neighbours) and no more than there are"
            )
        self.split: Split = split.to(device) if isinstance(split, Resident) else split
        self.batch_size, self.seed, self.augment, self.device = batch_size, seed, augment, device
        self.world, self.workers = world, workers
        self.steps = len(split) // batch_size

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's batches of an epoch from number `first` on: fp32 images in [0, 1], and labels."""
        generator = torch.Generator().manual_seed(stream_seed(self.seed, "order", epoch))
        order = torch.randperm(len(self.split), generator=generator)
        order = order[: self.steps * self.batch_size].view(self.steps, self.world.size, -1)[first:, self.world.rank]
        for number, (images, labels) in enumerate(self._read(order), start=first):
            draws = torch.Generator(self.device)
            draws.manual_seed(stream_seed(self.seed, "augment", epoch, number, self.world.rank))
            images = images.to(self.device, non_blocking=True)
            yield to_float(augmented(images, self.augment, draws)), labels.to(self.device, non_blocking=True)

    def _read(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self.split, Resident):
            for indices in order.to(self.device):
                yield self.split.images[indices], self.split.labels[indices]
            return
        loader = DataLoader(
            _Decoder(self.split),
            batch_sampler=order.tolist(),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            # The loader draws a base seed from the global generator otherwise, and a resumed run would differ.
            generator=torch.Generator().manual_seed(0),
        )
        yield from loader


class _Decoder(Dataset[tuple[Tensor, Tensor]]):
    """A split as torch's loaders want it."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.split.read(torch.tensor([index]))[0], self.split.labels[index]


def augmented(images: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    """Random crops and flips of uint8 images (batch, channels, height, width), one gather for all; then erasing."""
    images = _moved(images, augment, generator)
    return erased(images, augment.erase, generator) if augment.erase else images


def _moved(images: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    rows = torch.arange(height, device=images.device).expand(count, height)
    columns = torch.arange(width, device=images.device).expand(count, width)
    if augment.flip:
        mirrored = torch.rand(count, 1, generator=generator, device=images.device) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    if augment.padding:
        shifts = torch.randint(2 * augment.padding + 1, (2, count, 1), generator=generator, device=images.device)
        rows, columns = rows + shifts[0], columns + shifts[1]
        images = F.pad(images, [augment.padding] * 4)
    if not augment.flip and not augment.padding:
        return images
    batch = torch.arange(count, device=images.device)[:, None, None]
    # Advanced indices around a slice put the channels last, which is the memory format that convolutions like.
    return images[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def erased(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """This share of the images (batch, channels, height, width), drawn at random, with a rectangle each in black."""
    count, _, height, width = images.shape
    draws = torch.rand(5, count, 1, generator=generator, device=images.device)
    area = (_AREA[0] + (_AREA[1] - _AREA[0]) * draws[1]) * height * width
    ratio = _RATIO ** (2 * draws[2] - 1)  # of its height to its width, from 1 / _RATIO to _RATIO
    tall = (area * ratio).sqrt().round().clamp(1, height)
    wide = (area / ratio).sqrt().round().clamp(1, width)
    top, left = ((draws[3] * (height - tall + 1)).floor(), (draws[4] * (width - wide + 1)).floor())
    rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
    in_rows, in_columns = ((rows >= top) & (rows < top + tall), (columns >= left) & (columns < left + wide))
    hit = (draws[0] < share)[:, :, None] & in_rows[:, :, None] & in_columns[:, None, :]
    return images.masked_fill(hit[:, None], 0)


def to_float(images: Tensor) -> Tensor:
    """uint8 to fp32 in [0, 1]."""
    return images.float().div_(255)
