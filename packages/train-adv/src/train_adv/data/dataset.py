"""What a data set is here: uint8 images that are held in memory or decoded when asked for, and their labels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from expkit.device import described
from expkit.errors import UsageError


class Split(Protocol):
    """Labelled images, all of one size.

    Attributes:
        labels: int64 (n,), on the CPU or where the images are.
    """

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def read(self, indices: Tensor) -> Tensor:
        """Images uint8 (k, channels, height, width) of the given indices (k,)."""
        ...

    def select(self, indices: Tensor) -> Split:
        """The split that holds only these, in this order."""
        ...

    def fingerprint(self) -> str:
        """A hash that other images or labels do not have."""
        ...


@dataclass(frozen=True)
class Resident:
    """Images in memory, on the CPU or a device.

    Attributes:
        images: uint8 (n, channels, height, width).
        labels: int64 (n,).

    Raises:
        UsageError: tensors of another kind.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise UsageError(
                f"images are {described(images)}; needed are uint8 of 0 to 255, (n, channels, height, width), as in "
                "(images * 255).round().to(torch.uint8)"
            )
        if images.shape[1] > 4 >= images.shape[3]:
            raise UsageError(
                f"images are {described(images)}, with their channels last; use images.permute(0, 3, 1, 2)"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise UsageError(f"labels are {described(labels)}; needed are int64 ({len(images)},), one for each image")

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Tensor) -> Tensor:
        return self.images[indices.to(self.images.device)]

    def select(self, indices: Tensor) -> Resident:
        indices = indices.to(self.images.device)
        return Resident(self.images[indices], self.labels[indices])

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for tensor in (self.images, self.labels):
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device) -> Resident:
        """The same on another device."""
        return Resident(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Augment:
    """Random crop after zero padding, random horizontal flip, and random erasing (Zhong et al. 2020).

    Attributes:
        padding: pixels on each side.
        flip: whether half of the images are mirrored.
        erase: share of images of which a rectangle is blackened: 2 to 33 % of the area, sides as 0.3 to 3.3
            (torchvision's ranges).
    """

    padding: int = 4
    flip: bool = True
    erase: float = 0.0


@dataclass(frozen=True)
class DataSet:
    """Training and test images.

    Attributes:
        name: as the user gave it.
        class_names: one for each label.
        train, test: the published splits.
        augment: what is customary for it.

    Raises:
        UsageError: a label that has no name, a split without images, or splits of other shapes.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    augment: Augment

    def __post_init__(self) -> None:
        shapes = []
        for part, split in (("training", self.train), ("test", self.test)):
            if not len(split):
                raise UsageError(f"{self.name} has no {part} images")
            shapes.append("x".join(map(str, split.read(torch.tensor([0])).shape[1:])))
            low, high = (int(each) for each in split.labels.aminmax())
            if low < 0 or high >= len(self.class_names):
                wrong, count = low if low < 0 else high, len(self.class_names)
                raise UsageError(f"{self.name} has the {part} label {wrong}; its {count} classes are 0 to {count - 1}")

        if len(set(shapes)) > 1:
            raise UsageError(f"{self.name} has training images of {shapes[0]} and test images of {shapes[1]}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.train.read(torch.tensor([0])).shape[1:]
        return channels, height, width


def stream_seed(*parts: int | str) -> int:
    """A seed below 2**63 that depends on all parts and nothing else: every step has random numbers of its own.

    So a resumed run draws what an uninterrupted one draws, without any generator's state being kept.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Cut a validation split off the training split, stratified by class: (rest, held out).

    Raises:
        UsageError: a fraction outside (0, 1), or one that leaves either side empty.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"validation.fraction is {fraction}; it must be between 0 and 1")
    generator = torch.Generator().manual_seed(stream_seed(seed, "hold out"))
    labels = split.labels.cpu()
    order = torch.randperm(len(labels), generator=generator)
    # Stable sort by label: shuffled within each class. Taking every k-th of that takes a fraction of each class.
    by_class = order[labels[order].argsort(stable=True)]
    count = round(fraction * len(labels))
    if not 0 < count < len(labels):
        raise UsageError(f"validation.fraction {fraction} of {len(labels)} images leaves {count}; choose another")
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[by_class[(torch.arange(count) * len(labels)) // count]] = True
    return split.select((~chosen).nonzero().squeeze(1)), split.select(chosen.nonzero().squeeze(1))


def channel_statistics(split: Split, limit: int = 10_000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in [0, 1] over the first `limit` images."""
    indices = torch.arange(min(limit, len(split)))
    total = squares = torch.zeros(1)
    count = 0
    for part in torch.split(indices, 1000):
        images = split.read(part).double() / 255
        total = total + images.sum((0, 2, 3)).cpu()
        squares = squares + images.square().sum((0, 2, 3)).cpu()
        count += images[:, 0].numel()
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(1e-6).sqrt()
    return tuple(round(each, 6) for each in mean.tolist()), tuple(round(each, 6) for each in std.tolist())
