"""Any timm backbone as an encoder (the extra `timm`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from expkit.errors import UsageError


def timm_encoder(name: str, channels: int, size: int) -> tuple[nn.Module, int]:
    """The backbone with random weights and pooled features, and their width.

    Raises:
        UsageError: timm is not installed, has no model of this name, or one that takes no images of this size.
    """
    try:
        import timm
    except ImportError:
        raise UsageError("timm is not installed; pip install 'pden[timm]'") from None
    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:3]
        raise UsageError(f'timm has no model "{name}"' + (f"; near it: {', '.join(near)}" if near else ""))
    settings: dict[str, Any] = {"pretrained": False, "num_classes": 0, "in_chans": channels}
    try:
        try:
            encoder: Any = timm.create_model(name, img_size=size, **settings)  # transformers are built for one size
        except TypeError:  # others take any
            encoder = timm.create_model(name, **settings)
        width = _width(encoder, channels, size)
    except Exception as error:  # each backbone raises what its layers raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f'timm\'s "{name}" takes no images of {size} pixels ({reason})') from None
    return encoder, width


@torch.no_grad()
def _width(encoder: nn.Module, channels: int, size: int) -> int:
    """Of the features that it gives: `num_features` of some backbones is another layer's."""
    encoder.eval()
    features = encoder(torch.zeros(1, channels, size, size))
    encoder.train()
    if features.dim() != 2:
        raise ValueError(f"features of shape {tuple(features.shape)}, not pooled")
    return int(features.shape[1])
