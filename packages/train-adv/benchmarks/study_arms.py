"""What the study trains, what each arm costs on paper, and how that is cut into leases. No torch: it plans at once."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

BASE, LONG = "cifar10-resnet18.toml", "cifar10-resnet18-100.toml"
PARTS = (
    "speed", "standard", "rate", "lambda", "beta", "joint", "inputs", "main", "customary", "careful", "epsilons",
    "everything", "long", "multistep", "edges",
)  # fmt: skip
SEEDED = ("standard", "main", "customary", "careful")  # trained with each seed, all else with the first
# What each part needs: rates are chosen first, then lambda and beta, then lambda at that beta; the rest has them all.
LAST = ("main", "customary", "careful", "epsilons", "everything", "long", "multistep")
STAGES = {"rate": 1, "lambda": 2, "beta": 2, "joint": 3, "inputs": 3, **dict.fromkeys(LAST, 4)}
RATES = (0.05, 0.1, 0.2)
BETA = 6.0  # TRADES' customary one
LONG_RATE = 0.1  # that of public recipes of 100 epochs and more
JUDGED = ("natural", "pgd20", "apgd")
SHORT = {"epochs": 15, "validation.every": 5, "topology.metrics": False}
LEASE_START = 60.0  # seconds: unpacking the data, importing, the first kernels
STANDARD = 75.0  # the standard model that a bare machine trains again, compiling included
ARM_START = 25.0  # compiling and recording, most of it read from the compiler's cache
WORKER_START = 15.0  # with several GPUs every arm is a process: importing and reading the data again
VALIDATION = 1.0
EVALUATION = 105.0  # natural, PGD-20 and APGD-CE + T on 10,000 images, measured on an H100; so are the paces below
AUTOATTACK = 180.0  # on 1,000, on paper
# Seconds an epoch at batch 512, until the part `speed` has measured them; TRAIN's share and AWP's on top.
PACE = {"standard": 1.3, "at": 4.6, "trades": 5.5, "mart": 5.5}
TRAIN_SHARE = {"standard": 1.3, "at": 1.2, "trades": 1.06, "mart": 1.06}
AWP_SHARE, SMALL_BATCH_SHARE = 1.2, 1.2


@dataclass(frozen=True)
class Arm:
    """One training and its evaluation.

    Attributes:
        tuning: trained without, and judged on, a tenth of the training images, so that nothing is chosen on the test
            images (see `study.tuning_split`).
        attacks: on the last checkpoint, and on the best one where that is of another epoch; none: only timed.
        final: on the last checkpoint besides; on the best one too of 100 epochs, whose ends may have overfitted.
        reference: whether it needs the standard model of its seed (for TRAIN, or for the metrics of topology).
        both: judge the best checkpoint too.
    """

    name: str
    settings: dict[str, Any]
    base: str = BASE
    attacks: tuple[str, ...] = JUDGED
    final: tuple[str, ...] = ()
    tuning: bool = False
    reference: bool = True
    both: bool = True

    @property
    def host(self) -> str:
        return str(self.settings["host"])

    @property
    def epochs(self) -> int:
        return int(self.settings.get("epochs", 100 if self.base == LONG else 30))

    @property
    def final_of_both(self) -> bool:
        return self.both and self.base == LONG

    @property
    def kind(self) -> tuple[str, bool, bool, int]:
        """What decides the seconds of an epoch: host, TRAIN, AWP, batch."""
        settings = self.settings
        train = settings.get("topology.weight", 0) > 0 or bool(settings.get("topology.control"))
        batch = int(settings.get("batch_size", 128))
        return self.host, train, "awp.gamma" in settings, batch


@dataclass(frozen=True)
class Choice:
    """What was chosen for one host: learning rate and TRADES' beta, without TRAIN and with it; TRAIN's settings."""

    rate: float
    kernel: str
    weight: float
    beta: float | None = None
    inputs: str = "natural"

    @property
    def alone(self) -> dict[str, Any]:
        return {"optimizer.lr": self.rate} | ({} if self.beta is None else {"beta": self.beta})

    @property
    def train(self) -> dict[str, Any]:
        shown = {} if self.inputs == "natural" else {"topology.inputs": self.inputs}
        return {**self.alone, "topology.kernel": self.kernel, "topology.weight": self.weight, **shown}

    @property
    def suffix(self) -> str:
        """Of an arm's name with TRAIN, after the paper's form of it."""
        return "" if self.inputs == "natural" else f"-{self.inputs}"


def parts(at: Choice, trades: Choice, customary: Choice, careful: Choice) -> dict[str, list[Arm]]:
    """The arms of every part; `at` is for MART too, `customary` is TRADES at its customary beta, `careful` AT."""
    scales = {"cosine": (3.0, 10.0, 30.0, 100.0), "softmax-cosine": (0.1, 0.3)}
    natural = {"at": replace(at, inputs="natural"), "trades": replace(trades, inputs="natural")}
    first = {"at": natural["at"], "trades": replace(natural["trades"], beta=BETA)}
    beside = [(BETA, "both", 100.0), (BETA, "both", 300.0), (BETA, "adversarial", 100.0), (2.0, "adversarial", 100.0)]
    at_, trades_, careful_ = (replace(each, rate=LONG_RATE) for each in (at, trades, careful))  # of the long runs
    aa = ("autoattack",)
    rare = {"validation.every": 2}
    weaker = {"awp.gamma": 0.005, "awp.warmup": 10}
    beyond = {"": {}, "-awp": {"awp.gamma": 0.01}, "-awp-0.005": weaker, "-erase": {"data.erase": 0.5}}
    cut = {"optimizer.schedule": "multistep", "optimizer.milestones": [0.5, 0.75], **rare}
    return {
        "speed": [
            Arm(f"speed-{host}{'+train' if weight else ''}-{size}", _speed(host, weight, size), attacks=())
            for size in (512, 128)
            for host, weight in (("at", 0.0), ("at", 100.0), ("trades", 0.0), ("trades", 100.0))
        ],
        "standard": [standard(tuning=False)],
        "rate": [
            _alone(host, replace(own, rate=rate))
            for host, own in first.items()
            for rate in RATES
        ],
        "lambda": [
            _with_train(host, replace(own, kernel=name, weight=weight))
            for host, own in first.items()
            for name, weights in scales.items()
            for weight in weights
        ],
        "beta": [_alone("trades", replace(trades, beta=beta)) for beta in (1.0, 2.0, 3.0, 9.0)],  # 6 is among the rates
        "joint": [
            _with_train("trades", replace(natural["trades"], kernel="cosine", weight=weight))
            for weight in scales["cosine"]
            if trades.beta not in (None, BETA)
        ],
        "inputs": [
            _with_train(host, replace(own, kernel="cosine", weight=weight, inputs=inputs))
            for host, own in (("trades", trades), ("at", at))
            for inputs, weights in (("both", (30.0, 100.0, 300.0)), ("adversarial", (100.0, 300.0, 1000.0)))
            for weight in weights
        ]
        + [
            _with_train("trades", replace(trades, beta=beta, kernel="cosine", weight=weight, inputs=inputs))
            for beta, inputs, weight in beside
            if beta != (trades.beta or BETA)
        ],
        "main": [
            Arm("at", {"host": "at", **at.alone}, final=aa),
            Arm(f"at+train{at.suffix}", {"host": "at", **at.train}, final=aa),
            Arm("trades", {"host": "trades", **trades.alone}, final=aa),
            Arm(f"trades+train{trades.suffix}", {"host": "trades", **trades.train}, final=aa),
            Arm("at-control", {"host": "at", "topology.control": True, **at.alone}),
            Arm("mart", {"host": "mart", **at.alone}, final=aa),
            Arm(f"mart+train{at.suffix}", {"host": "mart", **at.train}, final=aa),
        ],
        "customary": [
            Arm(f"trades-{BETA:g}", {"host": "trades", **customary.alone}, final=aa),
            Arm(f"trades-{BETA:g}+train{customary.suffix}", {"host": "trades", **customary.train}, final=aa),
        ]
        if customary.beta != (trades.beta or BETA)
        else [],
        "careful": [Arm(f"at+train{careful.suffix}-{careful.weight:g}", {"host": "at", **careful.train}, final=aa)]
        if careful != at
        else [],
        "epsilons": [
            Arm(f"epsilon-{each}", {"host": "at" if each else "standard", "attack.epsilon": max(each, 1) / 255,
                                    "attack.step_size": max(each, 1) / 4 / 255, "epochs": 15, **at.alone},
                attacks=("natural", "pgd20"), both=False)
            for each in (0, 2, 4, 8)
        ],
        "everything": [
            Arm("everything-at", {"host": "at", "awp.gamma": 0.01, **at_.train, **rare}, LONG, final=aa),
            Arm("everything-trades", {"host": "trades", "awp.gamma": 0.005, **trades_.train, **rare}, LONG, final=aa),
        ],
        "long": [
            Arm("long-at", {"host": "at", **at_.alone, **rare}, LONG, final=aa),
            Arm("long-at+train", {"host": "at", **at_.train, **rare}, LONG, final=aa),
            Arm("long-trades", {"host": "trades", **trades_.alone, **rare}, LONG, final=aa),
            Arm("long-trades+train", {"host": "trades", **trades_.train, **rare}, LONG, final=aa),
        ],
        "multistep": [
            Arm(f"multistep-at{name}", {"host": "at", **more, **settings, **cut}, LONG, final=aa)
            for kind, more in beyond.items()
            for name, settings in ((kind, at_.alone), (f"{kind}+train{careful_.suffix}", careful_.train))
        ],
        "edges": [
            replace(arm, name=arm.name.replace("tune", "edge"))
            for arm in (
                _alone("at", replace(at, rate=2 * max(RATES))),
                _alone("trades", replace(trades, rate=2 * max(RATES))),
                _with_train("at", replace(natural["at"], kernel="cosine", weight=300.0)),
            )
        ]
        + [Arm("edge-at-no-average", {**_alone("at", at).settings, "averaging.kind": "none"},
               tuning=True, reference=False, both=False)],
    }  # fmt: skip


def _alone(host: str, own: Choice) -> Arm:
    """A host's arm of the sweeps."""
    name = f"tune-{host}-rate-{own.rate:g}" + ("" if own.beta in (None, BETA) else f"-beta-{own.beta:g}")
    return Arm(name, {"host": host, **own.alone, **SHORT}, tuning=True, reference=False, both=False)


def _with_train(host: str, own: Choice) -> Arm:
    """The same with TRAIN."""
    name = f"{_alone(host, own).name}-{own.kernel}-{own.weight:g}{own.suffix}"
    return Arm(name, {"host": host, **own.train, **SHORT}, tuning=True, both=False)


def standard(*, tuning: bool) -> Arm:
    """The standard model. Each lease trains it anew by its seed, up to rounding the same, so that none is carried."""
    settings = {"host": "standard", "averaging.kind": "none", "deterministic": True, "validation.every": 10}
    name = "tune-standard" if tuning else "standard"
    return Arm(name, settings, attacks=("natural", "pgd20"), tuning=tuning, reference=False, both=False)


def _speed(host: str, weight: float, size: int) -> dict[str, Any]:
    """Three epochs without validation in between; the first one compiles and does not count."""
    return {
        "host": host, "batch_size": size, "epochs": 3, "topology.weight": weight, "topology.reference_epochs": 1,
        "validation.every": 3, "averaging.kind": "ema", "optimizer.lr": 0.05,
    }  # fmt: skip


def read_results(out: Path) -> list[dict[str, Any]]:
    """Every arm's JSON in OUT, by name; names that begin with a dot are being written by another process."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("[!.]*-[0-9]*.json"))]
    return [each for each in found if "arm" in each]


def is_done(out: Path, arm: Arm, seed: int) -> bool:
    """Whether the arm has all its figures."""
    path = out / f"{arm.name}-{seed}.json"
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("complete"))


@dataclass(frozen=True)
class Costs:
    """Seconds that were measured, where they were; those on paper elsewhere.

    Attributes:
        paces: seconds an epoch of a kind of arm.
        evaluation: of `JUDGED` on 10,000 images.
        autoattack: on 1,000.
    """

    paces: dict[tuple[str, bool, bool, int], float] = field(default_factory=dict)
    evaluation: float = EVALUATION
    autoattack: float = AUTOATTACK

    @classmethod
    def measured(cls, results: Sequence[dict[str, Any]], arms: Sequence[Arm]) -> Costs:
        """From the arms that have their JSON; the longest evaluation counts."""
        by_name = {arm.name: arm for arm in arms}
        paces, whole, auto = {}, [], []
        for each in results:
            arm = by_name.get(each["arm"])
            if arm is None:
                continue
            if each.get("seconds_per_epoch_after_the_first"):
                paces[arm.kind] = float(each["seconds_per_epoch_after_the_first"])
            seconds = each.get("judge_seconds", {})
            if arm.attacks == JUDGED:  # sweeps are judged on half as many images
                whole += [(2 if arm.tuning else 1) * seconds[which] for which in ("last", "best") if which in seconds]
            auto += [(each.get("started", ""), seconds["autoattack"])] if "autoattack" in seconds else []
        # The latest one: the first arms had theirs in fp32, the others in TF32.
        return cls(paces, max(whole, default=EVALUATION), max(auto, default=("", AUTOATTACK))[1])

    def of(self, arm: Arm) -> float:
        """Seconds that an arm takes, its evaluation included."""
        host, train, awp, batch = arm.kind
        pace = self.paces.get(arm.kind)
        if pace is None:
            pace = PACE[host] * (TRAIN_SHARE[host] if train else 1) * (AWP_SHARE if awp else 1)
            pace *= SMALL_BATCH_SHARE if batch < 512 else 1
        if not arm.attacks:
            return ARM_START + arm.epochs * pace + (20 if train else 0)
        validations = arm.epochs / int(arm.settings.get("validation.every", 1))
        judged = self.evaluation * (0.5 if arm.tuning else 1) * (0.25 if "apgd" not in arm.attacks else 1)
        judged *= 2 if arm.both else 1
        final = self.autoattack * len(arm.final) * (2 if arm.final_of_both else 1)
        return ARM_START + arm.epochs * pace + VALIDATION * validations + judged + final


@dataclass(frozen=True)
class Job:
    """An arm of a part with a seed, and its seconds on paper."""

    arm: Arm
    seed: int
    seconds: float
    part: str

    @property
    def name(self) -> str:
        return f"{self.arm.name}-{self.seed}"

    @property
    def standard(self) -> str | None:
        """The name of the standard model that it needs."""
        needed = self.arm.reference and self.arm.attacks
        return f"{standard(tuning=self.arm.tuning).name}-{self.seed}" if needed else None


def leases(jobs: Sequence[Job], seconds: float) -> Iterator[list[Job]]:
    """Jobs packed first-fit, in order, into leases of so many seconds; what fits none stands alone."""
    left = list(jobs)
    while left:
        taken: list[Job] = []
        for job in left:
            if cost([*taken, job]) <= seconds or not taken:
                taken.append(job)
        yield taken
        left = [job for job in left if job not in taken]


def cost(jobs: Sequence[Job]) -> float:
    """Seconds of a lease that does these jobs: its start, the standard models that they need, and themselves."""
    standards = {job.standard for job in jobs} - {None}
    return LEASE_START + STANDARD * len(standards) + sum(job.seconds for job in jobs)


def next_job(
    left: Sequence[Job], barred: Collection[str], there: Collection[str], seconds: float, *, first: bool
) -> Job | None:
    """The first arm that one of several GPUs may begin and would end within so many seconds.

    Args:
        left: all arms without their figures, those that are at work included.
        barred: names of those at work, or not for this GPU.
        there: see `seconds_on`.
        first: of the GPUs, on which all speeds are measured: two differ by as much as TRAIN may cost.
    """
    stage = min((STAGES[job.part] for job in left if job.part in STAGES), default=0)
    for job in left:
        waits = STAGES.get(job.part, 0) > stage or (job.part == "speed" and not first)
        if not waits and job.name not in barred and seconds_on(job, there) <= seconds:
            return job
    return None


def seconds_on(job: Job, there: Collection[str] = ()) -> float:
    """Seconds of an arm in a process of its own on a GPU for which the runs `there` have been trained."""
    return WORKER_START + job.seconds + (STANDARD if job.standard is not None and job.standard not in there else 0)


def shared_leases(jobs: Sequence[Job], seconds: float, gpus: int) -> Iterator[tuple[list[list[Job]], float]]:
    """The leases of several GPUs: the jobs of each GPU, and the seconds of the whole; what fits none stands alone."""
    left = list(jobs)
    while left:
        lanes, length = _lease(left, seconds, gpus)
        if not length:
            first = [job for lane in _lease(left, math.inf, gpus)[0] for job in lane[:1]]
            lanes, length = [[job] for job in first], LEASE_START + max(map(seconds_on, first))
        yield lanes, length
        left = [job for job in left if not any(job in lane for lane in lanes)]


def _lease(left: Sequence[Job], seconds: float, gpus: int) -> tuple[list[list[Job]], float]:
    """What `study_gpus.run_on` would do in one lease: the jobs of each GPU, and when the last one ends."""
    lanes: list[list[Job]] = [[] for _ in range(gpus)]
    free = [LEASE_START] * gpus  # when each GPU takes its next job
    ends: dict[str, float] = {}
    while min(free) < math.inf:
        gpu = free.index(min(free))
        now = free[gpu]
        there = {name for job in lanes[gpu] for name in (job.name, job.standard) if name is not None}
        unfinished = [job for job in left if ends.get(job.name, math.inf) > now]
        job = next_job(unfinished, ends, there, seconds - now, first=gpu == 0)
        if job is None:  # there may be one when another GPU ends its own
            free[gpu] = min((end for end in ends.values() if end > now), default=math.inf)
        else:
            lanes[gpu].append(job)
            free[gpu] = ends[job.name] = now + seconds_on(job, there)
    return lanes, max(ends.values(), default=0.0)


def plan(jobs: Sequence[Job], minutes: float, gpus: int = 1) -> str:
    """The leases that are left, as text."""
    lines, total = [f"{len(jobs)} arms are left"], 0.0
    seconds = 60 * minutes
    packed = (
        shared_leases(jobs, seconds, gpus) if gpus > 1 else (([each], cost(each)) for each in leases(jobs, seconds))
    )
    for number, (lanes, length) in enumerate(packed, start=1):
        warning = f"  DOES NOT FIT {minutes:g} min" if length > seconds else ""
        lines.append(f"lease {number}: {length / 60:.1f} min{warning}")
        for gpu, lane in enumerate(lanes):
            lines += [f"  gpu{gpu}"] if gpus > 1 and lane else []
            lines += [f"    {job.name}: {job.seconds / 60:.1f} min" for job in lane]
        total += length / 60
    return "\n".join([*lines, f"in all {total:.0f} min"])
