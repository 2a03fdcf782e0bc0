"""Which columns of a left-padded batch a query may see, per kind of layer, as the additive masks that models take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class LayerMasks:
    """Additive masks ``(rows, 1, queries, columns)`` for layers with full attention and with a window.

    Attributes:
        full: for layers that see everything; None where every layer has a window.
        windowed: for layers that see the last `window` columns; None where no layer has a window.
        window: columns seen, the query's own included.
    """

    full: Tensor | None
    windowed: Tensor | None
    window: int | None

    def open_column(self, column: int) -> None:
        """Let the single query see `column`, its own; the window's oldest column closes."""
        if self.full is not None:
            self.full[..., column] = 0
        if self.windowed is not None and self.window is not None:
            self.windowed[..., column] = 0
            if column >= self.window:
                self.windowed[..., column - self.window] = float("-inf")

    def model_argument(self, columns: int | None = None) -> Tensor | dict[str, Tensor]:
        """What a stock model takes as `attention_mask`: a tensor, or one per layer type where types differ."""
        full = None if self.full is None else self.full[..., :columns]
        windowed = None if self.windowed is None else self.windowed[..., :columns]
        if full is not None and windowed is not None:
            return {"full_attention": full, "sliding_attention": windowed}
        found = full if full is not None else windowed
        assert found is not None
        return found


def layer_masks(config: Any, dtype: torch.dtype, start: Tensor, queries: Tensor, columns: int) -> LayerMasks:
    """Masks for queries at columns `queries` ``(queries,)`` of rows whose text begins at column `start` ``(rows,)``.

    A padding query sees its own column, so that no row of the softmax is empty.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    unused = getattr(config, "use_sliding_window", True) is False
    if unused or (kinds and "sliding_attention" not in kinds):
        window = None
    key = torch.arange(columns, device=start.device)
    query = queries[:, None]
    seen = (key <= query) & (key >= start[:, None, None])
    own = key == query

    def additive(visible: Tensor) -> Tensor:
        mask = torch.zeros(visible.shape, dtype=dtype, device=start.device)
        return mask.masked_fill_(~visible, float("-inf"))[:, None]

    full = additive(seen | own) if window is None or "full_attention" in kinds else None
    windowed = None if window is None else additive((seen & (key > query - window)) | own)
    return LayerMasks(full, windowed, window)
