"""CIFAR-10, and CIFAR-10-C: the published files, or recomputed from the CIFAR-10 test set on the device.

`cifar10` (50,000) and `cifar10-test`; `cifar10-c/CORRUPTION/LEVEL` reads the published `CIFAR-10-C/CORRUPTION.npy`;
`cifar10-c-recomputed/CORRUPTION/LEVEL` computes it. CIFAR's own files are pickles: they are read by a restricted
unpickler, and only after their MD5 has matched.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from expkit.device import resolve_device
from expkit.errors import UsageError
from pden.data.corruptions import COMMON, CORRUPTIONS, corrupt
from pden.data.domain import Domain
from pden.data.home import Home

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NAMES = ("cifar10", "cifar10-test", "cifar10-c", "cifar10-c-recomputed")
RECOMPUTED = "CIFAR-10-C (recomputed)"
_CHUNK = 1000


def load_cifar(spec: str, home: Home) -> Domain:
    """The domain that `spec` names; see the module.

    Raises:
        UsageError: files that are absent or altered, or an unknown corruption or level.
    """
    kind, _, rest = spec.partition("/")
    if kind in ("cifar10", "cifar10-test"):
        if rest:
            raise UsageError(f'"{spec}": {kind} has no parts')
        images, labels = _cifar10(home, train=kind == "cifar10")
        return Domain(kind, images, labels, CLASSES)
    corruption, level = _parse(spec, rest)
    if kind == "cifar10-c":
        return _published(corruption, level, home)
    images, labels = _cifar10(home, train=False)
    frost = home.find("frost")
    made = recompute(images, corruption, level, frost=frost)
    note = f"{RECOMPUTED}: our own code with the CIFAR constants, seed 0"
    if corruption == "frost":
        note += f"; frost textures from {'the folder frost/' if frost else 'a procedure of ours'}"
    return Domain(f"{RECOMPUTED} {corruption}/{level}", made, labels, CLASSES, note)


def expand_levels(text: str) -> list[str]:
    """`cifar10-c/5` as its 15 corruptions, `cifar10-c/5/all` as 19, `cifar10-c` as 15 at all five levels; each has the
    `NAME=` that came before it, with corruption and level."""
    before, equals, spec = text.rpartition("=")
    match = re.fullmatch(r"(cifar10-c(?:-recomputed)?)(?:/([1-5]))?(/all)?", spec)
    if match is None:
        return [text]  # one corruption, another data set, or what its loader refuses
    kind, level, whole = match.groups()
    names = CORRUPTIONS if whole else COMMON
    levels = level or "12345"
    return [
        (f"{before} {name} {level}=" if equals else "") + f"{kind}/{name}/{level}" for level in levels for name in names
    ]


def recompute(images: Tensor, corruption: str, level: int, *, seed: int = 0, frost: Path | None = None) -> Tensor:
    """uint8 images ``(count, 3, 32, 32)`` with a corruption, on the GPU where there is one."""
    device = resolve_device("auto")
    rng = torch.Generator(device).manual_seed(seed * 1000 + 10 * CORRUPTIONS.index(corruption) + level)
    parts = [
        corrupt(part.to(device), corruption, level, rng, frost=frost).cpu() for part in torch.split(images, _CHUNK)
    ]
    return torch.cat(parts)


def _parse(spec: str, rest: str) -> tuple[str, int]:
    corruption, _, level = rest.partition("/")
    if corruption not in CORRUPTIONS:
        raise UsageError(f'"{spec}": no corruption "{corruption}"; they are {", ".join(CORRUPTIONS)}')
    if level not in ("1", "2", "3", "4", "5"):
        raise UsageError(f'"{spec}": level "{level}"; use 1 to 5')
    return corruption, int(level)


def _published(corruption: str, level: int, home: Home) -> Domain:
    folder = home.find("CIFAR-10-C", "cifar10-c", "cifar-10-c")
    if folder is None or not (folder / f"{corruption}.npy").is_file():
        raise UsageError(
            f"CIFAR-10-C is not there; unpack CIFAR-10-C.tar (zenodo.org, record 2535967) into {home.folders[0]}, "
            "or use cifar10-c-recomputed"
        )
    part = slice(10_000 * (level - 1), 10_000 * level)
    images, labels = (_read_array(folder / name)[part] for name in (f"{corruption}.npy", "labels.npy"))
    if images.ndim != 4 or images.shape[3] != 3 or len(images) != 10_000 or labels.shape != (10_000,):
        raise UsageError(f"{folder / corruption}.npy or labels.npy is not a published file of CIFAR-10-C")
    tensor = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).contiguous()
    return Domain(f"CIFAR-10-C {corruption}/{level}", tensor, torch.from_numpy(labels.astype(np.int64)), CLASSES)


def _read_array(path: Path) -> np.ndarray:
    try:
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path} cannot be read as .npy: {error}") from None
    return found


def _cifar10(home: Home, train: bool) -> tuple[Tensor, Tensor]:
    """Images and labels from `cifar-10-batches-py`, fetched from its home where it is nowhere."""
    maker: Any = torchvision.datasets.CIFAR10
    folder = home.find(maker.base_folder, f"cifar10/{maker.base_folder}")
    if folder is None:
        folder = _fetch(maker, home)
    wanted = maker.train_list if train else maker.test_list
    batches = [read_batch(folder / name, md5) for name, md5 in wanted]
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = [label for batch in batches for label in batch["labels"]]
    return torch.from_numpy(images), torch.tensor(labels)


def _fetch(maker: Any, home: Home) -> Path:
    from torchvision.datasets.utils import download_url

    if not home.download:
        raise UsageError(f"CIFAR-10 ({maker.base_folder}) is not in {', '.join(map(str, home.folders))}")
    home.cache.mkdir(parents=True, exist_ok=True)
    try:
        download_url(maker.url, home.cache, maker.filename, maker.tgz_md5)
        with tarfile.open(home.cache / maker.filename) as archive:
            archive.extractall(home.cache, filter="data")
    except (OSError, RuntimeError, tarfile.TarError) as error:
        raise UsageError(f"cannot fetch CIFAR-10 ({error}); unpack {maker.filename} into {home.folders[0]}") from None
    return home.cache / maker.base_folder  # type: ignore[no-any-return]


def read_batch(path: Path, md5: str) -> dict[str, Any]:
    """One of CIFAR's pickled batches, if its MD5 is right, as plain values and arrays.

    Raises:
        UsageError: the file is absent, altered, or asks for anything but arrays.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    content = path.read_bytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise UsageError(f"{path} has MD5 {found}, not {md5}: it is damaged or altered")
    return unpickle_arrays(content, str(path))


def unpickle_arrays(content: bytes, name: str) -> dict[str, Any]:
    """A pickle of a dictionary of plain values and NumPy arrays; nothing else in it is ever called."""
    try:
        loaded = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError) as error:
        raise UsageError(f"{name}: {error}") from None
    if not isinstance(loaded, dict):
        raise UsageError(f"{name} holds a {type(loaded).__name__}, not a dictionary")
    return loaded


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        from numpy._core.multiarray import _reconstruct

        allowed: dict[tuple[str, str], Any] = {
            ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of arrays")
        return allowed[module, name]
