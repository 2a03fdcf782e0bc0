"""What a run is given: data and a network, by name or as the caller's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from expkit.errors import UsageError
from train_adv.data.dataset import Augment, DataSet, channel_statistics
from train_adv.data.load import load_data
from train_adv.models.build import build
from train_adv.models.classifier import Classifier, ModelSpec
from train_adv.modes import eval_mode
from train_adv.training.config import DataConfig, TrainConfig


@dataclass(frozen=True)
class Given:
    """What the caller of `fit` may bring instead of a name.

    Attributes:
        data: a data set.
        model: a function that makes the network, fresh each time; it takes normalised images.
    """

    data: DataSet | None = None
    model: Callable[[], nn.Module] | None = None


def read_data(config: DataConfig) -> DataSet:
    """The data of a configuration, cut and augmented as it says."""
    data = load_data(
        config.name,
        config.dir,
        image_size=config.image_size,
        corrupt=config.corrupt,
        resident_gib=config.resident_gib,
    )
    padding = data.augment.padding if config.padding is None else config.padding
    flip = data.augment.flip if config.flip is None else config.flip
    train = data.train
    if 0 < config.limit < len(train):
        train = train.select(torch.arange(config.limit))
    return replace(data, train=train, augment=Augment(padding, flip, config.erase))


def describe(config: TrainConfig, data: DataSet, given: Given) -> ModelSpec:
    """What the checkpoint will say about the model."""
    if len(data.class_names) < 2:
        raise UsageError(f"{data.name} has {len(data.class_names)} class; a classifier needs at least 2")
    mean, std = channel_statistics(data.train)
    name = "custom" if given.model is not None else str(config.model)
    return ModelSpec(name, data.class_names, data.image_shape, mean, std, "auto")


def fresh(spec: ModelSpec, given: Given) -> Classifier:
    """A new network of this kind."""
    return Classifier(given.model(), spec) if given.model is not None else build(spec)


@torch.no_grad()
def require_logits(model: Classifier) -> None:
    """Raise UsageError where a network of the caller's does not give a logit for each class."""
    classes, images = len(model.spec.class_names), torch.zeros(2, *model.spec.image_shape)
    try:
        with eval_mode(model):
            shape = tuple(model(images).shape)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the network does not take images {tuple(images.shape)}: {error}") from None
    if shape != (2, classes):
        need = f"needed are logits (2, {classes})"
        raise UsageError(f"the network gives {shape} for 2 images of {classes} classes; {need}")
