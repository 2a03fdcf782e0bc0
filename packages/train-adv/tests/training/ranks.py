"""What `fit` gives in every process of torchrun: `python -m torch.distributed.run ... ranks.py RUNS`."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import train_adv
from train_adv.models.small import SmallCNN
from train_adv.training import run


def main() -> None:
    rank, trained = int(os.environ["RANK"]), {}
    finish = run._Job.finish

    def watched(self: run._Job, record: dict[str, Any]) -> run.Outcome:
        """The end of a run gives all processes the main one's weights, so these are looked at before."""
        trainer = self.trainer
        trained.update(model=digest(trainer.model))
        if trainer.average is not None:
            trained.update(average=digest(trainer.average.model))
        return finish(self, record)

    def network() -> SmallCNN:
        torch.manual_seed(100 + rank)  # a careless function: other weights in every process
        return SmallCNN()

    run._Job.finish = watched
    outcome = train_adv.fit(
        network,
        "digits",
        topology={"weight": 20.0, "reference_epochs": 1, "metrics": True},
        runs=sys.argv[1],
        epochs=2,
        batch_size=32,
        device="cpu",
        checkpoint_every=2,
        **{"data.limit": 200},
        attack={"steps": 1},
        averaging={"kind": "ema", "statistics": "recompute", "batches": 2},
        validation={"fraction": 0.205, "steps": 1},  # an odd number of images over two processes
    )
    said = {"trained": trained, "outcome": digest(outcome.model), "result": outcome.result}
    Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps(said))


def digest(model: torch.nn.Module) -> str:
    whole = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    return hashlib.sha256(whole).hexdigest()


if __name__ == "__main__":
    main()
