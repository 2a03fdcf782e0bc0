"""Learning rate and loss weights over a run, as functions of its progress from 0 to 1."""

from __future__ import annotations

import math

from coral_spec.training.config import LossConfig, OptimizerConfig


def learning_rate(config: OptimizerConfig, progress: float) -> float:
    """Linear warm-up, then the configured decay to `final` times `lr`."""
    if progress < config.warmup:
        return config.lr * max(progress / config.warmup, 1e-3)
    past = min(1.0, (progress - config.warmup) / (1 - config.warmup))
    falls = {"linear": 1 - past, "cosine": (1 + math.cos(math.pi * past)) / 2, "constant": 1.0}
    return config.lr * (config.final + (1 - config.final) * falls[config.schedule])


def loss_weights(config: LossConfig, progress: float) -> tuple[float, float, float]:
    """Weights of the feature, soft and top parts."""
    return config.feature, config.soft, config.top if progress >= config.top_from else 0.0
