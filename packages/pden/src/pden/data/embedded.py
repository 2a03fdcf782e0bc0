"""The embedded default: digits, photographs and fonts that the installed packages bundle, so that nothing is fetched.

Source: the first 1,200 of scikit-learn's 8x8 handwritten digits. Targets: the other 597, changed in four ways, nearly
all by other people (the digits seem to lie writer by writer, and the last of the source's has 87 of the targets' images
too); and digits rendered from matplotlib's fonts. All targets are the same on every machine that has
the same versions of those packages.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pden.data.domain import Domain

CLASSES = tuple(str(digit) for digit in range(10))
SOURCE, SIZE, RENDERED = 1200, 32, 1000
TARGETS = ("digits-photo", "syn-like", "digits-inverted", "digits-low-contrast", "digits-thick")
NAMES = ("digits", "digits-test", *TARGETS)
_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif",
    "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmb10", "cmr10",
    "cmss10", "cmtt10",
)  # fmt: skip


def load_embedded(name: str) -> Domain:
    """One of `NAMES`; 32x32, grey except for `digits-photo` and `syn-like`."""
    if name == "syn-like":
        images, labels = render_digits(RENDERED, seed=0)
        return Domain(name, images, labels, CLASSES, note="digits rendered from fonts, a stand-in for SYN")
    images, labels = _handwritten(train=name == "digits")
    change = {
        "digits-photo": lambda each: blend_with_photographs(each, seed=0),
        "digits-inverted": lambda each: 255 - each,
        "digits-low-contrast": lambda each: (each.float() * 0.2 + 102).round().to(torch.uint8),
        "digits-thick": thicken,
    }.get(name)
    return Domain(name, images if change is None else change(images), labels, CLASSES)


def _handwritten(train: bool) -> tuple[Tensor, Tensor]:
    scans, digits = _scans()
    part = slice(None, SOURCE) if train else slice(SOURCE, None)
    small = torch.from_numpy(scans[part]).float()[:, None] / 16
    large = F.interpolate(small, (SIZE, SIZE), mode="bilinear", align_corners=False)
    return (large * 255).round().to(torch.uint8), torch.from_numpy(digits[part].astype(np.int64))


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's images and labels, which five domains are made of: it parses them as text each time."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images, bunch.target


def thicken(images: Tensor) -> Tensor:
    """Strokes two pixels wider on every side."""
    return F.max_pool2d(images.float(), 5, stride=1, padding=2).to(torch.uint8)


def photographs() -> list[np.ndarray]:
    """scikit-learn's two sample photographs, uint8 ``(height, width, 3)``."""
    from sklearn.datasets import load_sample_images

    return [np.asarray(each) for each in load_sample_images().images]


def blend_with_photographs(images: Tensor, seed: int) -> Tensor:
    """MNIST-M's recipe: the absolute difference of a digit and a random patch of a photograph, in colour."""
    rng, photos = np.random.default_rng(seed), photographs()
    patches = np.stack([_patch(photos, images.shape[-1], rng) for _ in range(len(images))])
    return (torch.from_numpy(patches).permute(0, 3, 1, 2).int() - images.int()).abs().to(torch.uint8)


def _patch(photos: list[np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    photo = photos[rng.integers(len(photos))]
    top, left = rng.integers(photo.shape[0] - size), rng.integers(photo.shape[1] - size)
    return photo[top : top + size, left : left + size]


def render_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Digits in the manner of Ganin's SYN: fonts, sizes, places, angles, colours, backgrounds and neighbours vary.

    Returns:
        uint8 ``(count, 3, 32, 32)`` and labels.
    """
    rng = np.random.default_rng(seed)
    photos, fonts = photographs(), _font_files()
    labels = rng.integers(0, 10, count)
    images = np.stack([_render(int(label), photos, fonts, rng) for label in labels])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def _font_files() -> list[Path]:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return [path for name in _FONTS if (path := folder / f"{name}.ttf").is_file()]


def _render(label: int, photos: list[np.ndarray], fonts: list[Path], rng: np.random.Generator) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    scale = 4  # drawn large, then made small, so that edges are smooth
    font = ImageFont.truetype(str(fonts[rng.integers(len(fonts))]), int(scale * rng.integers(18, 31)))
    before, after = (str(rng.integers(10)) if rng.random() < 0.4 else "" for _ in range(2))
    canvas = Image.new("L", (2 * SIZE * scale, 2 * SIZE * scale))
    draw = ImageDraw.Draw(canvas)
    middle = np.array([SIZE * scale + scale * rng.uniform(-3, 3), SIZE * scale + scale * rng.uniform(-3, 3)])
    draw.text(tuple(middle), str(label), font=font, fill=255, anchor="mm")
    width = draw.textlength(str(label), font=font)
    draw.text((middle[0] - width / 2, middle[1]), before, font=font, fill=255, anchor="rm")
    draw.text((middle[0] + width / 2, middle[1]), after, font=font, fill=255, anchor="lm")
    turned = canvas.rotate(rng.uniform(-25, 25), Image.Resampling.BILINEAR)
    half = SIZE * scale // 2
    cut = turned.crop((half, half, 3 * half, 3 * half)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    mask = np.asarray(cut.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8))), dtype=np.float32)[..., None] / 255
    background = _background(photos, rng)
    stroke = _contrasting(background.mean(axis=(0, 1)), rng)
    return np.clip(background * (1 - mask) + stroke * mask, 0, 255).round().astype(np.uint8)


def _background(photos: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.5:
        return np.broadcast_to(rng.uniform(0, 255, 3), (SIZE, SIZE, 3)).astype(np.float32)
    return _patch(photos, SIZE, rng).astype(np.float32)


def _contrasting(colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random colour that a reader can tell from this one."""
    while True:
        other = rng.uniform(0, 255, 3)
        if abs(float((other - colour).mean())) > 50:
            return other.astype(np.float32)
