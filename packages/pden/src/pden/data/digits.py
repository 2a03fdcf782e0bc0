"""The digits data sets by their published formats: MNIST, USPS, SVHN, MNIST-M, SYN, and Chars74K's street digits.

MNIST, USPS and SVHN come from torchvision, with its homes and checksums. MNIST-M and SYN have no lasting home: their
files are read where they are. All of them may also come from one `digits.npz` (arrays `mnist_m_test_x`, ...).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from expkit.errors import UsageError
from pden.data.arrays import channels_first, load_arrays, open_arrays
from pden.data.cifar import load_cifar
from pden.data.domain import Domain
from pden.data.folder import read_image
from pden.data.home import Home

CLASSES = tuple(str(digit) for digit in range(10))
# name: (arrays in digits.npz, what it is in torchvision or here)
NAMES = {
    "mnist10k": "mnist_train10k",
    "mnist": "mnist_train",
    "mnist-test": "mnist_test",
    "mnist-rest": "mnist_test",
    "mnist-rest-photo": "mnist_test",
    "usps": "usps_test",
    "usps-train": "usps_train",
    "svhn": "svhn_test",
    "mnist-m": "mnist_m_test",
    "syn": "syn_test",
    "chars74k": "chars74k",
}
# How many images each has as published. MNIST-M's test was made of the first 9,001 of MNIST's, in their order: who
# measures on it holds out `mnist-rest`, the others.
COUNTS = {
    "mnist10k": 10_000,
    "mnist": 60_000,
    "mnist-test": 10_000,
    "mnist-rest": 999,
    "usps": 2007,
    "usps-train": 7291,
    "svhn": 26_032,
    "mnist-m": 9001,
    "syn": 9553,
}
PARTS = {"mnist10k": slice(None, 10_000), "mnist-rest": slice(9001, None)}  # of a published set


def load_digits(name: str, home: Home) -> Domain:
    """One of `NAMES`: test parts unless the name says otherwise; `mnist10k` is the first 10,000 of MNIST's training,
    `mnist-rest` the last 999 of its test, of which MNIST-M's has none, and `mnist-rest-photo` these on the last of
    CIFAR-10's test pictures: a domain to develop on where MNIST-M is a target.

    Raises:
        UsageError: it is nowhere and cannot be fetched (says what to put where), or has another number of images.
    """
    if name == "mnist-rest-photo":
        return _on_pictures(name, home)
    images, labels = _load(name, home)
    part = PARTS.get(name, slice(None))
    images, labels = images[part], labels[part]
    if len(images) != COUNTS.get(name, len(images)):
        raise UsageError(f"{name} has {len(images)} images here and {COUNTS[name]} as published; fetch its files again")
    return Domain(name, images, labels, CLASSES)


def _on_pictures(name: str, home: Home) -> Domain:
    try:
        digits, pictures = load_digits("mnist-rest", home), load_cifar("cifar10-test", home).images
        images = blend_strokes(digits.images, pictures[-len(digits) :])
    except UsageError as error:
        raise UsageError(f"{name} is made of MNIST's and CIFAR-10's test images: {error}") from None
    return Domain(name, images, digits.labels, CLASSES)


def blend_strokes(images: Tensor, pictures: Tensor) -> Tensor:
    """Strokes with hard edges, as MNIST-M's are, that invert the middle of a picture.

    Args:
        images: uint8 digits, light on dark, ``(count, 1, height, width)``.
        pictures: uint8 and no smaller, ``(count, channels, ...)``.

    Raises:
        UsageError: they are smaller.
    """
    height, width = images.shape[-2:]
    if pictures.shape[-2] < height or pictures.shape[-1] < width:
        raise UsageError(f"digits of {height}x{width} on pictures of {pictures.shape[-2]}x{pictures.shape[-1]}")
    top, left = (pictures.shape[-2] - height) // 2, (pictures.shape[-1] - width) // 2
    cut = pictures[..., top : top + height, left : left + width]
    return torch.where(images > 127, 255 - cut, cut)


def _load(name: str, home: Home) -> tuple[Tensor, Tensor]:
    packed = home.find("digits.npz", "digits/digits.npz")
    key = NAMES[name]
    if packed is not None:
        with open_arrays(packed) as arrays:
            has = f"{key}_x" in arrays.files
        if has:
            found = load_arrays(packed, f"{key}_x", f"{key}_y", name)
            return found.images, found.labels
    if name == "mnist-m":
        return _mnist_m(home)
    if name == "syn":
        return _syn(home)
    if name == "chars74k":
        raise UsageError("chars74k: put digits.npz with chars74k_x and chars74k_y (32x32x3, uint8) into --data-dir")
    return _torchvision(name, home)


def _torchvision(name: str, home: Home) -> tuple[Tensor, Tensor]:
    makers: dict[str, tuple[Any, dict[str, Any]]] = {
        "mnist": (torchvision.datasets.MNIST, {"train": True}),
        "mnist10k": (torchvision.datasets.MNIST, {"train": True}),
        "mnist-test": (torchvision.datasets.MNIST, {"train": False}),
        "mnist-rest": (torchvision.datasets.MNIST, {"train": False}),
        "usps": (torchvision.datasets.USPS, {"train": False}),
        "usps-train": (torchvision.datasets.USPS, {"train": True}),
        "svhn": (torchvision.datasets.SVHN, {"split": "test"}),
    }
    make, options = makers[name]
    found: Any = None
    for folder in home.folders:
        for root in (folder, folder / make.__name__.lower()):
            if found is None and root.is_dir():
                try:
                    found = make(str(root), download=False, **options)
                except (RuntimeError, OSError):
                    continue  # it is not here
                except Exception as error:  # a damaged file: torchvision's readers assert and raise what comes
                    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                    raise UsageError(f"{name} in {root} cannot be read ({reason}); fetch its files again") from None
    if found is None:
        found = _fetch(make, options, name, home)
    images = found.data if isinstance(found.data, Tensor) else torch.from_numpy(np.ascontiguousarray(found.data))
    labels = torch.as_tensor(np.asarray(found.labels if name == "svhn" else found.targets), dtype=torch.int64)
    return images if images.dim() == 4 else images[:, None], labels


def _fetch(make: Any, options: dict[str, Any], name: str, home: Home) -> Any:
    if not home.download:
        raise UsageError(f"{name} is not in {', '.join(map(str, home.folders))}")
    home.cache.mkdir(parents=True, exist_ok=True)
    try:
        return make(str(home.cache), download=True, **options)
    except Exception as error:  # torchvision raises what its helpers raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{name} cannot be fetched ({reason}); put torchvision's files into --data-dir") from None


def _mnist_m(home: Home) -> tuple[Tensor, Tensor]:
    """Ganin's archive, unpacked: a folder of images and a text file of `name label` lines."""
    folder = home.find("mnist_m/mnist_m_test", "mnist_m_test")
    listing = home.find("mnist_m/mnist_m_test_labels.txt", "mnist_m_test_labels.txt")
    if folder is None or listing is None:
        raise UsageError(
            "mnist-m has no lasting home on the web; unpack mnist_m.tar.gz (mnist_m/mnist_m_test/*.png and "
            f"mnist_m/mnist_m_test_labels.txt) into {home.folders[0]}"
        )
    rows = [line.split() for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
    wrong = [row for row in rows if len(row) != 2 or not re.fullmatch(r"\d", row[1])]
    if wrong:
        raise UsageError(f"{listing}: {' '.join(wrong[0])!r} is not a file name and a digit")
    images = torch.stack([read_image(folder / file) for file, _ in rows])
    return images, torch.tensor([int(label) for _, label in rows])


def _syn(home: Home) -> tuple[Tensor, Tensor]:
    """Ganin's synthetic digits: `synth_test_32x32.mat` in SVHN's format."""
    path = home.find("synth_test_32x32.mat", "syn/synth_test_32x32.mat", "SynthDigits/synth_test_32x32.mat")
    if path is None:
        raise UsageError(f"syn has no lasting home on the web; put synth_test_32x32.mat into {home.folders[0]}")
    return read_mat(path)


def read_mat(path: Path) -> tuple[Tensor, Tensor]:
    """Images and labels of a MATLAB file of SVHN's format, in which the digit 0 has label 10."""
    from scipy.io import loadmat

    try:
        found = loadmat(path)
    except Exception as error:  # scipy raises half a dozen types for a damaged file
        raise UsageError(f"{path} cannot be read as a MATLAB file ({error})") from None
    if "X" not in found or "y" not in found:
        raise UsageError(f"{path} has no arrays X and y")
    labels = torch.from_numpy(found["y"].reshape(-1).astype(np.int64))
    return channels_first(found["X"].transpose(3, 0, 1, 2), str(path)), labels % 10
