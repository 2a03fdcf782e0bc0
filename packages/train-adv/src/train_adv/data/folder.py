"""Images in folders, one folder a class; corrupt files are named, counted, and skipped or refused."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL.Image import DecompressionBombError
from torch import Tensor

from expkit.cli import progress
from expkit.errors import UsageError
from train_adv.data.dataset import Augment, DataSet, Resident, Split, stream_seed

CorruptPolicy = Literal["refuse", "skip"]
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_TEST_NAMES = ("test", "val", "validation")
_SHOWN = 5  # corrupt files that are named
_HINT = " (a run with data.corrupt = skip leaves them out)"
UNREADABLE = (OSError, ValueError, SyntaxError, DecompressionBombError)  # Pillow's for what is no image, or cut off


def decode(path: Path, size: int | tuple[int, int], channels: int) -> Tensor:
    """One image, uint8 (channels, height, width) for a `size` of both or (one number) a square.

    It is scaled until it covers that, then its middle is cut out.
    """
    from PIL import Image

    with Image.open(path) as opened:
        image: Image.Image = opened
        if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
            levels = np.asarray(image).astype(np.float64) / 257
            image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
        image = image.convert("RGB" if channels == 3 else "L")
    height, width = size if isinstance(size, tuple) else (size, size)
    if image.size != (width, height):
        scale = max(width / image.width, height / image.height)
        wide, high = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
        left, top = (wide - width) // 2, (high - height) // 2
        image = image.crop((left, top, left + width, top + height))
    array = np.array(image, dtype=np.uint8)
    return torch.from_numpy(array.reshape(height, width, channels)).permute(2, 0, 1).contiguous()


def decode_all(
    files: Sequence[tuple[Path, int]], *, size: int, channels: int, corrupt: CorruptPolicy = "refuse"
) -> Resident:
    """Decode (path, label) pairs into memory.

    Raises:
        UsageError: there is none, or files are corrupt and are to be refused (the first ones are named).
    """
    images, labels, bad = [], [], []
    with progress() as bar, ThreadPoolExecutor() as pool:
        task = bar.add_task("decoding images", total=len(files))
        decoded = pool.map(lambda each: _try(each[0], size, channels), files)
        for (path, label), image in zip(files, decoded, strict=True):
            bar.advance(task)
            if image is None:
                bad.append(path)
            else:
                images.append(image)
                labels.append(label)
    report_corrupt(bad, len(files), corrupt, _HINT)
    return Resident(torch.stack(images), torch.tensor(labels))


def report_corrupt(bad: Sequence[Path], total: int, corrupt: CorruptPolicy, hint: str = "") -> None:
    """Refuse corrupt files, or say on stderr which were skipped; refuse also where nothing is left."""
    if not bad:
        if not total:
            raise UsageError("there are no images to read")
        return
    named = ", ".join(str(path) for path in bad[:_SHOWN]) + (", ..." if len(bad) > _SHOWN else "")
    if corrupt == "refuse" or len(bad) == total:
        raise UsageError(f"{len(bad)} of {total} images cannot be read: {named}{hint if len(bad) < total else ''}")
    print(f"skipped {len(bad)} of {total} images that cannot be read: {named}", file=sys.stderr)


@dataclass(frozen=True)
class Streamed:
    """Images that are decoded when asked for.

    Attributes:
        paths: one for each label.
        labels: int64 (n,).
        size, channels: see `decode`.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    size: int
    channels: int

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Tensor) -> Tensor:
        return torch.stack([decode(self.paths[index], self.size, self.channels) for index in indices.tolist()])

    def select(self, indices: Tensor) -> Streamed:
        paths = tuple(self.paths[index] for index in indices.tolist())
        return Streamed(paths, self.labels[indices], self.size, self.channels)

    def fingerprint(self) -> str:
        """Of the files' names, lengths and times, as reading all of them would take long."""
        about = [(str(path), found.st_size, found.st_mtime_ns) for path in self.paths for found in [path.stat()]]
        whole = repr((about, self.labels.tolist(), self.size, self.channels))
        return hashlib.sha256(whole.encode()).hexdigest()


def image_folder(
    root: Path, *, size: int, channels: int = 3, corrupt: CorruptPolicy = "refuse", resident_gib: float = 4.0
) -> DataSet:
    """`root/train/CLASS/*` and `root/test/CLASS/*` (or val), or `root/CLASS/*`, a fifth of each becoming the test.

    Folders whose names begin with a dot are no classes.

    Args:
        size: images become size x size.
        corrupt: what to do with files that cannot be read.
        resident_gib: a split below this size is held in memory, a larger one is decoded along the way.

    Raises:
        UsageError: no classes, no images, a class without any for training, or other classes in the test split.
    """
    if not root.is_dir():
        raise UsageError(f"image folder {root} does not exist")
    test_root = next((root / name for name in _TEST_NAMES if (root / name).is_dir()), None)
    base = root / "train" if (root / "train").is_dir() else root
    if base == root and test_root is not None:
        raise UsageError(f"{root} has a folder {test_root.name} and no folder train")
    classes = _folders(base)
    train = shuffled(_list(base, classes))
    if test_root is not None:
        unknown = sorted(set(_folders(test_root)) - set(classes))
        if unknown:
            raise UsageError(f'{test_root} has a class "{unknown[0]}" that {base} does not have')
        test = shuffled(_list(test_root, classes))
    else:
        own = [[each for each in train if each[1] == label] for label in range(len(classes))]
        cuts = [max(len(files) // 5, 1) if len(files) > 1 else 0 for files in own]
        test = shuffled([each for files, cut in zip(own, cuts, strict=True) for each in files[:cut]])
        train = shuffled([each for files, cut in zip(own, cuts, strict=True) for each in files[cut:]])
    if not train or not test:
        raise UsageError(f"{root} has {len(train)} training and {len(test)} test images; use ROOT/train/CLASS/IMAGE")
    lacking = [set(range(len(classes))) - {label for _, label in files} for files in (train, test)]
    if lacking[0]:
        raise UsageError(f'class "{classes[min(lacking[0])]}" has no training image in {base}; remove the folder')
    if lacking[1]:
        print(f'warning: class "{classes[min(lacking[1])]}" of {root} has no test image', file=sys.stderr)
    splits = [_make(each, size, channels, corrupt, resident_gib) for each in (train, test)]
    return DataSet(str(root), tuple(classes), splits[0], splits[1], Augment(padding=size // 8))


def _folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def shuffled(files: Sequence[tuple[Path, int]]) -> list[tuple[Path, int]]:
    """In one order for all time, so that the first so many images are of all classes."""
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(stream_seed("folder")))
    return [files[index] for index in order.tolist()]


def _list(root: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    return [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]


def _make(
    files: list[tuple[Path, int]], size: int, channels: int, corrupt: CorruptPolicy, resident_gib: float
) -> Split:
    if len(files) * channels * size * size <= resident_gib * 2**30:
        return decode_all(files, size=size, channels=channels, corrupt=corrupt)
    with progress() as bar, ThreadPoolExecutor() as pool:
        task = bar.add_task("checking images", total=len(files))
        good: list[tuple[Path, int]] = []
        bad: list[tuple[Path, int]] = []
        for each, image in zip(files, pool.map(lambda one: _try(one[0], size, channels), files), strict=True):
            bar.advance(task)
            (bad if image is None else good).append(each)
    report_corrupt([path for path, _ in bad], len(files), corrupt, _HINT)
    return Streamed(tuple(path for path, _ in good), torch.tensor([label for _, label in good]), size, channels)


def _try(path: Path, size: int, channels: int) -> Tensor | None:
    try:
        return decode(path, size, channels)
    except UNREADABLE:
        return None
