"""What the study trains, how long that takes, and in which order trainings get a place on a GPU."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SEEDS = (0, 1, 2, 3, 4)
# What configs/digits-choice.toml leaves open is chosen on a seed that no reported run has, by domains that are none of
# the study's targets: held-out digits on CIFAR-10's pictures, and scikit-learn's digits, which other people wrote, with
# what is made of them. How the config itself came about, and that two earlier choices misled, is in RESULTS.md.
CHOICE_SEEDS = (100,)
CHOICE_ROUNDS, CHOICE_ROUND, CHOICE_PRETRAINING = 4, 2000, 2000
PHOTO = "mnist-rest-photo"
DEVELOPMENT = (PHOTO, "digits", "digits-photo", "digits-inverted", "digits-low-contrast", "digits-thick")
BARLOW = ("loss.contrast=barlow", "loss.contrast_weight=0.02")
SUPERVISED = ("loss.contrast=supervised", "loss.cycle=5.0", "loss.adversarial=1.0")  # the first choice's
BATCHES = ("data.randconv=0.5", "data.randconv_of=batches")  # the first choice's too
GRID = ("generator.grid=8",)
GRID_HALF = (*GRID, "generator.grid_share=0.5")
CONSISTENT = ("loss.consistency=10.0",)
QUARTER, HALF, WHOLE_BATCHES = (("data.randaugment=0.25",), ("data.randaugment=0.5",), ("data.randaugment=1.0",))
ALTERNATING = ('generator.kinds=["photometric", "geometric"]',)
MOSTLY_PHOTOMETRIC = ('generator.kinds=["photometric", "photometric", "geometric"]',)
CANDIDATES: dict[str, tuple[str, ...]] = {
    "no-randconv": ("data.randconv=0.0",),
    "batches": BATCHES,
    "views": (),
    "grid": GRID,
    "consistent": CONSISTENT,
    "consistent, no-contrast": (*CONSISTENT, "loss.contrast=none"),
    "quarter": QUARTER,
    "half": HALF,
    "whole": WHOLE_BATCHES,
    "mostly-photometric": MOSTLY_PHOTOMETRIC,
    "alternating": ALTERNATING,
    "supervised": SUPERVISED,
    "grid, consistent": (*GRID, *CONSISTENT),
    "grid, quarter": (*GRID, *QUARTER),
    "consistent, quarter": (*CONSISTENT, *QUARTER),
    "grid, consistent, quarter": (*GRID, *CONSISTENT, *QUARTER),
    "grid, consistent, half": (*GRID, *CONSISTENT, *HALF),
    "grid, consistent, alternating": (*GRID, *CONSISTENT, *ALTERNATING),
    "grid, consistent, supervised": (*GRID, *CONSISTENT, *SUPERVISED),
    # After the figures of those above
    "grid, consistent, whole": (*GRID, *CONSISTENT, *WHOLE_BATCHES),
    "grid-16, consistent, half": ("generator.grid=16", *CONSISTENT, *HALF),
    "grid, noise-32, consistent, half": (*GRID, "generator.noise=32", *CONSISTENT, *HALF),
    "grid-half, consistent, half": (*GRID_HALF, *CONSISTENT, *HALF),
    "grid-half, consistent, whole": (*GRID_HALF, *CONSISTENT, *WHOLE_BATCHES),
    "grid, consistent, half, supervised": (*GRID, *CONSISTENT, *HALF, "loss.contrast=supervised"),
    "grid, consistent, half, alternating": (*GRID, *CONSISTENT, *HALF, *ALTERNATING),
    "grid-half, consistent, half, alternating": (*GRID_HALF, *CONSISTENT, *HALF, *ALTERNATING),
}
# What of ours has been chosen on digits, on CIFAR-10; half of the views keep their textures, which tell classes there
OURS = (*GRID_HALF, *CONSISTENT, *WHOLE_BATCHES, "data.randconv=0.5", "data.randconv_of=views")
ABLATION_ROUNDS = 4  # most of what a run gains, it has by then
WHOLE = {"pden-paper": "full", "pden-ours": "ours_full"}  # rows with nothing left out: longer runs after as many rounds
ABLATIONS: dict[str, tuple[str, ...]] = {
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
OURS_ABLATIONS: dict[str, tuple[str, ...]] = {  # over the chosen settings
    "ours, no-randaugment": ("data.randaugment=0.0",),
    "ours, no-randconv": ("data.randconv=0.0",),
    "ours, no-grid": ("generator.grid=0", "generator.grid_share=1.0"),
    "ours, no-consistency": ("loss.consistency=0.0",),
    "ours, photometric": ('generator.kinds=["photometric"]',),
    "ours, supervised": ("loss.contrast=supervised",),
    "ours, barlow": BARLOW,
}
PARTS = ("paper", "choice", "ours", "baselines", "ablation", "cifar")
METHODS = ("augmix", "randconv", "randconv-randaugment", "randaugment", "randaugment-randconv", "me-ada", "erm")
TOGETHER = ("randconv-randaugment", "randaugment-randconv")  # no published method: three seeds
PRETRAINING = 5000
PRETRAIN_SHARE = 0.37  # of a round's step in one before the rounds, which has no views (44 and 120 GFLOP)


@dataclass(frozen=True)
class Job:
    """One training: a config, flags and settings over it, and a seed.

    Attributes:
        kind: of its steps, which have a speed.
        steps: how many it takes, if no domain is refused.
        alone: nothing else runs on its GPU, since its time and memory are reported or it fills the GPU by itself.
    """

    part: str
    label: str
    config: str
    seed: int
    kind: str
    steps: int
    flags: tuple[str, ...] = field(default=())
    alone: bool = False

    @property
    def work(self) -> float:
        """Its length in steps of a round, which a speed is of."""
        before = CHOICE_PRETRAINING if self.part == "choice" else PRETRAINING
        return self.steps - ((1 - PRETRAIN_SHARE) * before if self.kind.startswith("pden") else 0)

    @property
    def name(self) -> str:
        return f"{self.place}-seed{self.seed}"

    @property
    def place(self) -> str:
        """Its name but for the seed."""
        return self.label.replace(", ", "_")


def settings(*keys: str) -> tuple[str, ...]:
    """`KEY=VALUE` each as a flag of `pden train`."""
    return tuple(word for key in keys for word in ("--set", key))


def kind_of(keys: Sequence[str]) -> str:
    """Of PDEN's steps with these settings over the paper's: those that warp images take another time."""
    return "pden-warp" if any("geometric" in key or "composite" in key for key in keys) else "pden"


def ours_without(chosen: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The rows of `OURS_ABLATIONS` that leave something of the chosen settings out."""
    given = dict(key.split("=", 1) for key in chosen)
    has = {  # what the config itself has not
        "ours, no-randaugment": "data.randaugment" in given,
        "ours, no-randconv": given.get("data.randconv") != "0.0",
        "ours, no-grid": "generator.grid" in given,
        "ours, no-consistency": "loss.consistency" in given,
        "ours, photometric": "generator.kinds" in given,
    }
    return {
        label: keys for label, keys in OURS_ABLATIONS.items() if has.get(label, True) and not set(keys) <= set(chosen)
    }


def jobs_of(part: str, chosen: Sequence[str] = ()) -> list[Job]:
    """All trainings of a part, the longest first.

    Args:
        chosen: settings that `choose` has found, for `ours` and its ablation.
    """
    whole = PRETRAINING + 20 * 3000
    if part == "baselines":
        flags = {each: ("--method", each) for each in METHODS}
        # RandAugment moves pixels and RandConv changes them, as ours does; together they are what ours has to beat.
        flags["randaugment-randconv"] = ("--method", "randaugment", *settings("data.randconv=0.5"))
        flags["randconv-randaugment"] = ("--method", "randconv", *settings("data.randaugment=1.0"))
        return [
            Job(part, method, "digits-baseline", seed, method, whole, flags[method])
            for method in METHODS
            for seed in (SEEDS[:3] if method in TOGETHER else SEEDS)
        ]
    if part == "paper":
        return [Job(part, "pden-paper", "digits-paper", seed, "pden", whole, alone=seed == 0) for seed in SEEDS]
    if part == "ours":
        return [Job(part, "pden-ours", "digits-choice", seed, "pden-ours", whole, settings(*chosen)) for seed in SEEDS]
    if part == "choice":
        short = (f"pretrain_steps={CHOICE_PRETRAINING}", f"round_steps={CHOICE_ROUND}")
        fixed = ("--rounds", str(CHOICE_ROUNDS), *settings(*short, f"data.targets={list(DEVELOPMENT)}"))
        steps = CHOICE_PRETRAINING + CHOICE_ROUNDS * CHOICE_ROUND
        return [
            Job(part, label, "digits-choice", seed, "pden-choice", steps, (*fixed, *settings(*keys)))
            for label, keys in CANDIDATES.items()
            for seed in CHOICE_SEEDS
        ]
    if part == "ablation":
        rounds, steps = ("--rounds", str(ABLATION_ROUNDS)), PRETRAINING + ABLATION_ROUNDS * 3000
        rows = [(label, "digits-paper", kind_of(keys), keys) for label, keys in ABLATIONS.items()]
        rows += [
            (label, "digits-choice", "pden-ours", (*chosen, *keys)) for label, keys in ours_without(chosen).items()
        ]
        return [
            Job(part, label, config, seed, kind, steps, (*rounds, *settings(*keys)))
            for label, config, kind, keys in rows
            for seed in SEEDS[:2]
        ]
    # PDEN sums the losses of four views; half the rate of the others is a guess
    own = {"pden": ("optimizer.lr=0.05",), "ours": ("optimizer.lr=0.05", *OURS)}
    return [
        Job(part, label, "cifar10", 0, kind, 40_000, ("--method", method, *settings(*own.get(label, ()))), alone=True)
        for label, method, kind in (
            ("pden", "pden", "cifar-pden"),
            ("ours", "pden", "cifar-pden"),
            ("augmix", "augmix", "cifar-augmix"),
            ("erm", "erm", "cifar-erm"),
        )
    ]


def queue(chosen: Sequence[str] = ()) -> list[Job]:
    """All trainings in the order in which they get a place: what others wait for, then seed by seed, so that a study
    that was cut short has whole comparisons; what needs a GPU alone comes last."""
    alone, *paper = jobs_of("paper")
    baselines = sorted(jobs_of("baselines"), key=lambda job: job.seed)
    compared = [*jobs_of("ours", chosen), *paper, *baselines]
    return [*jobs_of("choice"), *compared, *jobs_of("ablation", chosen), alone, *jobs_of("cifar")]


@dataclass(frozen=True)
class Speed:
    """Milliseconds of one step.

    Attributes:
        alone: where nothing else runs on the GPU.
        shared: of the GPU's own time, which is what counts where runs side by side fill it.
    """

    alone: float
    shared: float


# On an H100, by step_time.py; "pden-ours", "pden-choice" and "pden-warp" by trainings, side by side guesses, as are
# RandAugment and CIFAR-10 (of PDEN from the rates of a run that was cut off).
FORESEEN = {
    "pden": Speed(5.2, 5.7),
    "pden-ours": Speed(6.1, 6.3),
    "pden-choice": Speed(5.0, 5.2),
    "pden-warp": Speed(6.0, 6.4),
    "augmix": Speed(5.4, 3.8),
    "randconv": Speed(2.1, 2.2),
    "randaugment": Speed(2.0, 2.0),
    "randaugment-randconv": Speed(2.1, 2.1),
    "randconv-randaugment": Speed(2.3, 2.3),
    "me-ada": Speed(0.9, 1.0),
    "erm": Speed(0.9, 1.0),
    "cifar-pden": Speed(14.0, 14.0),
    "cifar-augmix": Speed(18.0, 14.0),
    "cifar-erm": Speed(8.0, 5.0),
}
START = 0.4  # minutes that a process takes before its first step and after its last one
SLACK = 1.1  # measuring after rounds, checkpoints, and domains that the gate has learned anew


class Estimates:
    """Minutes of trainings.

    Args:
        side: trainings that share a GPU.
        results: figures of finished trainings, by job; they replace what was foreseen for others of their kind that
            run as they did, alone or side by side.
    """

    def __init__(self, side: int, results: Mapping[Job, Mapping[str, Any]]) -> None:
        self.side = side
        found: dict[tuple[str, bool], list[float]] = {}
        for job, result in results.items():
            seconds = job.steps / result["steps_per_second"]
            found.setdefault((job.kind, job.alone), []).append(1000 * seconds / job.work)
        self.seen = {key: statistics.median(each) for key, each in found.items()}

    def minutes(self, job: Job) -> float:
        """Until a training is done."""
        speed = FORESEEN[job.kind]
        foreseen = speed.alone if job.alone else max(speed.alone, self.side * speed.shared)
        return SLACK * job.work * self.seen.get((job.kind, job.alone), foreseen) / 60_000 + START


def place(job: Job, running: Collection[tuple[Job, str]], side: int, gpus: Sequence[str]) -> str | None:
    """The GPU with the fewest trainings that has room for this one."""
    load = {gpu: [other.alone for other, where in running if where == gpu] for gpu in gpus}
    gpu = min(gpus, key=lambda each: math.inf if any(load[each]) else len(load[each]))
    room = not load[gpu] or not (job.alone or any(load[gpu]) or len(load[gpu]) >= side)
    return gpu if room else None


def next_job(
    todo: Sequence[Job],
    running: Collection[tuple[Job, str]],
    side: int,
    gpus: Sequence[str],
    may_begin: Callable[[Job], bool],
) -> tuple[Job, str] | None:
    """The first training that may begin now and has a place, with its GPU."""
    for job in todo:
        gpu = place(job, running, side, gpus) if may_begin(job) else None
        if gpu is not None:
            return job, gpu
    return None


def leases(
    todo: Sequence[Job], estimates: Estimates, gpus: Sequence[str], limit: float
) -> list[list[tuple[Job, str, float, float]]]:
    """What is left to do, as leases of `limit` minutes: trainings with GPU, begin and end.

    A machine is bare at its start and only small files leave it, so a training that is cut off at a lease's end is
    lost: none begins that would not end. One that is longer than a lease has one for itself, and needs a longer one.
    """
    left, found = list(todo), []
    while left:
        now, lease = 0.0, []
        running: list[tuple[Job, str, float]] = []
        while True:
            waits = any(job.part == "choice" for job in [*left, *(job for job, *_ in running)])
            late = {job for job in left if now + estimates.minutes(job) > limit or (waits and job.part != "choice")}
            begun = next_job(left, [each[:2] for each in running], estimates.side, gpus, lambda job: job not in late)  # noqa: B023
            if begun is None and not running:
                break
            if begun is None:
                running.sort(key=lambda each: each[2])
                now = running.pop(0)[2]
                continue
            job, gpu = begun
            running.append((job, gpu, now + estimates.minutes(job)))
            lease.append((job, gpu, now, running[-1][2]))
            left.remove(job)
        if not lease:
            job = left.pop(0)
            lease = [(job, gpus[0], 0.0, estimates.minutes(job))]
        found.append(lease)
    return found


def choose(results: Sequence[Mapping[str, Any]], failed: Collection[str] = ()) -> dict[str, Any]:
    """The rule: the candidate whose averaged weights are best on the development domains, held-out digits on pictures
    and other people's digits (the mean of five) to equal parts. Nothing else of a result is read. A candidate with a
    training that failed is out.

    Args:
        failed: names of trainings.

    Raises:
        ValueError: a candidate was not trained with every seed of choice, all have failed, or they were measured on
            other domains.
    """
    for result in results:
        measured = set(result["selections"]["averaged"]["targets"])
        if measured != set(DEVELOPMENT):
            raise ValueError(f"{result['name']} was measured on other domains: {', '.join(sorted(measured))}")
    figures: dict[str, dict[int, float]] = {label: {} for label in CANDIDATES}
    labels = {job.name: job.label for job in jobs_of("choice")}
    for result in results:
        others = dict(result["selections"]["averaged"]["targets"])
        photo = others.pop(PHOTO)
        figure = (photo + statistics.mean(others.values())) / 2
        figures[labels[result["name"]]][int(result["seed"])] = figure
    out = {labels[name] for name in failed}
    for label in set(CANDIDATES) - out:
        absent = sorted(set(CHOICE_SEEDS) - set(figures[label]))
        if absent:
            raise ValueError(f"the choice is not finished: {label} lacks seed {absent[0]}")
    means = {label: sum(each.values()) / len(each) for label, each in figures.items() if label not in out}
    if not means:
        raise ValueError("every candidate has failed")
    best = max(means, key=lambda label: means[label])
    about = {"figures": figures, "failed": sorted(failed), "means": means}
    return {"rule": choose.__doc__, **about, "chosen": best, "settings": CANDIDATES[best]}
