"""A network with its normalisation inside: what is attacked, trained, saved and loaded takes images in [0, 1]."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from expkit.errors import UsageError
from train_adv.topology.features import FeatureTap


class Output(NamedTuple):
    """Logits (batch, classes) and pooled features (batch, dim) of one forward."""

    logits: Tensor
    features: Tensor


@dataclass(frozen=True)
class ModelSpec:
    """What a checkpoint says about its model.

    Attributes:
        name: see `train_adv.models.build`; "custom" for a module that the caller brought.
        class_names: one for each logit.
        image_shape: (channels, height, width) that it was trained on.
        mean, std: of each channel, in [0, 1]; applied inside the model.
        feature_layer: see `FeatureTap`.
    """

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    feature_layer: str = "auto"

    def to_json(self) -> str:
        """As text for a checkpoint's metadata."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """The spec written by `to_json`; raises UsageError for anything else."""
        try:
            values: dict[str, Any] = json.loads(text)
            plain: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
            spec = cls(**plain)
            channels, *sides = spec.image_shape
            shapes = len(sides) == 2 and len(spec.mean) == len(spec.std) == channels
            texts = all(isinstance(each, str) for each in (spec.name, spec.feature_layer, *spec.class_names))
            if not shapes or not texts or not isinstance(spec.class_names, tuple):
                raise ValueError("shapes or types that do not fit together")
            torch.tensor([*spec.mean, *spec.std, *spec.image_shape])  # all numbers
            return spec
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"the checkpoint's description of its model is damaged ({error})") from None


class Classifier(nn.Module):
    """normalise -> backbone. Takes images (batch, channels, height, width) in [0, 1] and gives logits.

    Attributes:
        backbone: the network itself.
        spec: what a checkpoint says about it.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.backbone, self.spec = backbone, spec
        self.register_buffer("mean", torch.tensor(spec.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(-1, 1, 1))
        self.own_features = spec.feature_layer == "auto" and hasattr(backbone, "classify")
        self.tap = None if self.own_features else FeatureTap(backbone, spec.feature_layer)
        if self.tap is not None:
            self.tap.listening = False  # but in `with_features`

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.backbone((images - self.mean) / self.std)
        return logits

    def with_features(self, images: Tensor) -> Output:
        """Logits and pooled features of the same forward."""
        normalised = (images - self.mean) / self.std
        if self.tap is None:
            backbone: Any = self.backbone
            features = backbone.features(normalised)
            return Output(backbone.classify(features), features)
        self.tap.listening = True
        logits = self.backbone(normalised)
        self.tap.listening = False
        return Output(logits, self.tap.take())
