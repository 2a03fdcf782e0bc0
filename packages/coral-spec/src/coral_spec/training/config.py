"""Every setting of a training run, as read from `--config FILE`. What a paper gives is named; the rest is ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from coral_spec.training.csra import CsraConfig


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class LossConfig:
    """What every training step (of the harmonised ones) minimises, per answer position.

    Attributes:
        feature: weight of SmoothL1 between drafted and target feature (EAGLE: 1.0).
        soft: weight of the cross-entropy against the target's distribution (EAGLE: 0.1).
        top: weight of the cross-entropy over the target's most likely tokens (HASS: 0, at the end 1).
        top_k: how many tokens that is (HASS: 10).
        top_from: fraction of the run after which `top` counts; HASS adds it in a second, short run.
        chunk: positions whose logits exist at once; memory is about 16 bytes x chunk x vocabulary.
    """

    feature: float = 1.0
    soft: float = 0.1
    top: float = 1.0
    top_k: int = 10
    top_from: float = 0.8
    chunk: int = 2048

    def __post_init__(self) -> None:
        _require(min(self.feature, self.soft, self.top) >= 0, "loss weights must be 0 or more")
        _require(self.top_k >= 1 and self.chunk >= 1, "loss.top_k and loss.chunk must be 1 or more")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
        lr: highest learning rate. HASS uses 3e-5 for drafters of 0.2-1 billion weights; ours are far smaller.
        betas: (EAGLE: 0.9, 0.95).
        weight_decay: decoupled.
        warmup: fraction of the run in which the rate rises (EAGLE: 1 %).
        schedule: how it falls after that, to `final` times `lr`.
        clip_value: largest absolute gradient entry (EAGLE: 0.5); 0 is off.
        clip_norm: largest norm of all gradients; 0 is off.
    """

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup: float = 0.01
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    final: float = 0.0
    clip_value: float = 0.5
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optimizer.lr is {self.lr}; it must be positive")
        _require(0 <= self.warmup < 1, f"optimizer.warmup is {self.warmup}; it must be in [0, 1)")


@dataclass(frozen=True)
class BatchConfig:
    """How answers become batches.

    Attributes:
        tokens: tokens (padding included) of one forward on one device; rows of similar length go together.
        accumulate: forwards per optimiser step.
        max_length: rows are cut after this many tokens.
    """

    tokens: int = 16_384
    accumulate: int = 1
    max_length: int = 2048

    def __post_init__(self) -> None:
        _require(min(self.tokens, self.accumulate) >= 1 and self.max_length >= 8, "batch sizes must be positive")


@dataclass(frozen=True)
class EvaluationConfig:
    """Acceptance length, simulated on held-out answers.

    Attributes:
        every: optimiser steps between two evaluations (and checkpoints).
        prompts: how many prompts are held out; all answers to them are.
        rows: most answers used in an evaluation.
        depth: length of the simulated chain draft.
    """

    every: int = 250
    prompts: int = 256
    rows: int = 256
    depth: int = 6

    def __post_init__(self) -> None:
        _require(min(self.every, self.prompts, self.rows, self.depth) >= 1, "evaluation settings must be positive")


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        name: folder of the run below the folder of runs.
        target: alias, hub id or folder of the target.
        data: folders of answers made by `coral-spec data`.
        align_steps: harmonised steps n (HASS: 3); 1 is the EAGLE-2 baseline.
        steps: optimiser steps.
        max_minutes: when above 0, the schedule follows the clock and ends after this time (or after `steps`, if
            sooner); such a run can be resumed, but not to the same bits.
        init: "random", or "last-layer": the decoder layer starts as the target's last one (ours).
        noise: uniform noise on target features, scaled by 512 / length as in EAGLE (0.2), never above itself.
        device, dtype: "auto" or names; dtype is that of the target and of autocast, weights are fp32.
        compile: what torch.compile is used for: "none", the "loss", or "all" (target and loss). It takes a minute to
            start, so it is for long runs.
        log_every: optimiser steps between two lines of metrics.
    """

    name: str = "drafter"
    target: str = "smollm2-135m"
    data: tuple[Path, ...] = (Path("answers"),)
    align_steps: int = 3
    steps: int = 2000
    max_minutes: float = 0.0
    init: Literal["random", "last-layer"] = "random"
    noise: float = 0.2
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    compile: Literal["none", "loss", "all"] = "none"
    log_every: int = 10
    loss: LossConfig = field(default_factory=LossConfig)
    csra: CsraConfig = field(default_factory=CsraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        _require(1 <= self.align_steps <= 8, f"align_steps is {self.align_steps}; it must be 1 to 8")
        _require(self.steps >= 1 and self.log_every >= 1, "steps and log_every must be 1 or more")
        _require(len(self.data) >= 1, "data names no folder")
        _require(
            self.align_steps > 1 or self.csra.weight == 0,
            f"csra.weight is {self.csra.weight}, but align_steps is 1: there is no other step to be aligned with; "
            "use align_steps of 2 or more, or csra.weight 0",
        )
        _require(self.noise >= 0 and self.max_minutes >= 0, "noise and max_minutes must be 0 or more")
