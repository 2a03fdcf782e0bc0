"""A domain, a config and a trainer that train in a second."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pden.data import Domain
from pden.training.config import (
    AveragingConfig,
    GateConfig,
    GeneratorConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from pden.training.trainer import Trainer


def tiny_domain(count: int = 60, classes: int = 3, channels: int = 3, size: int = 16, seed: int = 0) -> Domain:
    """Bars at a height that is the class, on noise: a convolution learns them at once."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    images = torch.randint(0, 60, (count, channels, size, size), generator=rng)
    for place, label in enumerate(labels.tolist()):
        top = label * (size // classes)
        images[place, :, top : top + size // classes // 2 + 1] += 180
    return Domain("bars", images.to(torch.uint8), labels, tuple("abcdefghij"[:classes]))


def tiny_dense(count: int = 12, size: int = 24, seed: int = 0) -> Domain:
    """Images of two halves, one bright; a column of pixels does not count."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.zeros(count, size, size, dtype=torch.int64)
    for place in range(count):
        labels[place, :, size // 4 + place % (size // 2) :] = 1
    images = (
        40 + 150 * labels[:, None].expand(-1, 3, -1, -1) + torch.randint(0, 30, (count, 3, size, size), generator=rng)
    )
    labels[:, :, 0] = 255
    return Domain("halves", images.to(torch.uint8), labels, ("dark", "bright"))


def tiny_config(**changes: Any) -> TrainConfig:
    """Two rounds of six steps on 16x16 images; `gate__mode="off"` changes a key of a table."""
    config = TrainConfig(
        name="tiny",
        rounds=2,
        pretrain_steps=6,
        pretrain_batch=12,
        round_steps=6,
        batch=12,
        log_every=2,
        checkpoint_every=4,
        model=ModelConfig(width=0.1, embedding=8),
        generator=GeneratorConfig(width=4, noise=3, lr=1e-2),
        optimizer=OptimizerConfig(lr=3e-3),
        gate=GateConfig(images=12, judge_steps=4, agreement=0.0, judge_over_chance=0.0, distance=0.0),
        averaging=AveragingConfig(decay=0.9),
    )
    for key, value in changes.items():
        table, _, name = key.rpartition("__")
        if table:
            config = replace(config, **{table: replace(getattr(config, table), **{name: value})})
        else:
            config = replace(config, **{key: value})
    return config


def tiny_trainer(**changes: Any) -> Trainer:
    """A trainer of `tiny_config` on bars."""
    return Trainer(tiny_config(**changes), tiny_domain(), tiny_domain(24, seed=1))


def finish(trainer: Trainer, steps: int | None = None) -> list[str]:
    """Step to the end, or so many steps; the events on the way."""
    events = []
    while not trainer.done and (steps is None or steps > 0):
        events.append(trainer.step())
        steps = None if steps is None else steps - 1
    return [event for event in events if event != "none"]


def weights(trainer: Trainer) -> torch.Tensor:
    """All weights that a run leaves, in one vector: task model, average, generators."""
    modules = [trainer.task, *trainer.pool, *([] if trainer.average is None else [trainer.average.module])]
    return torch.cat([value.flatten().float() for module in modules for value in module.state_dict().values()])
