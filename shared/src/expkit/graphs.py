"""Functions of tensors as CUDA graphs, or beside others on a stream of their own; plain calls elsewhere."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from expkit.norms import kept_statistics


class Captured:
    """Calls `function(*tensors)`; on a GPU, as a graph.

    The function must wait for nothing and speak to no other process, and all its tensors must be on the GPU of the
    first input. What it returns (tensors, in any structure) is valid until the next call with the same shapes and
    dtypes. If it leaves gradients in `.grad`, it must find none there when it is recorded, must be called with one set
    of those only, and none may unset them afterwards: every replay writes to the same tensors.

    Args:
        function: what to record.
        enabled: without it every call is a plain one.
        modules: whose running statistics the function moves: the trial runs before the recording leave them alone.
        pool: of memory, from `torch.cuda.graph_pool_handle()`, to share with other recordings that never run at the
            same time. What a call returns is then valid until the next call of any of them.
    """

    def __init__(
        self, function: Callable[..., Any], enabled: bool, modules: Sequence[nn.Module] = (), pool: Any = None
    ) -> None:
        self.function, self.enabled, self.modules, self.pool = function, enabled, modules, pool
        self._graphs: dict[tuple[tuple[torch.Size, torch.dtype], ...], _Graph] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        if not self.enabled:
            return self.function(*inputs)
        key = tuple((each.shape, each.dtype) for each in inputs)
        if key not in self._graphs:
            self._graphs[key] = _record(self.function, inputs, self.modules, self.pool)
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


def _record(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], modules: Sequence[nn.Module], pool: Any
) -> _Graph:
    """The first runs, on a side stream, compile and choose kernels, which may not happen while recording.

    They leave statistics and random numbers as they found them, or a resumed run, which records anew, would differ.
    """
    held = tuple(each.clone() for each in inputs)
    device = inputs[0].device
    with torch.cuda.device(device):
        side = _side_stream(device)
        with kept_statistics(*modules), torch.random.fork_rng([device]):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    function(*held)
            torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with _alone(device):
            # What other threads (a loader that pins memory, a progress bar) ask of CUDA meanwhile is no fault.
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                output = function(*held)
    return _Graph(graph, held, output)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """For a recording: workspaces of cuBLAS that no other one shares, and no graph that the collector destroys."""
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
        if collects:
            gc.enable()


class Beside:
    """Runs functions on a stream of their own while the caller's goes on: one small batch leaves a GPU half idle.

    What they return may be used after `join` alone. Both may be part of a recording.

    Args:
        device: of the functions; where it is None every call is a plain one.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._stream = None if device is None else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, function: Callable[..., Any], *inputs: Any) -> Any:
        if self._stream is None:
            return function(*inputs)
        # Also for memory: what the last call returned was read by the caller's stream, and may be written over now.
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            return function(*inputs)

    def join(self) -> None:
        """Let the caller's stream wait for what was begun."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
