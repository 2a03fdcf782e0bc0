"""Pictures of one's own for a checkpoint, and pictures of what an attack did to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from expkit.checkpoint import atomic_path
from expkit.errors import UsageError
from train_adv.data.batches import to_float
from train_adv.data.folder import SUFFIXES, UNREADABLE, CorruptPolicy, decode, report_corrupt
from train_adv.models.classifier import Classifier


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Files as they are, folders as the images in them; UsageError where one does not exist or there is none."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UsageError(f"image {path} does not exist")
        inside = (
            sorted(each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        )
        found += inside
    if not found:
        raise UsageError(f"no images in {', '.join(map(str, paths))}")
    return found


def read_images(
    paths: Sequence[Path], model: Classifier, corrupt: CorruptPolicy = "refuse"
) -> tuple[list[Path], Tensor]:
    """The readable images, fp32 (n, channels, height, width) in [0, 1], scaled to what the model was trained on."""
    channels, height, width = model.spec.image_shape
    good, bad, images = [], [], []
    for path in paths:
        try:
            images.append(decode(path, (height, width), channels))
            good.append(path)
        except UNREADABLE:
            bad.append(path)
    report_corrupt(bad, len(paths), corrupt)
    return good, to_float(torch.stack(images))


def write_image(path: Path, image: Tensor, natural: Tensor) -> Tensor:
    """Write an adversarial (channels, height, width) in [0, 1] as PNG; returns what a reader of the file will get.

    Changes are rounded to whole levels of 1/255 towards the natural image, so that the file stays in the ball too.
    """
    from PIL import Image

    change = (image - natural) * 255
    whole = (change + 1e-3 * change.sign()).trunc()  # 7.9999 is 8
    levels = ((natural * 255).round() + whole).clamp(0, 255).to(torch.uint8).cpu()
    array = levels.permute(1, 2, 0).numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(temporary)
    return levels.float() / 255


def grid(
    path: Path,
    images: Tensor,
    adversarial: Tensor,
    labels: Sequence[str],
    before: Sequence[str],
    after: Sequence[str],
    title: str,
) -> None:
    """One column an image: the natural one, the adversarial one, and their difference magnified to the full range.

    Above them what the model says, in red where it is not the label.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(images)
    largest = float((adversarial - images).abs().max())
    scale = 0.5 / largest if largest > 0 else 1.0
    difference = 0.5 + scale * (adversarial - images)
    figure, axes = plt.subplots(3, count, figsize=(max(1.3 * count, 4.5), 4.9), squeeze=False)
    for column in range(count):
        shown = ((images, before[column]), (adversarial, after[column]), (difference, ""))
        for axis, (tensor, text) in zip(axes[:, column], shown, strict=True):
            array = tensor[column].permute(1, 2, 0).clamp(0, 1).cpu().numpy()
            axis.imshow(np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array, interpolation="nearest")
            axis.set_title(text, fontsize=8, color="black" if text == labels[column] else "tab:red")
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, label in zip(axes[:, 0], ("natural", "adversarial", f"difference x{scale:.3g}"), strict=True):
        axis.set_ylabel(label, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)
