"""Pixels of pictures that people save, and pixels that are numbers in [0, 1]."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from expkit.device import described
from expkit.errors import UsageError


def check_pixels(images: Tensor, name: str, first: int = 0) -> None:
    """Raise UsageError where floats ``(count, ...)`` are no numbers or out of [0, 1]; it waits for their device.

    Args:
        first: number of the first image, for the message.
    """
    if not images.is_floating_point():
        raise UsageError(f"{name}: images are {described(images)}; give uint8, or floats in [0, 1]")
    if not images.numel():
        return
    if not bool(torch.isfinite(images).all()):
        bad = int((~torch.isfinite(images)).flatten(1).any(dim=1).nonzero()[0, 0])
        raise UsageError(f"{name}: image {first + bad} has pixels that are not numbers (nan or infinite)")
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        raise UsageError(f"{name}: pixels from {low:g} to {high:g}; give uint8, or floats in [0, 1]")


def plain_image(image: Image.Image) -> Image.Image:
    """Grey (L) or colour (RGB) with 8 bits, upright as its EXIF says, and on white where it is transparent.

    Raises:
        ValueError: pixels whose range nobody knows: floats, or whole numbers beyond 16 bits.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels are beyond 16 bits; save it with 8 or 16")
        return Image.fromarray((values >> 8).astype(np.uint8))  # Pillow would cut it off at 255 instead
    if image.mode == "F":
        raise ValueError("its pixels are floats; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")
