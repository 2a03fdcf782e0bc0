"""What the study trains, how long that takes, and how it is cut into leases of one machine's GPUs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2, 3, 4)
# Settings are chosen on seeds that no reported run has, by held-out source images in disguise, with no target loaded.
CHOICE_SEEDS = (100, 101)
CHOICE_ROUNDS = 5
BARLOW = ("loss.contrast=barlow", "loss.contrast_weight=0.02")
BOTH = ('generator.kinds=["photometric", "composite"]',)
# What was best in short runs on the embedded digits, by the same figure (results/demo-choice.json).
FARTHER = ("loss.cycle=5.0", "loss.adversarial=1.0")
CANDIDATES: dict[str, tuple[str, ...]] = {
    "paper": (),
    "supervised": ("loss.contrast=supervised",),
    "barlow": BARLOW,
    "adversarial-1": FARTHER[1:],
    "farther": FARTHER,
    "farther, both-kinds": (*FARTHER, *BOTH),
    "farther, supervised": (*FARTHER, "loss.contrast=supervised"),
    "farther, barlow": (*FARTHER, *BARLOW),
}
ABLATIONS: dict[str, tuple[str, ...]] = {
    "full": (),
    "no-safety": ("loss.safety=0.0",),
    "no-diversity": ("loss.diversity=0.0",),
    "no-cycle": ("loss.cycle=0.0",),
    "no-adversarial": ("loss.adversarial=0.0",),
    "no-contrast": ("loss.contrast=none",),
    "supervised": ("loss.contrast=supervised",),
    "barlow": BARLOW,
    "geometric": ('generator.kinds=["geometric"]',),
    "composite": ('generator.kinds=["composite"]',),
}
PARTS = ("speed", "alone", "choice", "paper", "ours", "baselines", "ablation", "cifar")
METHODS = ("augmix", "randconv", "me-ada", "erm")


@dataclass(frozen=True)
class Job:
    """One training: a config, flags and settings over it, and a seed.

    Attributes:
        kind: of its steps, which have a speed.
        steps: how many it takes.
    """

    part: str
    label: str
    config: str
    seed: int
    kind: str
    steps: int
    flags: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        return f"{self.label}-seed{self.seed}".replace(", ", "+")


def settings(*keys: str) -> tuple[str, ...]:
    """`KEY=VALUE` each as a flag of `pden train`."""
    return tuple(word for key in keys for word in ("--set", key))


def jobs_of(part: str, chosen: Sequence[str] = ()) -> list[Job]:
    """All trainings of a part, the longest first.

    Args:
        chosen: settings that `choose` has found, for the part `ours`.
    """
    whole, short = 5000 + 20 * 3000, 5000 + 10 * 3000
    if part == "baselines":
        flags = {each: ("--method", each) for each in METHODS}
        return [Job(part, m, "digits-baseline", seed, m, whole, flags[m]) for m in METHODS for seed in SEEDS]
    if part == "paper":
        return [Job(part, "pden-paper", "digits-paper", seed, "pden", whole) for seed in SEEDS]
    if part == "ours":
        return [Job(part, "pden-ours", "digits-ours", seed, "pden", whole, settings(*chosen)) for seed in SEEDS]
    if part == "choice":
        fixed = ("--rounds", str(CHOICE_ROUNDS), *settings("data.targets=[]"))
        steps = 5000 + CHOICE_ROUNDS * 3000
        return [
            Job(part, label, "digits-ours", seed, "pden", steps, (*fixed, *settings(*keys)))
            for label, keys in CANDIDATES.items()
            for seed in CHOICE_SEEDS
        ]
    if part == "ablation":
        return [
            Job(part, label, "digits-paper", seed, "pden", short, ("--rounds", "10", *settings(*keys)))
            for label, keys in ABLATIONS.items()
            for seed in SEEDS[:2]
        ]
    if part == "cifar":
        methods = {"augmix": "cifar-augmix", "pden": "cifar-pden", "erm": "cifar-erm"}
        return [Job(part, m, "cifar10", 0, kind, 40_000, ("--method", m)) for m, kind in methods.items()]
    if part == "alone":
        return [Job(part, "pden-alone", "digits-paper", 0, "pden", whole)]
    return [
        Job(part, kind, job.config, 0, kind, 2000, (*job.flags, *SHORT))
        for kind, job in {job.kind: job for each in ("paper", "baselines") for job in jobs_of(each)}.items()
    ]


SHORT = ("--rounds", "1", *settings("pretrain_steps=400", "round_steps=1600", "data.targets=[]", "gate.mode=off"))


@dataclass(frozen=True)
class Speed:
    """Milliseconds of one step.

    Attributes:
        alone: where nothing else runs on the GPU.
        shared: of the GPU's own time, which is what counts where runs side by side fill it.
    """

    alone: float
    shared: float


# Foreseen for an H100 from counts of kernels and of operations, before any was measured: a step of PDEN launches 330
# kernels while the generator learns and 130 after, and computes 150 and 90 GFLOP at batch 128.
FORESEEN = {
    "pden": Speed(4.5, 3.0),
    "augmix": Speed(6.0, 3.0),
    "randconv": Speed(2.0, 1.2),
    "me-ada": Speed(1.2, 0.5),
    "erm": Speed(1.2, 0.5),
    "cifar-pden": Speed(25.0, 22.0),
    "cifar-augmix": Speed(18.0, 14.0),
    "cifar-erm": Speed(8.0, 5.0),
}
START = 0.5  # minutes that a process takes before its first step and after its last one


def speeds(out: Path) -> dict[str, Speed]:
    """Those that the part `speed` has measured; foreseen ones for the rest."""
    file = out / "speed.json"
    if not file.is_file():
        return FORESEEN
    found = json.loads(file.read_text(encoding="utf-8"))["kinds"]
    return {**FORESEEN, **{kind: Speed(each["alone"], each["shared"]) for kind, each in found.items()}}


def minutes(jobs: Sequence[Job], speed: Mapping[str, Speed], side: int, gpus: int = 1) -> float:
    """Of trainings that run `side` at a time on each GPU: none is faster than alone, and together they fill it."""
    if not jobs:
        return 0.0
    if jobs[0].part == "speed":  # each kind once alone, once side by side, on one GPU
        both = sum(job.steps * (speed[job.kind].alone + side * speed[job.kind].shared) / 60_000 for job in jobs)
        return both + 2 * START * len(jobs)
    if gpus > 1:  # dealt out in turn, the longest first; the fullest GPU is the last to be done
        return max(minutes(jobs[place::gpus], speed, side) for place in range(gpus))
    side = 1 if jobs[0].part == "alone" else side
    alone = [job.steps * speed[job.kind].alone / 60_000 for job in jobs]
    shared = [job.steps * speed[job.kind].shared / 60_000 for job in jobs]
    turns = math.ceil(len(jobs) / side)
    return max(sum(shared), max(alone), sum(alone) / side) + START * turns


def leases(
    waiting: Mapping[str, Sequence[Job]], speed: Mapping[str, Speed], side: int, limit: float, gpus: int = 1
) -> list[list[tuple[list[Job], float]]]:
    """What is left to do, as leases of `limit` minutes; each is a list of (trainings of one part, minutes).

    A machine is bare at its start and only small files leave it, so a training that is cut off at a lease's end is
    lost: whole trainings are packed.
    """
    found: list[list[tuple[list[Job], float]]] = [[]]
    for part in PARTS:
        rest = list(waiting.get(part, ()))
        while rest:
            left = limit - sum(each for _, each in found[-1])
            count = len(rest)
            while count and minutes(rest[:count], speed, side, gpus) > left:
                count -= 1
            if count == 0 and found[-1]:
                found.append([])
                continue
            count = max(1, count)  # longer than a lease: it is listed all the same, and the reader sees its minutes
            found[-1].append((rest[:count], minutes(rest[:count], speed, side, gpus)))
            rest = rest[count:]
    return [each for each in found if each]


def choose(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rule: the candidate whose averaged weights label held-out source images in disguise best, as the mean over
    the seeds of choice. Nothing else of a result is read.

    Raises:
        ValueError: a candidate was not trained with every seed of choice.
    """
    figures: dict[str, dict[int, float]] = {}
    for result in results:
        label = str(result["name"]).removesuffix(f"-seed{result['seed']}").replace("+", ", ")
        figures.setdefault(label, {})[int(result["seed"])] = result["selections"]["averaged"]["disguised"]
    for label in CANDIDATES:
        absent = sorted(set(CHOICE_SEEDS) - set(figures.get(label, {})))
        if absent:
            raise ValueError(f"the choice is not finished: {label} lacks seed {absent[0]}")
    means = {label: sum(figures[label].values()) / len(figures[label]) for label in CANDIDATES}
    best = max(means, key=lambda label: means[label])
    return {"rule": choose.__doc__, "figures": figures, "means": means, "chosen": best, "settings": CANDIDATES[best]}
