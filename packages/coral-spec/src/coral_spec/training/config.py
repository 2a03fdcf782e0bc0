"""Every setting of a training run, as read from `--config FILE`. What a paper gives is named; the rest is ours."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from coral_spec.training.csra import CsraConfig

Stage = Literal["data", "drafter", "router", "low-rank"]
CHUNK_BYTES = 2 << 30
STAGES: tuple[Stage, ...] = ("data", "drafter", "router", "low-rank")
HEAD_STAGES: tuple[Stage, ...] = ("router", "low-rank")


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
        chunk: positions whose logits exist at once; memory is 24 to 32 bytes x chunk x vocabulary. 0 is as many as
            two GiB hold.
    """

    feature: float = 1.0
    soft: float = 1.0
    top: float = 1.0
    top_k: int = 10
    top_from: float = 0.8
    chunk: int = 0

    def __post_init__(self) -> None:
        _require(
            all(0 <= each < math.inf for each in (self.feature, self.soft, self.top)), "loss weights must be 0 or more"
        )
        _require(self.top_k >= 1, f"loss.top_k is {self.top_k}; it must be 1 or more")
        _require(self.chunk >= 0, f"loss.chunk is {self.chunk}; it must be 0 or more")

    def positions(self, vocabulary: int) -> int:
        """Positions whose logits exist at once, for a vocabulary of this size."""
        return self.chunk or max(1, CHUNK_BYTES // (32 * vocabulary))


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

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup: float = 0.01
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    final: float = 0.0
    clip_value: float = 0.5
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, f"optimizer.lr is {self.lr}; it must be positive")
        _require(0 <= self.warmup < 1, f"optimizer.warmup is {self.warmup}; it must be in [0, 1)")


@dataclass(frozen=True)
class BatchConfig:
    """How answers become batches.

    Attributes:
        tokens: tokens (padding included) of one forward on one device; rows of similar length go together.
        accumulate: forwards per optimiser step.
        max_length: rows are cut after this many tokens.
    """

    tokens: int = 8192
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
class AnswersConfig:
    """How the stage `data` has the target answer prompts; what `coral-spec data` has as options.

    Attributes:
        prompts: JSON lines; relative to the folder that the command runs in.
        self_prompts: have an instruct model write this many prompts itself instead.
        limit: only the first prompts of the file.
        samples_per_prompt: answers to each prompt.
        temperature, top_p, max_new_tokens, seed: how answers are drawn.
        max_prompt_tokens: longer prompts are left out.
        batch_size, cache_gib: most answers at once, and most GiB of their keys and values.
        shard_size: answers per file.
    """

    prompts: Path | None = None
    self_prompts: int = 0
    limit: int | None = None
    samples_per_prompt: int = 1
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 512
    max_prompt_tokens: int = 1024
    batch_size: int = 256
    cache_gib: float = 4.0
    shard_size: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "limit",
            "samples_per_prompt",
            "max_new_tokens",
            "max_prompt_tokens",
            "batch_size",
            "cache_gib",
            "shard_size",
        ):
            value = getattr(self, name)
            plain = name.replace("_", "-")
            _require(value is None or 0 < value < float("inf"), f"{plain} is {value}; it must be positive")
        _require(self.self_prompts >= 0, f"self-prompts is {self.self_prompts}; it must be positive")

    def require_prompts(self) -> None:
        """ValueError unless there is exactly one source of prompts."""
        _require(
            (self.prompts is None) == (self.self_prompts > 0),
            "give either prompts (a file) or self-prompts (how many the model writes itself)",
        )


@dataclass(frozen=True)
class RouterConfig:
    """The router of the head, trained with the drafter frozen.

    Attributes:
        groups: equal groups of head rows.
        always: of these, read at every level; they hold the end of the text and the most frequent tokens.
        active: of the others, read at a level. It may be changed when drafting (`--head routed:GROUPS`).
        grouping: "contiguous" by frequency, "kmeans" on the head's rows, or "cooccurrence" in the answers.
        scores: how the tokens of several groups are put on one scale: "hierarchical" or "renormalised".
        steps, max_minutes, lr: as for the drafter; the rest of `optimizer` and `batch` is shared.
    """

    groups: int = 128
    always: int = 4
    active: int = 12
    grouping: Literal["contiguous", "kmeans", "cooccurrence"] = "kmeans"
    scores: Literal["hierarchical", "renormalised"] = "renormalised"
    steps: int = 1000
    max_minutes: float = 0.0
    lr: float = 1e-3

    def __post_init__(self) -> None:
        _require(self.groups >= 2, f"router.groups is {self.groups}; it must be 2 or more")
        _require(0 <= self.always < self.groups, f"router.always is {self.always}; it must be 0 to {self.groups - 1}")
        most = self.groups - self.always
        _require(
            1 <= self.active <= most,
            f"router.active is {self.active}, but {self.groups} groups, {self.always} of them always read, leave "
            f"{most} to choose from; it must be 1 to {most}",
        )
        _require_stage("router", self.steps, self.max_minutes, self.lr)


@dataclass(frozen=True)
class LowRankConfig:
    """A head of low rank, trained with the drafter frozen: what routing is measured against.

    Attributes:
        rank: of the two factors; 0 is a quarter of the width.
        steps, max_minutes, lr: as for the drafter; the rate is from a short trial (RESULTS.md, "Heads").
    """

    rank: int = 0
    steps: int = 1000
    max_minutes: float = 0.0
    lr: float = 4e-3

    def __post_init__(self) -> None:
        _require(self.rank >= 0, f"low_rank.rank is {self.rank}; it must be 0 or more")
        _require_stage("low_rank", self.steps, self.max_minutes, self.lr)


def _require_stage(name: str, steps: int, max_minutes: float, lr: float) -> None:
    _require(steps >= 1, f"{name}.steps is {steps}; it must be 1 or more")
    _require(0 <= max_minutes < math.inf, f"{name}.max_minutes is {max_minutes}; it must be 0 or more")
    _require(0 < lr < math.inf, f"{name}.lr is {lr}; it must be positive")


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        name: folder of the run below the folder of runs.
        target: alias, hub id or folder of the target.
        stages: what is done, always in this order: "data" (answers into the first folder of `data`), "drafter",
            "router", "low-rank".
        data: folders of answers made by `coral-spec data` or the stage of that name.
        drafter: folder of a trained drafter, for a "router" or "low-rank" without the stage "drafter".
        align_steps: harmonised steps n (HASS: 3); 1 is the EAGLE-2 baseline.
        steps: optimiser steps.
        max_minutes: when above 0, the schedule follows the clock and ends after this time (or after `steps`, if
            sooner); such a run can be resumed, but not to the same bits.
        init: "random", or "last-layer": the decoder layer starts as the target's last one (ours).
        noise: uniform noise on target features, scaled by 512 / length as in EAGLE (0.2), never above itself.
        device, dtype: "auto" or names; dtype is that of the target and of autocast, weights are fp32.
        compile: what torch.compile is used for: "none", the "loss", or "all" (the target's layers, the drafter and the
            loss). It takes a minute to start, so it is for long runs.
        log_every: optimiser steps between two lines of metrics.
    """

    name: str = "drafter"
    target: str = "smollm2-135m"
    stages: tuple[Stage, ...] = ("drafter",)
    data: tuple[Path, ...] = (Path("answers"),)
    drafter: Path | None = None
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
    answers: AnswersConfig = field(default_factory=AnswersConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    low_rank: LowRankConfig = field(default_factory=LowRankConfig)

    def __post_init__(self) -> None:
        _require(1 <= self.align_steps <= 8, f"align_steps is {self.align_steps}; it must be 1 to 8")
        _require(self.steps >= 1 and self.log_every >= 1, "steps and log_every must be 1 or more")
        _require(len(self.data) >= 1, "data names no folder")
        _require(
            self.align_steps > 1 or self.csra.weight == 0 or self.csra.anchor == "target",
            f"csra.weight is {self.csra.weight}, but align_steps is 1: there is no other step to be aligned with; "
            'use align_steps of 2 or more, csra.anchor = "target", or csra.weight 0',
        )
        if "drafter" in self.stages and self.align_steps == 1 and self.csra.weight > 0:
            warnings.warn(
                f"csra.weight is {self.csra.weight} with one step: features are aligned with the target's alone, which "
                "accepted less than no alignment where it was measured; csra.weight 0 leaves it out",
                stacklevel=2,
            )
        _require(0 < len(self.stages) == len(set(self.stages)), f"stages are {list(self.stages)}; name each once")
        if "data" in self.stages:
            self.answers.require_prompts()
        heads = [stage for stage in self.stages if stage in HEAD_STAGES]
        own = "drafter" in self.stages
        _require(
            not heads or own or self.drafter is not None,
            f'stage "{heads[0] if heads else ""}" needs a drafter: the stage "drafter", or drafter = FOLDER',
        )
        _require(not own or self.drafter is None, 'drafter is given, but the stage "drafter" trains one')
        for key, value in (("noise", self.noise), ("max_minutes", self.max_minutes)):
            _require(0 <= value < math.inf, f"{key} is {value}; it must be 0 or more")
