"""A run that a test starts as a process of its own, and kills: `python killed.py RUNS NAME [resume]`."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn

from expkit.config import load_config
from expkit.distributed import join
from train_adv.training.config import TrainConfig
from train_adv.training.given import Given
from train_adv.training.run import train

SETTINGS = {
    "host": "trades",
    "epochs": 3,
    "batch_size": 32,
    "device": "cpu",
    "checkpoint_every": 2,
    "data.limit": 160,
    "attack.steps": 2,
    "topology.ratio": 0.5,  # measured at an epoch's first step, and kept
    "topology.warmup": 1.0,
    "topology.reference": "co-trained",
    "topology.reference_epochs": 1,
    "awp.gamma": 0.005,
    "averaging.kind": "ema",
    "validation.fraction": 0.2,
    "validation.steps": 2,
    "validation.test": False,
}


def network() -> nn.Module:
    """With dropout, which draws from torch's own generator."""
    first = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*first, nn.Dropout(0.2), nn.Linear(32, 10))


def main() -> None:
    runs, name, *more = sys.argv[1:]
    config = load_config(TrainConfig, None, {**SETTINGS, "name": name})
    train(config, Path(runs), join(), resume="resume" in more, given=Given(model=network))


if __name__ == "__main__":
    main()
