"""A module and its optimiser: gradients of a loss, averaged over processes, applied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expkit.distributed import World, all_reduce_mean
from pden.training.config import OptimizerConfig


class Learner:
    """Trains one module. A loss may run through other modules too; only this one's gradients are computed.

    Args:
        module: what is trained; on its device.
        settings: optimiser and schedule.
        world: the processes that train together.
    """

    def __init__(self, module: nn.Module, settings: OptimizerConfig, world: World) -> None:
        self.module, self.settings, self.world = module, settings, world
        self.parameters = [each for each in module.parameters() if each.requires_grad]
        if settings.kind == "adam":
            fused = self.parameters[0].device.type in ("cuda", "cpu")
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
                self.parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused
            )
        else:  # not fused: that fails when a parameter has its first gradient after others, as the projection head does
            self.optimizer = torch.optim.SGD(
                self.parameters,
                lr=settings.lr,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
                nesterov=settings.momentum > 0,
            )

    def update(self, loss: Tensor, progress: float = 0.0) -> None:
        """One step down the loss: :meth:`gradients` and :meth:`apply`."""
        self.apply(self.gradients(loss), progress)

    def gradients(self, loss: Tensor) -> list[Tensor | None]:
        """Of the loss, one for each of `parameters`; None where it has no part in it."""
        found: list[Tensor | None] = []
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None and gradient.stride() != parameter.stride():
                # Fused Adam on CPUs takes a gradient's memory for laid out as the weight's, which channels-last is not.
                gradient = torch.empty_like(parameter).copy_(gradient)
            found.append(gradient)
        return found

    def apply(self, gradients: Sequence[Tensor | None], progress: float = 0.0) -> None:
        """One step with these gradients, which several processes average in place.

        Args:
            progress: share of the schedule that is done, in [0, 1].
        """
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        if self.world.size > 1:
            self._average()
        if self.settings.schedule == "cosine":
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.lr * 0.5 * (1 + math.cos(math.pi * progress))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _average(self) -> None:
        """Gradients, and the statistics that normalisation layers keep, become the mean over processes."""
        buffers = [each for each in self.module.buffers() if each.is_floating_point()]
        tensors = [each.grad for each in self.parameters if each.grad is not None] + buffers
        flat = all_reduce_mean(torch.cat([each.float().flatten() for each in tensors]))
        parts = flat.split([each.numel() for each in tensors])  # type: ignore[no-untyped-call]
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def state(self) -> dict[str, Any]:
        """Weights and optimiser; tensors are the live ones."""
        return {"module": dict(self.module.state_dict()), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
