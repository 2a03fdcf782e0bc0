"""The published files of CIFAR-10, CIFAR-100, SVHN and Tiny ImageNet, with their published checksums."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expkit.errors import UsageError
from train_adv.data.dataset import Augment, DataSet, Resident
from train_adv.data.fetch import Archive, locate
from train_adv.data.folder import CorruptPolicy, decode_all, shuffled

CIFAR10 = Archive(
    "cifar-10-batches-py",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "c58f30108f718f92721af3b95e74349a",
)
CIFAR10_FILES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}
CIFAR100 = Archive(
    "cifar-100-python",
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    "eb9058c3a382ffc7106e4002c42a8d85",
)
CIFAR100_FILES = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
SVHN = {
    "train_32x32.mat": (
        "http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
        "e26dedcc434d2e4c54c9b2d4a06d8373",
    ),
    "test_32x32.mat": ("http://ufldl.stanford.edu/housenumbers/test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
}
TINY = Archive(
    "tiny-imagenet-200",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "90528d7ca1a48142e341f4ef8d21d0de",
)


def cifar10(data_dir: Path | None) -> DataSet:
    """50,000 and 10,000 images of 32x32 in 10 classes."""
    return read_cifar10(locate(CIFAR10, data_dir), CIFAR10_FILES)


def cifar100(data_dir: Path | None) -> DataSet:
    """50,000 and 10,000 images of 32x32 in 100 classes."""
    return read_cifar100(locate(CIFAR100, data_dir), CIFAR100_FILES)


def svhn(data_dir: Path | None) -> DataSet:
    """73,257 and 26,032 house numbers of 32x32 in 10 classes; not mirrored, as digits are not."""
    paths = [locate(Archive(name, url, md5), data_dir) for name, (url, md5) in SVHN.items()]
    train, test = (read_svhn(path) for path in paths)
    return DataSet("svhn", tuple(str(digit) for digit in range(10)), train, test, Augment(padding=4, flip=False))


def tiny_imagenet(data_dir: Path | None, corrupt: CorruptPolicy = "refuse") -> DataSet:
    """100,000 and 10,000 images of 64x64 in 200 classes; the published validation split is the test split."""
    return read_tiny_imagenet(locate(TINY, data_dir), corrupt, counts=(100_000, 10_000))


def read_cifar10(folder: Path, checksums: Mapping[str, str]) -> DataSet:
    """The python batches below `folder`, each checked before it is opened."""
    batches = [read_pickle(folder / name, checksums[name]) for name in checksums if name.startswith("data_batch")]
    test = read_pickle(folder / "test_batch", checksums["test_batch"])
    names = read_pickle(folder / "batches.meta", checksums["batches.meta"])["label_names"]
    train = Resident(torch.cat([_images(each) for each in batches]), torch.cat([_labels(each) for each in batches]))
    return DataSet("cifar10", tuple(names), train, Resident(_images(test), _labels(test)), Augment())


def read_cifar100(folder: Path, checksums: Mapping[str, str]) -> DataSet:
    """The python files below `folder`, each checked before it is opened; fine labels."""
    train, test, meta = (read_pickle(folder / name, checksums[name]) for name in ("train", "test", "meta"))
    splits = [Resident(_images(each), _labels(each, "fine_labels")) for each in (train, test)]
    return DataSet("cifar100", tuple(meta["fine_label_names"]), splits[0], splits[1], Augment())


def read_svhn(path: Path) -> Resident:
    """One of SVHN's .mat files; the label 10 is the digit 0."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(path)
        images, labels = content["X"], content["y"]
    except (MatReadError, ValueError, TypeError, KeyError, OSError) as error:  # TypeError by older scipy
        raise UsageError(f"{path} is not one of SVHN's cropped .mat files ({error})") from None
    tensor = torch.from_numpy(np.ascontiguousarray(images.transpose(3, 2, 0, 1)))
    return Resident(tensor, torch.from_numpy(labels.astype(np.int64).reshape(-1) % 10))


def read_tiny_imagenet(folder: Path, corrupt: CorruptPolicy, counts: tuple[int, int] | None = None) -> DataSet:
    """train/WNID/images/*.JPEG and val/images/* with val/val_annotations.txt.

    Raises:
        UsageError: not the unpacked data, or other `counts` of images than were published: unpacked by half.
    """
    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.is_file() or not (folder / "train").is_dir():
        raise UsageError(f"{annotations} or folder train does not exist; {folder} is not the unpacked Tiny ImageNet")
    classes = sorted(entry.name for entry in (folder / "train").iterdir() if entry.is_dir())
    index = {name: number for number, name in enumerate(classes)}
    train = [
        (path, index[name]) for name in classes for path in sorted((folder / "train" / name / "images").glob("*.JPEG"))
    ]
    rows = [line.split("\t") for line in annotations.read_text(encoding="utf-8").splitlines() if line.strip()]
    test = [(folder / "val" / "images" / row[0], index[row[1]]) for row in rows]
    there = (len(train), sum(path.is_file() for path, _ in test))
    if counts is not None and there != counts:
        raise UsageError(
            f"{folder} has {there[0]:,} training and {there[1]:,} validation images, and {counts[0]:,} and "
            f"{counts[1]:,} were published: it was unpacked by half; remove it, or unpack it again"
        )
    words = folder / "words.txt"
    names = dict(line.split("\t")[:2] for line in words.read_text("utf-8").splitlines()) if words.is_file() else {}
    splits = [decode_all(shuffled(each), size=64, channels=3, corrupt=corrupt) for each in (train, test)]
    shown = tuple(names.get(name, name).split(",")[0] for name in classes)
    return DataSet("tiny-imagenet", shown, splits[0], splits[1], Augment())


class _Restricted(pickle.Unpickler):
    """Knows numpy's arrays and nothing else, so that a file can run no code."""

    _KNOWN = frozenset({"_reconstruct", "ndarray", "dtype", "scalar", "encode"})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("numpy", "_codecs") and name in self._KNOWN:
            if name in ("_reconstruct", "scalar"):
                from numpy._core import multiarray

                return getattr(multiarray, name)
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_pickle(path: Path, md5: str) -> dict[str, Any]:
    """One of CIFAR's python files, after its checksum has matched, through an unpickler that knows arrays only.

    Raises:
        UsageError: the file is missing or is not the published one.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    raw = path.read_bytes()
    found = hashlib.md5(raw).hexdigest()
    if found != md5:
        raise UsageError(f"{path} is not the published file: its MD5 is {found}, expected {md5}")
    try:
        content: dict[str, Any] = _Restricted(io.BytesIO(raw), encoding="latin1").load()
    except (pickle.UnpicklingError, AttributeError, EOFError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    return content


def _images(batch: Mapping[str, Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(batch["data"]).reshape(-1, 3, 32, 32).copy())


def _labels(batch: Mapping[str, Any], key: str = "labels") -> Tensor:
    return torch.tensor(batch[key], dtype=torch.int64)
