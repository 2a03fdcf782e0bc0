"""Functions of tensors as CUDA graphs, recorded once for each set of shapes; plain calls elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Captured:
    """Calls `function(*tensors)`; on a GPU, as a graph.

    The function must draw nothing and wait for nothing. What it returns, a tensor or a tuple of tensors, is valid
    until the next call with the same shapes.

    Args:
        function: what to record.
        enabled: without it every call is a plain one.
    """

    def __init__(self, function: Callable[..., Any], enabled: bool) -> None:
        self.function, self.enabled = function, enabled
        self._graphs: dict[tuple[tuple[int, ...], ...], _Graph] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        if not self.enabled:
            return self.function(*inputs)
        key = tuple(tuple(each.shape) for each in inputs)
        if key not in self._graphs:
            self._graphs[key] = _record(self.function, inputs)
        return self._graphs[key].replay(inputs)


class _Graph(NamedTuple):
    """A recorded function, its inputs and its output."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Any

    def replay(self, inputs: tuple[Tensor, ...]) -> Any:
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.output


def _record(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> _Graph:
    """The first runs, on a side stream, compile and choose kernels, which may not happen while recording."""
    held = tuple(each.clone() for each in inputs)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads (a loader that pins memory, a progress bar) may call CUDA meanwhile: it is no fault of theirs.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = function(*held)
    return _Graph(graph, held, output)
