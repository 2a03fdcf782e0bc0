"""Adversarial weight perturbation (Wu et al. 2020), around any loss that can be computed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from expkit.distributed import all_reduce_mean
from expkit.errors import UsageError
from expkit.norms import kept_statistics


class AWP:
    """Moves every layer's weights by gamma times their own norm up the loss, for the length of one update.

    As published: only weights of two or more dimensions move, by gamma * |w| * g / |g|, layer by layer, and what was
    added is taken away after the optimiser's step. The loss is the whole one, TRAIN's term included. Running
    statistics are not moved by the ascent (the published code uses a copy of the model).

    Args:
        model: whose weights.
        gamma: 0.005 (TRADES) to 0.01 (AT).
        others: further networks that the loss runs in train mode (a teacher, a reference that learns): their weights
            do not move, and the ascent leaves their statistics alone too.
    """

    def __init__(self, model: nn.Module, gamma: float, others: Sequence[nn.Module] = ()) -> None:
        if gamma < 0:
            raise UsageError(f"awp.gamma is {gamma}; it must be 0 or more")
        self.model, self.gamma, self.others = model, gamma, tuple(others)

    def direction(self, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
        """What is added to each weight, by name; the loss is computed once and its graph dropped."""
        moving = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and parameter.ndim > 1
        }
        with kept_statistics(self.model, *self.others):
            gradients = torch.autograd.grad(loss(), list(moving.values()), allow_unused=True)
        return {
            name: self._scaled(parameter.detach(), all_reduce_mean(gradient.contiguous()))
            for (name, parameter), gradient in zip(moving.items(), gradients, strict=True)
            if gradient is not None
        }

    @contextmanager
    def perturbed(self, loss: Callable[[], Tensor]) -> Iterator[None]:
        """Inside: weights moved up the loss; do the backward and the optimiser's step there."""
        with self.moved(self.direction(loss)):
            yield

    @contextmanager
    def moved(self, moves: dict[str, Tensor]) -> Iterator[None]:
        """Inside: weights moved by what `direction` gave."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, move in moves.items():
                parameters[name].add_(move)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, move in moves.items():
                    parameters[name].sub_(move)

    def _scaled(self, weight: Tensor, gradient: Tensor) -> Tensor:
        scale: Tensor = self.gamma * weight.norm() / (gradient.norm() + 1e-20)
        return gradient * scale
