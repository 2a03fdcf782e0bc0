"""Images in folders: `domain/class/image`."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from expkit.cli import progress
from expkit.errors import UsageError
from pden.data.domain import Domain
from pden.pixels import plain_image

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
# What Pillow raises on damaged files of one format or another, besides UnidentifiedImageError, which is an OSError.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
_SHOW = 2000  # images from which on reading shows its progress


def image_files(folder: Path, *, inside: bool = False) -> list[Path]:
    """The image files right in a folder, in order; with `inside` also those in folders inside it."""
    paths = folder.rglob("*") if inside else folder.iterdir()
    return sorted(path for path in paths if path.suffix.lower() in SUFFIXES)


def read_image(path: Path, size: int | tuple[int, int] = 0, channels: int = 3) -> Tensor:
    """One image as uint8 ``(channels, height, width)``.

    Args:
        size: both sides, or height and width, by bilinear resizing; 0 leaves the size alone.
        channels: 1 is grey, 3 colour.

    Raises:
        UsageError: no readable image.
    """
    try:
        with Image.open(path) as image:
            ready = plain_image(image).convert("L" if channels == 1 else "RGB")
            height, width = size if isinstance(size, tuple) else (size, size)
            if size and ready.size != (width, height):
                ready = ready.resize((width, height), Image.Resampling.BILINEAR)
            pixels: Tensor = pil_to_tensor(ready)
            return pixels
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} is not a readable image ({error})") from None


def load_folder(folder: Path, name: str, size: int = 0, channels: int = 3) -> Domain:
    """A domain from one folder per class.

    Raises:
        UsageError: no class folders, an empty class, an unreadable image, or (with size 0) sizes that differ.
    """
    classes = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    if not classes:
        raise UsageError(f"{folder} has no class folders; the layout is domain/class/image")
    files = [(path, label) for label, each in enumerate(classes) for path in image_files(folder / each)]
    empty = [each for label, each in enumerate(classes) if all(number != label for _, number in files)]
    if empty:
        raise UsageError(f'{folder}: class "{empty[0]}" has no images')
    images: list[Tensor] = []
    with progress() as bar:
        task = bar.add_task(f"reading {name}", total=len(files), visible=len(files) >= _SHOW)
        for path, _ in files:
            image = read_image(path, size, channels)
            if images and image.shape != images[0].shape:
                raise UsageError(
                    f"{path} is {image.shape[2]}x{image.shape[1]}, {files[0][0]} is "
                    f"{images[0].shape[2]}x{images[0].shape[1]}; set data.size to resize all of them"
                )
            images.append(image)
            if len(files) >= _SHOW:
                bar.advance(task)
    return Domain(name, torch.stack(images), torch.tensor([label for _, label in files]), tuple(classes))


def load_masks(folder: Path, masks: Path, name: str, classes: tuple[str, ...], void: int | None = None) -> Domain:
    """A segmentation domain: images in one folder, index masks of the same names (any suffix) in another.

    Args:
        classes: names of the labels 0, 1, ...
        void: a label that does not count, besides 255.

    Raises:
        UsageError: an image without a mask, or sizes that differ.
    """
    for each in (folder, masks):
        if not each.is_dir():
            raise UsageError(f"{each} does not exist")
    images: list[Tensor] = []
    labels: list[Tensor] = []
    by_stem = {path.stem: path for path in image_files(masks)}
    for path in image_files(folder):
        if path.stem not in by_stem:
            raise UsageError(f"{path} has no mask in {masks}")
        image = read_image(path)
        try:
            with Image.open(by_stem[path.stem]) as opened:
                if opened.mode not in ("1", "L", "P") and not opened.mode.startswith("I"):
                    need = "its pixels must be labels, in one channel"
                    raise UsageError(f"{by_stem[path.stem]} is a mask of mode {opened.mode}; {need}")
                mask = pil_to_tensor(opened)[0].long()
        except _DAMAGED as error:
            raise UsageError(f"{by_stem[path.stem]} is not a readable mask ({error})") from None
        for what, other in (("its mask", mask), ("the first image", images[0] if images else image)):
            if other.shape[-2:] != image.shape[-2:]:
                sides, others = ("x".join(map(str, reversed(each.shape[-2:]))) for each in (image, other))
                raise UsageError(f"{path} is {sides}, {what} is {others}; all images and masks must have one size")
        images.append(image)
        labels.append(mask if void is None else mask.masked_fill(mask == void, 255))
    if not images:
        raise UsageError(f"{folder} has no images")
    return Domain(name, torch.stack(images), torch.stack(labels), classes)


def load_mask_folder(folder: Path, name: str) -> Domain:
    """A segmentation domain from `images/`, `masks/` (pixels are labels, 255 does not count) and, if there is one,
    `classes.txt` with a name on each line.

    Raises:
        UsageError: see `load_masks`.
    """
    listing = folder / "classes.txt"
    if listing.is_file():
        lines = listing.read_text(encoding="utf-8").splitlines()
        return load_masks(
            folder / "images", folder / "masks", name, tuple(line.strip() for line in lines if line.strip())
        )
    found = load_masks(folder / "images", folder / "masks", name, tuple(str(each) for each in range(255)))
    return replace(found, classes=tuple(str(each) for each in range(max(found.present, default=0) + 1)))
