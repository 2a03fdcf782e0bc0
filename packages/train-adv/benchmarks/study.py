"""The study on CIFAR-10 (ResNet-18, Linf 8/255), cut into leases of a bare GPU machine.

    python packages/train-adv/benchmarks/study.py plan   [PART ...] --out OUT
    python packages/train-adv/benchmarks/study.py run    [PART ...] --out OUT --work WORK --data-dir DATA
    python packages/train-adv/benchmarks/study.py report --out OUT --to packages/train-adv/results/study.json
    python packages/train-adv/benchmarks/study.py restore --out OUT --to packages/train-adv/results/study.json

Parts (all of them where none is named; `plan` prints the leases that are left, with minutes):

    speed       seconds an epoch at batch 512 and 128, with and without TRAIN
    standard    the standard models
    rate        AT and TRADES at three learning rates, 15 epochs, seed 0
    lambda      AT and TRADES + TRAIN, lambda in powers of 3, two kernels, 15 epochs, seed 0
    beta        TRADES at beta 1, 2, 3, 9: with rate's 6 the host's own frontier, 15 epochs, seed 0
    joint       TRADES + TRAIN at the chosen beta, lambda in powers of 3, 15 epochs, seed 0
    inputs      TRADES and AT + TRAIN with the features of adversarial inputs or of both, 15 epochs, seed 0; some of
                these for TRADES at beta 2 and 6 as well
    main        {at, trades, mart} x {alone, + TRAIN} and the control, 30 epochs, for each seed
    customary   TRADES at beta 6, alone and + TRAIN as chosen at that beta, for each seed
    careful     AT + TRAIN as chosen where it may cost no APGD accuracy at all, for each seed
    epsilons    AT at training epsilons 0, 2, 4, 8 /255, 15 epochs, topology metrics of each epoch
    everything  AWP + TRAIN + EMA, 100 epochs at the rate of `long`, AT and TRADES
    long        100 epochs at rate 0.1, as 15 favour large rates; --only one pair
    multistep   the same with the rate cut at a half and three quarters: AT, with AWP (0.01; 0.005 after ten epochs),
                with random erasing, each alone and + TRAIN (as in `careful`)
    edges       settings beyond the sweeps' edges, and AT without averaging: looked at, never chosen

No setting is chosen on test images (that `inputs` was swept and that there is `careful` is owed to some of them). The
sweeps (`rate` to `inputs`, and `edges`) train without a tenth of the training images, the same 5,000 for every arm,
fixed by a seed of its own and stratified, and are judged on these alone; so is their standard model. The other parts
take rate, beta and TRAIN's settings by the rules of `study_results.choose` from those figures (`--at`, `--trades`
override them), are trained on all training images but their 2 % for validation, and are judged on the test images.

`run` starts no arm that would not end within --minutes of the lease, which begins with the first `run` on a machine
(WORK/lease.json). A call that was cut off is simply repeated: arms go on from their last epoch, evaluations from their
last chunk, and arms that have their JSON are skipped. Later leases need OUT alone, some 100 kB an arm, which `restore`
fills from what was published (`report --to` does so too): the standard model is trained again in under a minute, by its
seed. Each JSON has its hash: arms of one seed have standard models that differ by rounding, where their machines
compiled them anew.

With several GPUs (all that torch sees, or --gpus N) `run` keeps a process on each, at one arm with one seed at a time.
Each GPU has runs and logs of its own below WORK/gpu0, WORK/gpu1, ...; an arm that was cut off goes on where its run is.
A sweep waits until no arm is left of those that it is chosen from, where they are asked for; the parts below wait for
all sweeps.
An arm that fails leaves the others alone; the exit code is then 1. The processes end with the one that began them.

Every lease is the same call on a fresh machine; AWP over 100 epochs wants --minutes 28. Where a command may not last so
long, start it in the background, as what is cut off is compiled and recorded anew. OUT is many files: pack it. An arm
that is cut off goes on from its last epoch if WORK/gpu* is brought along, to the same place and without
WORK/lease.json.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import json
import statistics
import sys
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from study_arms import (
    BETA,
    PARTS,
    SEEDED,
    Arm,
    Choice,
    Costs,
    Job,
    cost,
    is_done,
    parts,
    plan,
    read_results,
    seconds_on,
)
from study_arms import standard as standard_arm
from study_gpus import end_with_parent, run_on
from study_results import (
    LONG,
    choose,
    line,
    pack,
    plot_frontier,
    plot_long,
    plot_topology,
    publishable,
    report,
    restore,
)

from expkit.checkpoint import load_tensors, write_json
from expkit.config import flatten, load_config
from expkit.device import resolve_device, visible_gpus
from expkit.distributed import World
from expkit.errors import UsageError
from expkit.metrics import read_metrics
from expkit.rundir import evidence
from train_adv.data.dataset import DataSet, hold_out
from train_adv.evaluation.evaluate import Settings, evaluate, row
from train_adv.training.config import TrainConfig
from train_adv.training.given import Given, read_data
from train_adv.training.run import Outcome, train
from train_adv.training.trainer import Diverged

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ALONE = World(0, 1, 0)
EPSILON = 8 / 255
TUNING_SEED, TUNING_SHARE = 20231, 0.1  # of the split that all is chosen on: never the runs' seeds


def main() -> int:
    arguments = parse()
    if arguments.end is not None:
        end_with_parent()
    before = None
    if arguments.action in ("report", "restore") and arguments.to is not None and arguments.to.is_file():
        before = json.loads(arguments.to.read_text(encoding="utf-8"))
        written = restore(before, arguments.out)  # for `report` too: what was published stays
    results = read_results(arguments.out)
    try:
        if arguments.action == "restore":
            print(f"{len(written)} files written")
        elif arguments.action == "report":
            print(report(results))
            if arguments.to is not None:
                write_json(arguments.to, publishable(results, before))
                plot_frontier(results, arguments.to.with_name(f"{arguments.to.stem}-frontier.png"))
                if any(each["arm"].startswith(LONG) for each in results):
                    plot_long(results, arguments.to.with_name(f"{arguments.to.stem}-long.png"))
                if any(each["arm"].startswith("epsilon-") for each in results):
                    plot_topology(results, arguments.to.with_name(f"{arguments.to.stem}-topology.png"))
        elif arguments.action == "plan":
            left = jobs(arguments, results)
            print(plan(left, arguments.minutes, arguments.gpus))
            if lost := unpaired(left, results):
                print(f"the hosts' answers are gone, so that these give no paired difference: {', '.join(lost)}")
        elif arguments.gpus > 1:
            return run_on_gpus(arguments)
        else:
            run(arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("plan", "run", "report", "restore"))
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--work", type=Path, default=Path("work"), help="runs; lost with the machine")
    parser.add_argument("--out", type=Path, default=Path("out"), help="JSON files, to be kept and brought along")
    parser.add_argument("--data-dir", type=Path, help="folder of cifar-10-batches-py")
    parser.add_argument("--seeds", type=lambda text: [int(each) for each in text.split(",")], default=[0, 1],
                        help=f"of {', '.join(SEEDED)}; all else has the first")  # fmt: skip
    parser.add_argument("--only", type=lambda text: text.split(","), help="only these arms")
    parser.add_argument("--minutes", type=float, default=24.0, help="length of a lease")
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()),
                        help="how many to use, an arm at a time on each; default: all that torch sees")  # fmt: skip
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)  # of the lease, for the processes of its GPUs
    parser.add_argument("--at", type=_choice, help="RATE:KERNEL:LAMBDA for AT and MART, instead of the sweeps'")
    parser.add_argument("--trades", type=_choice, help="RATE:KERNEL:LAMBDA:BETA for TRADES, instead of the sweeps'")
    parser.add_argument(
        "--to",
        type=Path,
        help="with `report`: all arms in one file to publish, and its pictures; with `restore`: that file",
    )
    parser.add_argument("--limit", type=int, default=0, help="judged images (0: all), to try the script out")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key, for every arm")
    arguments = parser.parse_args()
    if arguments.gpus < 1:
        parser.error(f"--gpus {arguments.gpus}: at least 1 is needed")
    if arguments.action == "restore" and (arguments.to is None or not arguments.to.is_file()):
        parser.error("restore: --to names the published file that is read")
    for part in arguments.parts:
        if part not in PARTS:
            parser.error(f"unknown part {part!r}; use some of {', '.join(PARTS)}")
    return arguments


def _choice(text: str) -> Choice:
    rate, kernel, weight, *beta = text.split(":")
    return Choice(float(rate), kernel, float(weight), *map(float, beta))


def jobs(arguments: argparse.Namespace, results: list[dict[str, Any]]) -> list[Job]:
    """What is left, in order, with its seconds on paper."""
    arms = parts(
        arguments.at or choose(results, "at"),
        arguments.trades or choose(results, "trades"),
        choose(results, "trades", beta=BETA),
        choose(results, "at", tolerance=0.0),
    )
    costs = Costs.measured(results, [arm for part in arms.values() for arm in part])
    found = []
    for part in arguments.parts or PARTS:
        for seed in arguments.seeds if part in SEEDED else arguments.seeds[:1]:
            for arm in arms[part]:
                if (not arguments.only or arm.name in arguments.only) and not is_done(arguments.out, arm, seed):
                    found.append(Job(arm, seed, costs.of(arm), part))
    return found


def unpaired(left: list[Job], results: list[dict[str, Any]]) -> list[str]:
    """Arms with TRAIN whose host has its figures, but no answers image by image any more: other --seeds have both."""
    lost = {(each["arm"], each["training"]["seed"]) for each in results if each["complete"] and not each["answers"]}
    return [
        job.name for job in left if "+train" in job.arm.name and (job.arm.name.partition("+train")[0], job.seed) in lost
    ]


def run(arguments: argparse.Namespace) -> None:
    """Arms in order, as long as they fit into what is left of the lease."""
    left = jobs(arguments, read_results(arguments.out))
    require_libraries(left)
    end = lease_end(arguments)
    print(plan(left, arguments.minutes), flush=True)
    while left:
        # What follows may depend on figures that have come meanwhile: lambda, and seconds an epoch. A process of one of
        # several GPUs was begun because its arm fits.
        there = {path.parent.name for path in arguments.work.glob("*/result.json")}
        fitting = [job for job in left if arguments.end is not None or time.time() + seconds_on(job, there) <= end]
        if not fitting:
            print(f"time is up with {len(left)} arms left, {cost(left) / 60:.0f} min: bring OUT to the next lease")
            break
        job = fitting[0]
        if job.arm.reference and job.arm.attacks:
            train_arm(standard_arm(tuning=job.arm.tuning), job.seed, arguments)
        run_arm(job.arm, job.seed, arguments)
        left = jobs(arguments, read_results(arguments.out))
    print(report(read_results(arguments.out)))


def run_on_gpus(arguments: argparse.Namespace) -> int:
    """The same on several GPUs; this process trains nothing itself."""

    def read_left() -> list[Job]:
        return jobs(arguments, read_results(arguments.out))

    ids = visible_gpus(arguments.gpus)
    require_libraries(read_left())
    end = lease_end(arguments)
    print(plan(read_left(), arguments.minutes, arguments.gpus), flush=True)
    failed = run_on(ids, [sys.executable, *sys.argv], arguments.work, end, read_left)
    left = read_left()
    if left:
        print(
            f"{len(left)} arms are left, {len(failed)} of them failed: repeat the call, or bring OUT to the next lease"
        )
    print(report(read_results(arguments.out)))
    return 1 if failed else 0


def lease_end(arguments: argparse.Namespace) -> float:
    """In seconds since the epoch; the lease begins with the first call on a machine."""
    if arguments.end is not None:
        return float(arguments.end)
    clock = arguments.work / "lease.json"
    if not clock.is_file():
        write_json(clock, {"began": time.time()})
    return float(json.loads(clock.read_text())["began"] + 60 * arguments.minutes)


def require_libraries(left: list[Job]) -> None:
    """A machine without network that lacks one should say so before minutes are spent."""
    needed = ["sklearn", "scipy"]
    needed += ["pyautoattack"] if any("autoattack" in job.arm.final for job in left) else []
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        raise UsageError(f"this Python lacks {', '.join(absent)}, which the study needs: put them on PYTHONPATH")


def tuning_split(data: DataSet) -> DataSet:
    """Training data without a tenth of them, which take the place of the test images."""
    rest, held = hold_out(data.train, TUNING_SHARE, TUNING_SEED)
    return replace(data, name=f"{data.name}-tuning", train=rest, test=held)


def train_arm(arm: Arm, seed: int, arguments: argparse.Namespace) -> tuple[TrainConfig, DataSet, Outcome]:
    """Train an arm, or go on with it, or read what it came to."""
    torch._dynamo.reset()  # or the limit of compiled variants of one function is reached, and all is eager
    gc.collect()
    torch.cuda.empty_cache()
    name = f"{arm.name}-{seed}"
    flags: dict[str, Any] = {"name": name, "seed": seed, "data.dir": arguments.data_dir, "validation.test": False}
    if arm.reference and arm.attacks:
        path = arguments.work / f"{standard_arm(tuning=arm.tuning).name}-{seed}"
        flags |= {"topology.metrics": True, "topology.path": path}
    flags |= arm.settings
    for text in arguments.set:
        key, _, value = text.partition("=")
        flags[key] = json.loads(value)
    config = load_config(TrainConfig, CONFIGS / arm.base, flags)
    data = read_data(config.data)
    if arm.tuning:
        data = tuning_split(data)
    resume = (arguments.work / name / "config.toml").is_file()
    print(f"--- {name}", flush=True)
    return config, data, train(config, arguments.work, ALONE, resume=resume, given=Given(data=data))


def run_arm(arm: Arm, seed: int, arguments: argparse.Namespace) -> None:
    """Train, judge the last checkpoint and, where it is another one, the best; the JSON is written after each."""
    record = evidence(seed)
    name = f"{arm.name}-{seed}"
    try:
        config, data, outcome = train_arm(arm, seed, arguments)
    except Diverged as error:  # it would do so again: nothing waits for it
        nothing = {"seconds_per_epoch_after_the_first": None, "evaluation": {}, "answers": {}}
        told = {"arm": arm.name, "training": {"seed": seed}, "failed": str(error), **nothing, "complete": True}
        write_json(arguments.out / f"{name}.json", {**told, **record})
        print(line(told), flush=True)
        return
    lines = read_metrics(outcome.folder / "metrics.jsonl")
    seconds = [now["seconds"] - before["seconds"] for before, now in pairwise(lines)]
    found: dict[str, Any] = {
        "arm": arm.name,
        "judged_on": f"{min(arguments.limit or len(data.test), len(data.test))} "
        + ("held-out training images" if arm.tuning else "test images"),
        "tuning_split": {"seed": TUNING_SEED, "share": TUNING_SHARE} if arm.tuning else None,
        "reference": _hash(config.topology.path),
        "config": flatten(json.loads(json.dumps(asdict(config.resolved()), default=str))),
        "training": outcome.result,
        # of the epochs after the first; the median, as the first one after a cut compiles too
        "seconds_per_epoch_after_the_first": statistics.median(seconds) if seconds else None,
        "epochs": lines,
        "evaluation": {},
        "answers": {},
        "judge_seconds": {},
        "complete": False,
    }
    wanted = [("last", arm.attacks), ("last", arm.final)]
    if arm.both and outcome.result["best"]["epoch"] != outcome.result["last"]["epoch"]:
        wanted += [("best", arm.attacks), *([("best", arm.final)] if arm.final_of_both else [])]
    for which, attacks in wanted:
        if attacks:
            begun = time.monotonic()
            answers = judge(outcome.folder / f"{which}.safetensors", data, attacks, seed, arguments.limit)
            clock = "autoattack" if "autoattack" in attacks else which
            found["judge_seconds"][clock] = time.monotonic() - begun
            found["evaluation"].setdefault(which, {}).update(row(name, answers, data)["attacks"])
            found["answers"].setdefault(which, {}).update({each: pack(right) for each, right in answers.items()})
            write_json(arguments.out / f"{name}.json", {**found, **record})
    write_json(arguments.out / f"{name}.json", {**found, **record, "complete": True})
    print(line(found), flush=True)


def judge(path: Path, data: DataSet, attacks: tuple[str, ...], seed: int, limit: int) -> dict[str, torch.Tensor]:
    """Attacks in TF32, on compiled models and CUDA graphs but for AutoAttack, which is its authors' code."""
    torch._dynamo.reset()
    gc.collect()  # graphs of the training, before others are recorded
    device = resolve_device("auto")
    compiled = device.type == "cuda" and "autoattack" not in attacks
    few = min(limit or 1000, 1000)
    settings = Settings(
        EPSILON, size=500, limit=limit, autoattack_limit=few, precision="tf32", compiled=compiled, seed=seed
    )
    return evaluate(path, data, attacks, settings, device=device)


def _hash(reference: Path | None) -> str | None:
    """Of the standard model's weights: the same in every lease where the compiler times no kernels.

    Not of the file: safetensors writes the metadata in an order that differs from process to process.
    """
    path = reference / "best.safetensors" if reference is not None else None
    if path is None or not path.is_file():
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(load_tensors(path).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
