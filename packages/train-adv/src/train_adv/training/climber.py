"""Runs a host's attack: plainly, through torch.compile, or as one CUDA graph of all its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from expkit.device import autocast
from train_adv.hosts.host import Host
from train_adv.modes import attack_twin

Engine = Literal["eager", "compile", "graphs"]
Climb = Callable[[Tensor, Tensor, Tensor], Tensor]


def resolve_engine(name: str, device: torch.device) -> Engine:
    """What "auto" means here; "graphs" without a GPU is "compile"."""
    if name == "auto":
        return "graphs" if device.type == "cuda" else "eager"
    if name == "graphs" and device.type != "cuda":
        return "compile"
    return name  # type: ignore[return-value]


class Climber:
    """Adversarial images of a host against a model, in eval mode and without weight gradients.

    The model's twin shares its storage, so what was compiled or captured follows the training. Images, steps and
    projection are fp32; the model runs in `dtype` by autocast.
    """

    def __init__(self, host: Host, model: nn.Module, engine: Engine, device: torch.device, dtype: torch.dtype) -> None:
        self.host, self.device, self.dtype = host, device, dtype
        twin = attack_twin(model)
        self.twin: nn.Module = torch.compile(twin, dynamic=False) if engine != "eager" else twin  # type: ignore[assignment]
        self.graphs: dict[tuple[int, ...], _Graph] | None = {} if engine == "graphs" else None

    def __call__(self, points: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Climb from `points`. With graphs the result is valid until the next call."""
        if not self.host.attacks:
            return images
        if self.graphs is None:
            return self._climb(points, images, labels)
        key = tuple(images.shape)
        if key not in self.graphs:
            self.graphs[key] = _capture(self._climb, points, images, labels)
        return self.graphs[key](points, images, labels)

    def _climb(self, points: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        with autocast(self.device, self.dtype):
            return self.host.climb(self.twin, points, images, labels)


class _Graph(NamedTuple):
    """A captured attack, its inputs and its output."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.output


def _capture(climb: Climb, *inputs: Tensor) -> _Graph:
    """Record `climb`. Its first runs, on a side stream, compile and choose kernels, which may not happen inside."""
    held = tuple(each.clone() for each in inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            climb(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = climb(*held)
    return _Graph(graph, held, output)
