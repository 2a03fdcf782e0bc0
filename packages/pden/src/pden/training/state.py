"""A trainer's state as a checkpoint holds it, and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from expkit.checkpoint import Checkpoint
from pden.generators import build_generator, generator_settings
from pden.training.averaging import new_average
from pden.training.clock import Best, Clock
from pden.training.trainer import Trainer


def capture(trainer: Trainer) -> dict[str, Any]:
    """Everything but the task model's weights: plain values and (live) tensors."""
    task = trainer.task_state()
    expander = trainer.expander
    return {
        "clock": asdict(trainer.clock),
        "best": vars(trainer.best),
        "optimizer": task["learner"]["optimizer"],
        "average": task["average"],
        "snapshot": trainer.snapshot,
        "gatekeeper": None if trainer.gatekeeper is None else trainer.gatekeeper.state(),
        "expander": None if expander is None else expander.state(),
        "pool": [{"settings": generator_settings(each), "tensors": each.state_dict()} for each in trainer.pool],
        "grown": trainer.grown,
    }


def restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Go on from a checkpoint, in a trainer that was just made with the same config and data."""
    state = checkpoint.state
    trainer.clock = Clock(**state["clock"])
    trainer.best = Best(**state["best"])
    trainer.average = new_average(trainer.task, trainer.config.averaging)
    learner = {"module": checkpoint.tensors, "optimizer": state["optimizer"]}
    trainer.load_task_state({"learner": learner, "average": state["average"]})
    trainer.snapshot = state["snapshot"]
    trainer.pool = []
    for each in state["pool"]:
        generator = build_generator(**each["settings"]).to(trainer.device)
        generator.load_state_dict(each["tensors"])
        trainer.pool.append(generator.eval().requires_grad_(False))
    if state["expander"] is not None:
        trainer.new_expansion()
        assert trainer.expander is not None
        trainer.expander.load(state["expander"])
    if state["grown"] is not None:
        if state["grown"][0].dtype == torch.uint8:
            raise ValueError("its grown images are of 256 levels")
        trainer.grown = (state["grown"][0].to(trainer.device), state["grown"][1].to(trainer.device))
    if trainer.gatekeeper is not None:
        generators = list(trainer.pool)
        kept = sum(report["verdict"] in ("accepted", "recorded") for report in state["gatekeeper"]["reports"])
        if kept > len(generators):  # the running domain has passed already
            assert trainer.expansion is not None
            generators.append(trainer.expansion.generator)
        trainer.gatekeeper.load(state["gatekeeper"], trainer.task, generators)
    trainer.skip_time()
