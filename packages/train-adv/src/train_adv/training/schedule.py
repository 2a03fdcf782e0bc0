"""Learning rate along a run."""

from __future__ import annotations

import math

from train_adv.training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, progress: float) -> float:
    """The rate at a fraction of the run in [0, 1]."""
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "multistep":
        return float(config.lr * 0.1 ** sum(progress >= milestone for milestone in config.milestones))
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * progress)) / 2
    if progress < config.peak:
        return config.lr * (0.04 + 0.96 * progress / config.peak)
    return config.lr * (1 + math.cos(math.pi * (progress - config.peak) / (1 - config.peak))) / 2
