"""The target's features by CUDA graphs: launching a small target takes longer than its work does.

Batches are grouped by length, so the same shapes come again and again. A shape is captured when it is seen for the
second time; all graphs share their memory and leave their features in one buffer. Ours.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOST_SHAPES = 256  # beyond them nothing more is captured; a graph takes a megabyte or two


class Replayed:
    """A forward without gradient, replayed.

    What it returns stays valid until it is called again. When a shape cannot be captured, this and all new shapes are
    launched operation by operation from then on, which a warning says.

    Args:
        forward: tokens ``(rows, length)`` on the GPU to features ``(rows, length, width)``.
        room: most tokens of a batch, padding included; larger ones are never captured.
        like: an empty tensor of the features' dtype on their device.
        width: of the features.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], room: int, like: Tensor, width: int) -> None:
        self._forward, self._room = forward, room
        self._tokens = torch.zeros(room, dtype=torch.long, device=like.device)
        self._features = like.new_empty(room, width)
        self._seen: Counter[torch.Size] = Counter()
        self._graphs: dict[torch.Size, Any] = {}
        self._pool: Any = None
        self._stream: Any = torch.cuda.Stream(like.device)  # type: ignore[no-untyped-call]
        self._most = MOST_SHAPES

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """``(rows, length, width)``."""
        shape = tokens.shape
        self._seen[shape] += 1
        if shape not in self._graphs and not self._captured(shape):
            return self._forward(tokens)
        inputs, features = self._places(shape)
        inputs.copy_(tokens)
        self._graphs[shape].replay()
        return features

    def _places(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        count = shape.numel()
        return self._tokens[:count].view(shape), self._features[:count].view(*shape, -1)

    def _captured(self, shape: torch.Size) -> bool:
        """Whether a shape that was not captured before now is."""
        if self._seen[shape] < 2 or shape.numel() > self._room or len(self._graphs) >= self._most:
            return False
        inputs, features = self._places(shape)
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(inputs.device)
        try:
            # Compiled code is compiled anew for another stream, which must not happen while that is captured.
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                self._forward(inputs)
            current.wait_stream(self._stream)
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                features.copy_(self._forward(inputs))
        except RuntimeError as error:  # an operation that waits for the device, or no memory left
            self._most = 0
            # Of a capture that failed, the end says nothing but that.
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            reason = (str(cause).strip().splitlines() or [""])[0]
            warnings.warn(f"the target's forward is not captured ({reason}): training launches it", stacklevel=4)
            return False
        self._pool = self._pool or graph.pool()
        self._graphs[shape] = graph
        return True
