"""Weight averaging with BatchNorm statistics of its own: exponential (EMA) or stochastic (SWA)."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from train_adv.models.classifier import Classifier

AveragingKind = Literal["none", "ema", "swa"]


class WeightAverage:
    """An average of a model's weights along training.

    Running statistics are averaged like weights, or computed anew for the averaged weights by `refresh`.

    Args:
        model: what is averaged; the average starts as its copy.
        kind: "ema": w <- decay w + (1 - decay) new after every step, with decay_t = min(decay, (1 + t) / (10 + t)) so
            that the start is forgotten soon; "swa": the plain mean of the weights that `update` was given.
        decay: of the EMA.

    Attributes:
        model: the averaged network, in eval mode.
        updates: how many there were.
    """

    def __init__(self, model: Classifier, kind: AveragingKind, decay: float = 0.999) -> None:
        self.kind, self.decay, self.updates = kind, decay, 0
        self.model = deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: Classifier) -> None:
        """Take the model's present weights into the average."""
        if self.kind == "ema":
            share = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        else:
            share = 1 / (self.updates + 1)
        own, new = self.model.state_dict(), model.state_dict()
        floating = [name for name, value in own.items() if value.is_floating_point()]
        torch._foreach_lerp_([own[name] for name in floating], [new[name] for name in floating], share)
        for name in own.keys() - floating:
            own[name].copy_(new[name])
        self.updates += 1

    @torch.no_grad()
    def refresh(self, batches: Iterable[Tensor]) -> None:
        """Compute the running statistics anew, as the plain mean over batches of (adversarial) images."""
        batches = list(batches)  # made before anything is reset: attacks run on this very model's statistics
        layers = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # torch's name for a plain mean
            layer.train()
        try:
            for images in batches:
                self.model(images)
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
            self.model.eval()
