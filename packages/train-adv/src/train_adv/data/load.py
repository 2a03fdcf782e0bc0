"""Data sets by name."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from expkit.errors import UsageError
from train_adv.data import published
from train_adv.data.dataset import Augment, DataSet, Resident
from train_adv.data.folder import CorruptPolicy, image_folder

NAMES = ("digits", "cifar10", "cifar100", "svhn", "tiny-imagenet")


def load_data(
    name: str,
    data_dir: Path | None = None,
    *,
    image_size: int = 224,
    corrupt: CorruptPolicy = "refuse",
    resident_gib: float = 4.0,
) -> DataSet:
    """The data set called `name`.

    Args:
        name: one of `NAMES`; the folder of an image folder; or `FILE.npz#train_x,train_y,test_x,test_y`.
        data_dir: looked in first, before EXPKIT_DATA and the user's cache.
        image_size: of an image folder.
        corrupt: what to do with images that cannot be read.
        resident_gib: see `image_folder`.

    Raises:
        UsageError: an unknown name, or data that is missing or damaged.
    """
    simple: dict[str, Callable[[Path | None], DataSet]] = {
        "cifar10": published.cifar10,
        "cifar100": published.cifar100,
        "svhn": published.svhn,
        "tiny-imagenet": lambda folder: published.tiny_imagenet(folder, corrupt),
    }
    if name == "digits":
        return digits()
    if name in simple:
        return simple[name](data_dir)
    if "#" in name:
        return arrays(name)
    if Path(name).is_dir():
        return image_folder(Path(name), size=image_size, corrupt=corrupt, resident_gib=resident_gib)
    raise UsageError(f'unknown data "{name}"; use {", ".join(NAMES)}, a folder of class folders, or FILE.npz#x,y,x,y')


def digits() -> DataSet:
    """scikit-learn's 1,797 handwritten digits, 8x8 and grey, which come with the library; a fifth is the test split."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = torch.from_numpy(np.rint(bundle.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bundle.target.astype(np.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    cut = len(labels) // 5
    whole = Resident(images, labels)
    names = tuple(str(digit) for digit in range(10))
    return DataSet("digits", names, whole.select(order[cut:]), whole.select(order[:cut]), Augment(1, flip=False))


def arrays(name: str) -> DataSet:
    """Arrays of one npz file: uint8 images (n, height, width) or (n, height, width, 3), and integer labels."""
    file, _, keys = name.partition("#")
    wanted = keys.split(",")
    if len(wanted) != 4 or not Path(file).is_file():
        raise UsageError(f"{name!r}: expected an existing FILE.npz#train_x,train_y,test_x,test_y")
    parts = [_array(file, key) for key in wanted]
    splits = [_resident(file, parts[0], parts[1]), _resident(file, parts[2], parts[3])]
    shapes = [tuple(split.images.shape[1:]) for split in splits]
    if shapes[0] != shapes[1]:
        raise UsageError(f"{file}: training images are {shapes[0]} and test images {shapes[1]}; they must be alike")
    count = int(max(split.labels.max() for split in splits)) + 1
    if count > len(splits[0]):
        raise UsageError(f"{file}: the largest label is {count - 1}, and there are {len(splits[0])} training images")
    padding = splits[0].images.shape[-1] // 8
    names = tuple(str(each) for each in range(count))
    return DataSet(name, names, splits[0], splits[1], Augment(padding, flip=False))


def _array(file: str, key: str) -> np.ndarray:
    """One array of an npz file; never unpickled."""
    try:
        with np.load(file, allow_pickle=False) as content:
            if key not in content:
                raise UsageError(f"{file} has no array {key!r}; it has {', '.join(content.files)}")
            return np.asarray(content[key])
    except UsageError:
        raise
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        raise UsageError(f"{file} is no npz file of plain arrays") from None


def _resident(file: str, images: np.ndarray, labels: np.ndarray) -> Resident:
    shaped = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
    if images.dtype != np.uint8 or not shaped or 0 in images.shape:
        raise UsageError(
            f"{file}: images are {images.dtype} {images.shape}; expected uint8 (n, height, width) or "
            "(n, height, width, 3), at least one"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UsageError(
            f"{file}: labels are {labels.dtype} {labels.shape} for {len(images)} images; expected whole numbers from 0 "
            "on, one an image"
        )
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return Resident(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64)))
