"""What Linf, L2 and L1 differ in: where a point may lie, where a step goes, where a start is drawn.

All tensors are fp32 images of shape (batch, ...) in [0, 1]; an epsilon is in those units (8/255, not 8).
"""

from __future__ import annotations

import math
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from expkit.errors import UsageError

NormName = Literal["Linf", "L2", "L1"]


class Norm(Protocol):
    """The three things that an attack needs to know about a norm."""

    name: str

    def project(self, points: Tensor, images: Tensor, epsilon: float) -> Tensor:
        """The nearest points (up to the box, for L2) within epsilon of `images` and in [0, 1]."""
        ...

    def step(self, gradient: Tensor) -> Tensor:
        """The direction of steepest ascent of unit size."""
        ...

    def start(self, images: Tensor, epsilon: float, generator: torch.Generator | None) -> Tensor:
        """A random point of the ball around `images`, in [0, 1]."""
        ...


def flat_norm(tensor: Tensor, p: float) -> Tensor:
    """Norm of each sample, shaped to broadcast over it: (batch, 1, ...)."""
    flat = tensor.flatten(1)
    if p == 2:  # the published code's way, to the last bit: torch's own norm rounds otherwise
        norms = flat.square().sum(1).sqrt()
    else:
        norms = torch.linalg.vector_norm(flat, p, dim=1)
    return norms.view(-1, *[1] * (tensor.ndim - 1))


class Linf:
    """max |delta| <= epsilon."""

    name = "Linf"

    def project(self, points: Tensor, images: Tensor, epsilon: float) -> Tensor:
        return torch.clamp(torch.min(torch.max(points, images - epsilon), images + epsilon), 0.0, 1.0)

    def step(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def start(self, images: Tensor, epsilon: float, generator: torch.Generator | None) -> Tensor:
        noise = torch.empty_like(images).uniform_(-epsilon, epsilon, generator=generator)
        return (images + noise).clamp(0.0, 1.0)


class L2:
    """sqrt(sum delta^2) <= epsilon. Projection onto the ball, then onto the box, which stays in the ball."""

    name = "L2"

    def project(self, points: Tensor, images: Tensor, epsilon: float) -> Tensor:
        delta = points - images
        length = flat_norm(delta, 2)
        return (images + delta / (length + 1e-12) * length.clamp(max=epsilon)).clamp(0.0, 1.0)

    def step(self, gradient: Tensor) -> Tensor:
        return gradient / (flat_norm(gradient, 2) + 1e-12)

    def start(self, images: Tensor, epsilon: float, generator: torch.Generator | None) -> Tensor:
        noise = torch.empty_like(images).normal_(generator=generator)
        radius = torch.rand(len(images), generator=generator, device=images.device) ** (1 / images[0].numel())
        radius = radius.view(-1, *[1] * (images.ndim - 1))  # so that starts are uniform in the ball
        return (images + epsilon * radius * self.step(noise)).clamp(0.0, 1.0)


class L1:
    """sum |delta| <= epsilon. Steps touch a share of the pixels; projection is exact for ball and box together.

    Args:
        sparsity: share of the coordinates, those of the largest gradient, that a step moves.
    """

    name = "L1"

    def __init__(self, sparsity: float = 0.05) -> None:
        self.sparsity = sparsity

    def project(self, points: Tensor, images: Tensor, epsilon: float) -> Tensor:
        return images + project_l1_box(points - images, images, epsilon)

    def step(self, gradient: Tensor) -> Tensor:
        count = max(1, int(self.sparsity * gradient[0].numel()))
        flat = gradient.abs().flatten(1)
        threshold = flat.topk(count, dim=1).values[:, -1:].view(-1, *[1] * (gradient.ndim - 1))
        signs = gradient.sign() * (gradient.abs() >= threshold)
        return signs / (flat_norm(signs, 1) + 1e-10)

    def start(self, images: Tensor, epsilon: float, generator: torch.Generator | None) -> Tensor:
        noise = torch.empty_like(images).normal_(generator=generator)
        return self.project(images + noise, images, epsilon)


def project_l1_box(delta: Tensor, images: Tensor, epsilon: float) -> Tensor:
    """The nearest delta' with sum |delta'| <= epsilon and 0 <= images + delta' <= 1, exactly.

    The solution is sign(delta) min(max(|delta| - lambda, 0), room), with room the distance to the box on that side.
    The sum falls piecewise linearly in lambda, with breaks where |delta| - lambda reaches room or 0: sort the breaks,
    evaluate the sum at each from cumulated slopes, and interpolate (Croce & Hein 2021, whose problem this is).
    """
    size = delta.flatten(1).abs()
    room = torch.where(delta.flatten(1) >= 0, 1 - images.flatten(1), images.flatten(1)).clamp_min(0)
    clipped = torch.minimum(size, room)
    # Going up in lambda, a coordinate begins to shrink at (|delta| - room)+ and has vanished at |delta|.
    begins = (size - room).clamp_min(0)
    breaks, order = torch.cat([begins, size], dim=1).sort(dim=1)
    slopes = torch.cat([torch.ones_like(size), -torch.ones_like(size)], dim=1).gather(1, order).cumsum(1)
    gaps = breaks.diff(dim=1, prepend=torch.zeros_like(breaks[:, :1]))
    shrunk = torch.cumsum(gaps * torch.cat([torch.zeros_like(slopes[:, :1]), slopes[:, :-1]], dim=1), dim=1)
    excess = clipped.sum(1, keepdim=True) - epsilon  # how much the sum must shrink
    last = (torch.searchsorted(shrunk, excess, right=True) - 1).clamp(0, breaks.shape[1] - 1)
    slope = slopes.gather(1, last).clamp_min(1)
    shift = breaks.gather(1, last) + (excess - shrunk.gather(1, last)) / slope
    reduced = torch.minimum((size - shift.clamp_min(0)).clamp_min(0), room)
    return delta.sign() * torch.where(excess > 0, reduced, clipped).view_as(delta)


def make_norm(name: str) -> Norm:
    """The norm called `name`; raises UsageError for an unknown one."""
    norms: dict[str, type[Linf] | type[L2] | type[L1]] = {"Linf": Linf, "L2": L2, "L1": L1}
    if name not in norms:
        raise UsageError(f"unknown norm {name!r}; use one of {', '.join(get_args(NormName))}")
    return norms[name]()


def check_epsilon(epsilon: float, norm: str) -> None:
    """Raise UsageError for a negative epsilon, or an Linf one given in steps of 255 (8 for 8/255)."""
    if not 0 <= epsilon < math.inf:
        raise UsageError(f"epsilon is {epsilon}; it must be 0 or more, and finite")
    if norm == "Linf" and epsilon > 1:
        raise UsageError(f"epsilon is {epsilon:g}, and images are in [0, 1]: was {epsilon:g}/255 meant?")


def check_images(images: Tensor) -> None:
    """Raise UsageError for images that are not floating numbers in [0, 1]."""
    if not images.is_floating_point():
        raise UsageError(f"images are {images.dtype}; expected floating numbers in [0, 1]: divide by 255")
    low, high = images.aminmax() if images.numel() else (torch.zeros(()), torch.zeros(()))
    if not (float(low) >= 0 and float(high) <= 1):
        raise UsageError(
            f"images range from {float(low):.4g} to {float(high):.4g}; expected [0, 1] "
            "(normalisation belongs inside the model)"
        )
