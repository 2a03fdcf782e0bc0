"""Runs a host's attack: plainly, through torch.compile, or as one CUDA graph of all its steps."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from expkit.device import autocast
from expkit.graphs import Captured
from train_adv.hosts.host import Host
from train_adv.modes import attack_twin

Engine = Literal["eager", "compile", "graphs"]


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
        self._captured = Captured(self._climb, enabled=engine == "graphs")

    def __call__(self, points: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Climb from `points`. With graphs the result is valid until the next call."""
        if not self.host.attacks:
            return images
        adversarial: Tensor = self._captured(points, images, labels)
        return adversarial

    def _climb(self, points: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        with autocast(self.device, self.dtype):
            return self.host.climb(self.twin, points, images, labels)
