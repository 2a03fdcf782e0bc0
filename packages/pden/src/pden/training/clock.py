"""Where a run stands, and which of its rounds was best on the source."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Clock:
    """Where a run stands.

    Attributes:
        stage: pretrain, judge (its training), round or done.
        round: the running one, from 1.
        attempt: at the round's domain, from 0.
        step: steps taken in the stage, or in the attempt.
        total: steps taken in all.
        unproductive: rounds in a row that brought nothing new.
        seconds, gate_seconds: spent training in all, and of it on judge and gate.
    """

    stage: str = "pretrain"
    round: int = 1
    attempt: int = 0
    step: int = 0
    total: int = 0
    unproductive: int = 0
    seconds: float = 0.0
    gate_seconds: float = 0.0


@dataclass
class Best:
    """The round whose model labelled the source's validation part best.

    Attributes:
        value, round: accuracy (mIoU for segmentation) and number; -1 before the first evaluation. Round 0 is
            pre-training.
        tensors: its weights.
    """

    value: float = -1.0
    round: int = -1
    tensors: dict[str, Tensor] = field(default_factory=dict)
