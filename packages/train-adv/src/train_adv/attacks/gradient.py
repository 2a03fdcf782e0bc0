"""One forward and the gradient to the image, in fp32 around a model of any precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train_adv.attacks.losses import AttackLoss


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """fp32 logits (batch, classes) of fp32 images; a model with bf16 or fp16 weights gets them in its own dtype."""
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.is_floating_point() and parameter.dtype != images.dtype:
        images = images.to(parameter.dtype)
    logits: Tensor = model(images)
    return logits.float()


def ascend(model: nn.Module, points: Tensor, labels: Tensor, loss: AttackLoss) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the loss, summed over samples, to the points; values (batch,); logits (batch, classes). All fp32."""
    with torch.enable_grad():
        leaf = points.detach().requires_grad_()
        logits = logits_of(model, leaf)
        values = loss(logits, labels)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return gradient, values.detach(), logits.detach()


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """Which answers are right, boolean (n,); logits that are no numbers answer nothing."""
    return (logits.argmax(1) == labels) & logits.isfinite().all(1)
