"""A domain from what a user writes: a name, a folder, or `FILE.npz#x_key,y_key`."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from pathlib import Path

from expkit.errors import UsageError
from pden.data import cifar, digits, embedded, scenes
from pden.data.arrays import load_arrays
from pden.data.domain import Domain
from pden.data.folder import load_folder, load_mask_folder
from pden.data.home import Home


def domain_names() -> tuple[str, ...]:
    """Names that `load_domain` knows, besides folders and arrays."""
    return (*embedded.NAMES, *digits.NAMES, *cifar.NAMES, *scenes.NAMES)


def parse_target(text: str) -> tuple[str, str]:
    """`NAME=SPEC` as both; a spec alone is named after itself."""
    match = re.fullmatch(r"([\w.\- ]+)=(.+)", text)
    if match:
        return match[1], match[2]
    _, _, keys = text.partition("#")
    if keys:
        return keys.partition(",")[0].removesuffix("_x"), text
    return (Path(text).name if "/" in text and Path(text).is_dir() else text), text


def load_domain(text: str, home: Home, *, size: int = 32, channels: int = 3) -> Domain:
    """The domain called `text`, at `size` pixels (0: as it is) with `channels` channels.

    Args:
        text: a name of `domain_names`, `pacs/DOMAIN`, `cifar10-c/CORRUPTION/LEVEL`, a folder of class folders, a
            folder of `images/` and `masks/`, or `FILE.npz#x_key,y_key`; `NAME=` before it names it in reports.

    Raises:
        UsageError: nothing is called so; or what the loader of its kind raises.
    """
    name, spec = parse_target(text)
    found = _load(spec, name, home, size, channels).fitted(size, channels)
    if spec == text:
        return found  # called as its loader calls it
    mark = f"{cifar.RECOMPUTED} " if found.name.startswith(cifar.RECOMPUTED) else ""  # which no name hides
    return replace(found, name=mark + name)


def _load(spec: str, name: str, home: Home, size: int, channels: int) -> Domain:
    path, separator, keys = spec.partition("#")
    if separator:
        if keys.count(",") != 1:
            raise UsageError(f'"{spec}": write FILE.npz#x_key,y_key')
        images, labels = keys.split(",")
        return load_arrays(Path(path), images, labels, name)
    if spec in embedded.NAMES:
        return embedded.load_embedded(spec)
    if spec in digits.NAMES:
        return digits.load_digits(spec, home)
    if spec.split("/")[0] in cifar.NAMES:
        return cifar.load_cifar(spec, home)
    if spec.split("/")[0] in scenes.NAMES:
        return scenes.load_scenes(spec, home, size, channels)
    if (Path(spec) / "images").is_dir() and (Path(spec) / "masks").is_dir():
        return load_mask_folder(Path(spec), name)
    if Path(spec).is_dir():
        return load_folder(Path(spec), name, size, channels)
    if Path(spec).suffix == ".npz":
        raise UsageError(f'"{spec}": write FILE.npz#x_key,y_key')
    near = difflib.get_close_matches(spec, domain_names(), 1, 0.5)
    hint = f'; did you mean "{near[0]}"?' if near else f"; names are {', '.join(domain_names())}"
    raise UsageError(f'no domain "{spec}": it is no folder, no FILE.npz#x_key,y_key{hint}')
