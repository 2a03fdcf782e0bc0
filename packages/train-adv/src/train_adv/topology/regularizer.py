"""`TopologyRegularizer`: TRAIN for a training loop of your own."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expkit.errors import UsageError
from train_adv.modes import NaturalStatistics, eval_mode, natural_statistics
from train_adv.topology.calibrate import gradient_norm, weight_for_ratio
from train_adv.topology.features import feature_reader
from train_adv.topology.loss import TopologyLoss, require_neighbours

ReferenceKind = Literal["frozen", "co-trained", "ema"]
TopologyInputs = Literal["natural", "adversarial", "both"]


class TopologyRegularizer(nn.Module):
    """lambda * L_topo between a model in training and a reference, both any `nn.Module` that takes the images.

    Call it with the natural images and add what it returns to the loss; call `step` after the optimiser's step.

    Args:
        model: the network in training. It is not registered as a submodule: parameters and state are not duplicated.
        reference: the standard model, trained on natural samples; it is put into eval mode and asks for no gradient
            from then on, unless it is co-trained. For kind "ema" it may be left out: it starts as a copy of the model.
        weight: lambda. There is no natural scale: see `calibrate`.
        layer, reference_layer: see `train_adv.topology.features.FeatureTap`.
        loss: a `TopologyLoss`; its default otherwise.
        kind: "frozen"; "co-trained": the reference learns along by cross-entropy on the natural images (pass labels,
            and give `reference.parameters()` to an optimiser); "ema": an exponential average of the model.
        decay: of the average.
        warmup: calls of `step` over which lambda rises linearly from 0.
        statistics: what the natural forward does with BatchNorm: see `train_adv.modes.natural_statistics`.

    Attributes:
        weight: lambda after warm-up; may be changed at any time.
        steps: calls of `step` so far; in `state_dict`.
        read_model, read_reference: functions from images to features; may be replaced by compiled ones.
        last: figures of the latest call and calibration: "topology" (unweighted), "weight", and, after `calibrate`,
            "norm_host" and "norm_topology".

    Raises:
        UsageError: an unknown kind or layer, no reference, or settings out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module | None = None,
        *,
        weight: float = 100.0,
        layer: str = "auto",
        reference_layer: str = "auto",
        loss: TopologyLoss | None = None,
        kind: ReferenceKind = "frozen",
        decay: float = 0.999,
        warmup: int = 0,
        statistics: NaturalStatistics = "shared",
    ) -> None:
        super().__init__()
        if kind not in get_args(ReferenceKind):
            raise UsageError(f"kind is {kind!r}; use one of {', '.join(get_args(ReferenceKind))}")
        if statistics not in get_args(NaturalStatistics):
            raise UsageError(f"statistics is {statistics!r}; use one of {', '.join(get_args(NaturalStatistics))}")
        if not 0 <= weight < float("inf") or not 0 <= decay <= 1 or warmup < 0:
            raise UsageError(f"weight {weight}, decay {decay}, warmup {warmup}: out of range")
        if reference is None:
            if kind != "ema":
                raise UsageError(f'a reference of kind "{kind}" needs a standard model')
            reference = deepcopy(model)
        if reference is model:
            raise UsageError("the reference is the model itself; it is to be a standard model, which is left as it is")
        self.loss = loss if loss is not None else TopologyLoss()
        self.reference = reference
        if kind == "co-trained":
            self.reference.train()  # it learns, its BatchNorm too
        else:
            self.reference.requires_grad_(False).eval()
        self.weight, self.kind, self.decay, self.warmup, self.statistics = weight, kind, decay, warmup, statistics
        self.steps = 0
        self.last: dict[str, Tensor | float] = {}
        self._model = (model,)  # in a tuple, so that it does not become a submodule
        self.read_model, self._tap = feature_reader(model, layer)
        self.read_reference, self._reference_tap = feature_reader(reference, reference_layer)

    def train(self, mode: bool = True) -> TopologyRegularizer:
        """As every module, but a reference that does not learn stays in eval mode."""
        super().train(mode)
        if self.kind != "co-trained":
            self.reference.eval()
        return self

    def current_weight(self) -> float:
        """lambda now, warm-up included."""
        if self.warmup == 0:
            return self.weight
        return self.weight * min(1.0, self.steps / self.warmup)

    def forward(self, images: Tensor, labels: Tensor | None = None, *, shown: Tensor | None = None) -> Tensor:
        """lambda * L_topo of natural images, through a forward of the model of its own.

        Args:
            images: (batch, channels, height, width), natural.
            labels: (batch,), needed where the reference is co-trained, whose cross-entropy is then added.
            shown: what the model sees of the same images instead, as adversarial ones; the reference always sees
                `images`.

        Raises:
            UsageError: fewer than two images, or labels missing.
        """
        require_neighbours(len(images))
        (model,) = self._model
        with natural_statistics(model, self.statistics) if model.training else nullcontext():
            features = self.read_model(images if shown is None else shown)
        reference, extra = self.reference_features(images, labels)
        return self.compare(features, reference) + extra

    def compare(self, features: Tensor, reference: Tensor) -> Tensor:
        """lambda * L_topo from features (batch, dim) of a natural forward that the host has done anyway."""
        value: Tensor = self.loss(features, reference)
        weight = self.current_weight()
        self.last.update(topology=value.detach(), weight=weight)
        return weight * value

    def reference_features(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | float]:
        """The reference's features without gradient, and what must be added to the loss for it to learn.

        Raises:
            UsageError: a co-trained reference without labels.
        """
        if self.kind != "co-trained":
            with torch.no_grad(), eval_mode(self.reference):
                return self.read_reference(images), 0.0
        if labels is None:
            raise UsageError("a co-trained reference needs labels: topology(images, labels)")
        own: Any = getattr(self.reference, "with_features", None)
        if self._reference_tap is None:
            logits, features = own(images)
        else:
            logits = self.reference(images)
            features = self._reference_tap.take()
        return features.detach(), F.cross_entropy(logits.float(), labels)

    def calibrate(self, host_loss: Tensor, images: Tensor, parameters: Iterable[nn.Parameter], ratio: float) -> float:
        """Set lambda so that its gradient is `ratio` times as long as the host's; returns it.

        The host's graph is kept, so it must not be that of a compiled model. Both norms are in `last`
        afterwards. Call it again now and then: the ratio drifts.
        """
        (model,) = self._model
        asking = list(parameters)
        with natural_statistics(model, "frozen" if self.statistics == "frozen" else "dual"):  # none must move
            features = self.read_model(images)
        with torch.no_grad(), eval_mode(self.reference):  # eval mode: its statistics must not move
            reference = self.read_reference(images)
        topology = float(gradient_norm(self.loss(features, reference), asking))
        host = float(gradient_norm(host_loss, asking, keep=True))
        self.weight = weight_for_ratio(host, topology, ratio)
        self.last.update(norm_host=host, norm_topology=topology, weight=self.weight)
        return self.weight

    @torch.no_grad()
    def step(self) -> None:
        """After the optimiser's step: moves the warm-up and the average on."""
        self.steps += 1
        if self.kind == "ema":
            (model,) = self._model
            for own, new in zip(self.reference.state_dict().values(), model.state_dict().values(), strict=True):
                if own.is_floating_point():
                    own.lerp_(new.to(own.dtype), 1 - self.decay)
                else:
                    own.copy_(new)

    def get_extra_state(self) -> Tensor:
        """The number of steps, for `state_dict`; it is a plain number otherwise, which no device is asked for."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        """What `get_extra_state` gave."""
        self.steps = int(state)

    def remove(self) -> None:
        """Take the hooks off both models."""
        for tap in (self._tap, self._reference_tap):
            if tap is not None:
                tap.remove()
