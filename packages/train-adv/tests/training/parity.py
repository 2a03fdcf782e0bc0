"""One run in any number of processes, with all that they tell each other: `parity.py RUNS NAME`, torchrun before it.

Nothing here depends on how a batch is shared out: no BatchNorm, no random start, no augmentation. The weights that
training came to are written before the end of the run hands the main process's files to all.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import train_adv
from train_adv.attacks.pgd import PGD
from train_adv.data.dataset import Augment
from train_adv.data.load import digits
from train_adv.training import run
from train_adv.training.trainer import Trainer


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def main() -> None:
    runs, name = sys.argv[1:]
    trainers: list[Trainer] = []

    class Watched(Trainer):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **options)
            trainers.append(self)

    def draw(self: PGD, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return images.clone()

    run.Trainer, PGD.draw = Watched, draw
    train_adv.fit(
        network,
        replace(digits(), augment=Augment(0, False)),
        host="mart",
        topology={"ratio": 0.5, "reference": "co-trained", "reference_epochs": 1},
        name=name,
        runs=runs,
        epochs=1,
        checkpoint_every=5,
        batch_size=64,
        device="cpu",
        attack={"steps": 2},
        awp={"gamma": 0.01},
        averaging={"kind": "ema"},
        optimizer={"clip_norm": 1.0},
        validation={"fraction": 0.2, "steps": 1, "test": False},
    )
    trainer = trainers[-1]  # with an average the end of a run loads no weights into the model
    save_file(dict(trainer.model.state_dict()), f"{runs}/{name}-{trainer.world.rank}.safetensors")


if __name__ == "__main__":
    main()
