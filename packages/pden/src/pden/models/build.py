"""Task models by name."""

from __future__ import annotations

import re

from expkit.errors import UsageError
from pden.models.dense import fcn_encoder, small_fcn_encoder
from pden.models.digits import digits_encoder
from pden.models.task import TaskModel
from pden.models.wide_resnet import wide_resnet_encoder


def model_names() -> tuple[str, ...]:
    """What `build_model` takes."""
    return ("digits", "wrn-DEPTH-FACTOR", "timm:NAME", "fcn-resnet50", "fcn-small")


def build_model(
    name: str, *, classes: int, channels: int = 3, size: int = 32, width: float = 1.0, embedding: int = 128
) -> TaskModel:
    """A new task model with random weights.

    Args:
        name: `digits`, `wrn-16-4`, `timm:NAME` (any timm backbone; needs the extra `timm`), or for segmentation
            `fcn-resnet50` or `fcn-small`.
        classes: of the labels; at least 2.
        channels: of the images.
        size: side of the images, for `digits`.
        width: factor on the layers of `digits` and `fcn-small`.
        embedding: size of the projection head's output.

    Raises:
        UsageError: an unknown name, one class only, or images too small for the network.
    """
    if classes < 2:
        raise UsageError(f"the source has {classes} class; a classifier needs at least 2")
    if name == "digits":
        if size < 16:
            raise UsageError(f"the digits net needs images of at least 16 pixels, not {size}")
        encoder, features = digits_encoder(channels, size, width)
    elif match := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        try:
            encoder, features = wide_resnet_encoder(channels, int(match[1]), int(match[2]))
        except ValueError as error:
            raise UsageError(str(error)) from None
    elif name.startswith("timm:"):
        from pden.models.backbones import timm_encoder

        encoder, features = timm_encoder(name.removeprefix("timm:"), channels, size)
    elif name in ("fcn-resnet50", "fcn-small"):
        encoder, features = (fcn_encoder if name == "fcn-resnet50" else small_fcn_encoder)(channels, width)
        return TaskModel(encoder, features, classes, embedding=embedding, dense=True)
    else:
        raise UsageError(f'unknown model "{name}"; use {", ".join(model_names())}')
    return TaskModel(encoder, features, classes, embedding=embedding)
