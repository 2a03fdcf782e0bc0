"""Arrays in one file: `FILE.npz#x_key,y_key`."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expkit.errors import UsageError
from pden.data.domain import Domain, to_uint8

_MOST_CLASSES = 65_536  # a label beyond it is an accident, and would be given as many names


@contextmanager
def open_arrays(path: Path) -> Iterator[Any]:
    """An .npz file, open, without unpickling.

    Raises:
        UsageError: no such file, or a damaged one, also where that shows only while it is read.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not hasattr(arrays, "files"):
                raise UsageError(f"{path} is a single array; give an .npz file of images and labels")
            yield arrays
    except UsageError:
        raise
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path} cannot be read as .npz: {error}") from None


def load_arrays(path: Path, images_key: str, labels_key: str, name: str) -> Domain:
    """A domain from two arrays of an .npz file, which is read without unpickling.

    Images are uint8 or floats in [0, 1], ``(count, height, width)`` with or without 1 or 3 channels at the end or
    after the count; labels are integers, numbered from 0, one for each image or for each pixel (255: does not count).

    Raises:
        UsageError: no such file or key, or arrays of another form.
    """
    with open_arrays(path) as arrays:
        for key in (images_key, labels_key):
            if key not in arrays.files:
                raise UsageError(f'{path} has no array "{key}"; it has {", ".join(arrays.files)}')
        images, labels = arrays[images_key], arrays[labels_key]
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim not in (1, 3):
        raise UsageError(
            f'{path}: "{labels_key}" is {labels.dtype} of shape {labels.shape}; needed are integers (count,)'
        )
    numbers = torch.from_numpy(labels.astype(np.int64))
    counted = numbers[numbers != 255] if numbers.dim() == 3 else numbers
    count = int(counted.max()) + 1 if len(counted) else 0
    if count > _MOST_CLASSES:
        raise UsageError(f"{path}: label {count - 1} is out of range; labels are numbered from 0")
    return Domain(name, channels_first(images, str(path)), numbers, tuple(str(each) for each in range(count)))


def channels_first(images: np.ndarray, name: str) -> Tensor:
    """uint8 ``(count, channels, height, width)`` from an array with channels last, first, or none."""
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise UsageError(f"{name}: images of {images.dtype}; needed are uint8, or floats in [0, 1]")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UsageError(f"{name}: images of shape {images.shape}; needed are (count, height, width[, 1 or 3])")
    return to_uint8(torch.from_numpy(np.ascontiguousarray(images)), name)
