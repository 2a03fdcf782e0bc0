"""A domain: images as uint8 in one tensor, labels beside them, so that a batch is one look-up on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, rgb_to_grayscale

from expkit.device import described
from expkit.errors import UsageError
from pden.losses.safety import IGNORED
from pden.pixels import check_pixels, plain_image

_FLOATS = 1 << 26  # so many pixels are floats at a time while images are resized: 256 MiB


@dataclass(frozen=True)
class Domain:
    """Labelled images of one domain.

    Attributes:
        name: as reports show it.
        images: uint8, ``(count, channels, height, width)``.
        labels: int64, ``(count,)``, or ``(count, height, width)`` with 255 where a pixel does not count.
        classes: their names; the labels are indices of this.
        note: what a reader of its figures must know.

    Raises:
        UsageError: tensors of another kind, or a label that has no name.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    note: str = ""

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise UsageError(
                f"{self.name}: images are {described(self.images)}; needed are uint8 (count, channels, height, width), "
                "which pden.data.to_uint8 makes of floats in [0, 1]"
            )
        if self.labels.dtype != torch.int64 or self.labels.dim() not in (1, 3):
            raise UsageError(f"{self.name}: labels are {described(self.labels)}; needed are int64 (count,)")
        if len(self.images) == 0 or len(self.images) != len(self.labels):
            raise UsageError(f"{self.name}: {len(self.images)} images and {len(self.labels)} labels")
        if self.dense and self.labels.shape[-2:] != self.images.shape[-2:]:
            sizes = "x".join(map(str, self.labels.shape[-2:])), "x".join(map(str, self.images.shape[-2:]))
            raise UsageError(f"{self.name}: labels of {sizes[0]} on images of {sizes[1]}; there is one for each pixel")
        counted = self.labels[self.labels != IGNORED] if self.dense else self.labels
        if len(counted) and (counted.min() < 0 or counted.max() >= len(self.classes)):
            wrong = int(counted.min() if counted.min() < 0 else counted.max())
            raise UsageError(f"{self.name}: label {wrong} is out of range; there are {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def dense(self) -> bool:
        """Whether there is a label for each pixel."""
        return self.labels.dim() == 3

    @property
    def present(self) -> list[int]:
        """The classes that occur."""
        return [int(each) for each in torch.unique(self.labels) if not (self.dense and each == IGNORED)]

    def take(self, index: Tensor | slice) -> Domain:
        """Some of the images."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def spread(self, count: int) -> Domain:
        """So many of the images (all, if there are no more), evenly over the domain, which may be sorted by class."""
        if count >= len(self):
            return self
        return self.take(torch.arange(count, device=self.images.device) * len(self) // count)

    def to(self, device: torch.device) -> Domain:
        """The same on a device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] and labels at these places."""
        return self.images[index].float() / 255, self.labels[index]

    def fitted(self, size: int, channels: int) -> Domain:
        """Bilinear resize to `size` (0 leaves sizes alone); grey is copied to three channels, of colour one channel is
        the luminance."""
        images, labels = fit_images(self.images, size, channels, self.name), self.labels
        if self.dense and size and labels.shape[-2:] != images.shape[-2:]:
            labels = F.interpolate(labels[:, None].float(), images.shape[-2:], mode="nearest-exact")[:, 0].long()
        return replace(self, images=images, labels=labels)

    def split(self, share: float, seed: int) -> tuple[Domain, Domain]:
        """(the rest, a share held out); drawn per class where images have one label each.

        Raises:
            UsageError: a share that leaves one of the two empty.
        """
        rng = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=rng)
        held = torch.zeros(len(self), dtype=torch.bool)
        groups = [order] if self.dense else [order[self.labels[order] == label] for label in self.present]
        for group in groups:
            held[group[: round(share * len(group))]] = True
        if not 0 < int(held.sum()) < len(self):
            raise UsageError(f"{self.name}: a validation share of {share} of {len(self)} images leaves a part empty")
        return self.take(~held), self.take(held)


def fit_images(images: Tensor, size: int | tuple[int, int], channels: int, name: str) -> Tensor:
    """uint8 images ``(count, channels, height, width)`` at `size` pixels with `channels` channels.

    `size` is the shorter side of images that keep their shape (0 leaves them alone), or height and width.

    Raises:
        UsageError: neither 1 nor 3 channels, and others are wanted.
    """
    shape = list(images.shape[-2:])
    if isinstance(size, tuple):
        shape = list(size)
    elif size:
        shape = [round(side * size / min(shape)) for side in shape]
    if shape != list(images.shape[-2:]):
        some = max(1, _FLOATS // images[0].numel())
        images = torch.cat(
            [
                F.interpolate(part.float(), shape, mode="bilinear", antialias=True).round().clamp(0, 255).byte()
                for part in torch.split(images, some)
            ]
        )
    if images.shape[1] == channels:
        return images
    if (images.shape[1], channels) == (3, 1):
        grey: Tensor = rgb_to_grayscale(images)
        return grey
    if images.shape[1] != 1:
        raise UsageError(f"{name}: images of {images.shape[1]} channels; the model takes {channels}")
    return images.expand(-1, channels, -1, -1).contiguous()


def to_uint8(images: Tensor, name: str, first: int = 0) -> Tensor:
    """uint8 images ``(count, ...)`` from uint8 ones or floats in [0, 1].

    Args:
        first: number of the first one, for the message.

    Raises:
        UsageError: pixels that are no numbers or out of [0, 1].
    """
    if images.dtype == torch.uint8:
        return images
    check_pixels(images, name, first)
    return (images.float() * 255).round().to(torch.uint8)


def from_dataset(dataset: Any, name: str, classes: Sequence[str] | None = None) -> Domain:
    """Any map-style torch dataset of (image, label) as a domain in memory.

    Args:
        dataset: images are PIL images, uint8 tensors or floats in [0, 1], ``([channels,] height, width)``, all of one
            size; labels are integers, or one for each pixel.
        name: of the domain.
        classes: their names; from the dataset's own `classes` (or those of what a `Subset` is of), or numbered, where
            they are not given.

    Raises:
        UsageError: an empty dataset or none of this kind, or sizes that differ.
    """
    from PIL.Image import Image

    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UsageError(f"{name}: a {type(dataset).__name__} has no length or no items; needed is a map-style dataset")
    images, labels = [], []
    for index in range(len(dataset)):
        item = dataset[index]
        if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[0], (Tensor, Image)):
            raise UsageError(f"{name}: item {index} is no pair of an image (PIL or tensor) and a label")
        tensor = item[0] if isinstance(item[0], Tensor) else pil_to_tensor(plain_image(item[0]))
        label = torch.as_tensor(item[1])
        if label.is_floating_point() or label.dim() not in (0, 2):
            raise UsageError(
                f"{name}: label {index} is {described(label)}; needed is an integer, or one for each pixel"
            )
        images.append(to_uint8(tensor[None] if tensor.dim() == 3 else tensor[None, None], name, index)[0])
        labels.append(label.long())
    if not images:
        raise UsageError(f"{name}: the dataset is empty")
    for index, image in enumerate(images):
        if image.shape != images[0].shape:
            raise UsageError(
                f"{name}: image {index} is {tuple(image.shape)}, the first is {tuple(images[0].shape)}; resize them"
            )
    stacked = torch.stack(labels)
    whole = getattr(dataset, "dataset", None)
    found = (
        classes
        or getattr(dataset, "classes", None)
        or getattr(whole, "classes", None)
        or [str(n) for n in range(int(stacked.max()) + 1)]
    )
    return Domain(name, torch.stack(images), stacked, tuple(str(each) for each in found))
