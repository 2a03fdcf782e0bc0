"""Any timm backbone as an encoder (the extra `timm`)."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from expkit.errors import UsageError


def timm_encoder(name: str, channels: int, size: int) -> tuple[nn.Module, int]:
    """The backbone with random weights and pooled features, and their width.

    Raises:
        UsageError: timm is not installed, or has no model of this name.
    """
    try:
        import timm
    except ImportError:
        raise UsageError("timm is not installed; pip install 'pden[timm]'") from None
    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:3]
        raise UsageError(f'timm has no model "{name}"' + (f"; near it: {', '.join(near)}" if near else ""))
    settings: dict[str, Any] = {"pretrained": False, "num_classes": 0, "in_chans": channels}
    if "img_size" in inspect.signature(timm.model_entrypoint(name)).parameters or "vit" in name:
        settings["img_size"] = size  # transformers are built for one size
    encoder: Any = timm.create_model(name, **settings)
    return encoder, int(encoder.num_features)
