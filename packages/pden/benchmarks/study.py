"""The study, on all GPUs of a machine, in leases of about 24 minutes on machines that are bare at their start.

    python packages/pden/benchmarks/study.py plan --out OUT
    python packages/pden/benchmarks/study.py next --data-dir DATA --work WORK --out OUT --minutes 9
    python packages/pden/benchmarks/study.py report --out OUT --to packages/pden/results

`plan` prints what is left, cut into leases, with estimates. `next` does the first of these leases, several trainings
side by side; where one command may not run for long, repeat it on the same machine: trainings go on from their
checkpoints in WORK, which is large and stays there. OUT is small (figures and pictures, a few MiB in all), and all
that a later lease needs: what has its figures there is not run again.

Trainings are spread over `--gpus` GPUs (all that are visible), `--side` of them on each; `speed` and `alone` take one
GPU, as they measure it. With 4 GPUs and 24 minutes of work in a lease the whole study is foreseen to take three leases,
of this command each (or of it with `--minutes 9`, repeated, where a command may not run for longer than 10 minutes):

    python packages/pden/benchmarks/study.py next --gpus 4 --lease 24 --minutes 24 --data-dir DATA --work WORK --out OUT

Parts, in order: `speed` (milliseconds a step of the digits methods, alone and side by side, which later plans use),
`alone` (one full run by itself: minutes and memory), `choice` (settings of PDEN on seeds of their own, no target
loaded), `paper` and `ours` (PDEN on digits, 5 seeds each), `baselines` (ERM, RandConv, ME-ADA, AugMix, 5 seeds each),
`ablation` (each loss left out, each kind of generator, K = 10, 2 seeds; it decides nothing), `cifar` (CIFAR-10 to
recomputed CIFAR-10-C, level 5, with the paper's losses). `run PART` does one of them.

`ours` is what `choice` comes to by a rule that reads held-out source images in disguise alone (`study_jobs.choose`).
It is written to OUT/chosen.json when the last training of `choice` is done, and `ours` does not start before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from expkit.checkpoint import write_json, write_text
from expkit.device import visible_gpus
from expkit.rundir import evidence
from pden.evaluation import table
from pden.evaluation.chart import save_bars

sys.path.insert(0, str(Path(__file__).resolve().parent))
from study_jobs import PARTS, Job, choose, jobs_of, leases, speeds

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def result_of(job: Job, out: Path) -> Path:
    """Where the figures of a training lie once it is done."""
    return out / job.part / job.name / "result.json"


def waiting(out: Path) -> dict[str, list[Job]]:
    """What has no figures yet, by part."""
    found = {}
    for part in PARTS:
        if part == "speed" and (out / "speed.json").is_file():
            continue
        found[part] = [job for job in jobs_of(part, chosen(out)) if not result_of(job, out).is_file()]
    return {part: jobs for part, jobs in found.items() if jobs}


def chosen(out: Path) -> list[str]:
    """The settings of `ours`; none before they are chosen."""
    file = out / "chosen.json"
    return list(json.loads(file.read_text(encoding="utf-8"))["settings"]) if file.is_file() else []


def plan(arguments: argparse.Namespace) -> int:
    """Print the leases that are left."""
    speed = speeds(arguments.out)
    measured = "measured" if (arguments.out / "speed.json").is_file() else "foreseen, none measured yet"
    gpus = f"{arguments.side} side by side on each GPU, GPUs: {arguments.gpus}"
    print(f"speeds: {measured}; {gpus}; leases of {arguments.lease:g} minutes of work")
    todo = leases(waiting(arguments.out), speed, arguments.side, arguments.lease, arguments.gpus)
    for number, lease in enumerate(todo, start=1):
        print(f"lease {number}: {sum(each for _, each in lease):.0f} minutes")
        for jobs, estimate in lease:
            print(f"  {estimate:5.1f}  {jobs[0].part}: {', '.join(job.name for job in jobs)}")
    total = sum(each for lease in todo for _, each in lease)
    print(f"{len(todo)} leases, {total:.0f} minutes" if todo else "nothing is left; see `report`")
    return 0


def command(job: Job, arguments: argparse.Namespace) -> list[str]:
    """The training as a process of its own."""
    runs = arguments.work / job.part
    words: list[object] = [sys.executable, "-m", "pden", "train", "--config", CONFIGS / f"{job.config}.toml"]
    words += ["--name", job.name, "--seed", job.seed, "--runs", runs, "--data-dir", arguments.data_dir, *job.flags]
    for setting in arguments.set or []:
        words += ["--set", setting]
    return [str(each) for each in words] + (["--resume"] if (runs / job.name / "config.toml").is_file() else [])


def train(jobs: Sequence[Job], arguments: argparse.Namespace, side: int, gpus: int, deadline: float) -> int:
    """Trainings, `side` at a time on each GPU, until they are done or time is over; the number that are not done."""
    open_jobs = [job for job in jobs if not result_of(job, arguments.out).is_file()]
    running: list[tuple[Job, str, subprocess.Popen[bytes]]] = []
    undone = 0
    visible = visible_gpus(gpus)
    try:
        while (open_jobs or running) and time.monotonic() < deadline:
            while open_jobs and len(running) < side * len(visible):
                job = open_jobs.pop(0)
                gpu = min(visible, key=[used for _, used, _ in running].count)
                environment = {**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": gpu}
                (arguments.work / job.part).mkdir(parents=True, exist_ok=True)
                with (arguments.work / job.part / f"{job.name}.log").open("ab") as log:
                    process = subprocess.Popen(command(job, arguments), stdout=log, stderr=log, env=environment)
                running.append((job, gpu, process))
            for job, gpu, process in [each for each in running if each[2].poll() is not None]:
                running.remove((job, gpu, process))
                undone += not collect(job, process.returncode, arguments)
            time.sleep(0.2)
    finally:
        for _, _, process in running:  # all before the first wait: each takes a moment to leave its GPU
            process.terminate()
        for job, _, process in running:
            process.wait()
            print(f"{job.part}, {job.name}: stopped, time is over; repeat the command on this machine", flush=True)
    return undone + len(open_jobs) + len(running)


def collect(job: Job, code: int, arguments: argparse.Namespace) -> bool:
    """Keep what is small of a training that has ended; whether it went well."""
    run = arguments.work / job.part / job.name
    if code:
        log = (run.parent / f"{job.name}.log").read_text(encoding="utf-8")
        print(f"{job.part}, {job.name}: exit code {code}\n{log[-1500:]}", flush=True)
        return False
    out = result_of(job, arguments.out).parent
    out.mkdir(parents=True, exist_ok=True)
    pictures = ("curve.png", "gallery.png") if job.seed in (0, 100) else ()  # of one seed: OUT is to be small
    for name in (*pictures, "result.json"):  # the last one says that all are there
        if (run / name).is_file():
            shutil.copyfile(run / name, out / name)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    print(f"{job.part}, {job.name}: done", flush=True)
    return True


def do(jobs: Sequence[Job], arguments: argparse.Namespace, deadline: float) -> int:
    """Trainings of one part and what follows from them; the number that are not done."""
    part = jobs[0].part
    if part == "ours" and not (arguments.out / "chosen.json").is_file():
        print("ours: nothing is chosen yet; finish the part choice", flush=True)
        return len(jobs)
    if part == "speed":
        return measure_speed(jobs, arguments, deadline)
    side, gpus = (1, 1) if part == "alone" else (arguments.side, arguments.gpus)
    undone = train(jobs, arguments, side, gpus, deadline)
    if part == "choice" and not any(not result_of(job, arguments.out).is_file() for job in jobs_of(part)):
        results = [json.loads(result_of(job, arguments.out).read_text(encoding="utf-8")) for job in jobs_of(part)]
        found = choose(results)
        write_json(arguments.out / "chosen.json", {**evidence(), **found})
        print(f"chosen: {found['chosen']} ({100 * found['means'][found['chosen']]:.2f} % in disguise)", flush=True)
    return undone


def measure_speed(jobs: Sequence[Job], arguments: argparse.Namespace, deadline: float) -> int:
    """Short trainings of every kind on one GPU, alone and then side by side, into OUT/speed.json."""
    from dataclasses import replace

    record, kinds = evidence(), {}
    for job in jobs:
        one = replace(job, label=f"{job.label}-alone")
        many = [replace(job, label=f"{job.label}-shared", seed=seed) for seed in range(arguments.side)]
        if train([one], arguments, 1, 1, deadline) or train(many, arguments, arguments.side, 1, deadline):
            return 1
        times = [_milliseconds(each, arguments.out) for each in (one, *many)]
        shared = sum(times[1:]) / len(times[1:]) / arguments.side
        kinds[job.kind] = {"alone": times[0], "shared": shared}
        print(f"{job.kind}: {times[0]:.2f} ms a step alone, {shared:.2f} ms of the GPU", flush=True)
    write_json(arguments.out / "speed.json", {**record, "side": arguments.side, "kinds": kinds})
    return 0


def _milliseconds(job: Job, out: Path) -> float:
    found: float = json.loads(result_of(job, out).read_text(encoding="utf-8"))["steps_per_second"]
    return 1000 / found


def proceed(arguments: argparse.Namespace) -> int:
    """`next`: the first lease of the plan; `run`: one part. The exit code is 1 while something is left of it."""
    deadline = time.monotonic() + 60 * arguments.minutes
    todo = waiting(arguments.out)
    if arguments.action == "run":
        batches = [todo.get(arguments.part, [])]
    else:
        plan(arguments)
        cut = leases(todo, speeds(arguments.out), arguments.side, arguments.lease, arguments.gpus)
        batches = [jobs for jobs, _ in cut[0]] if cut else []
    undone = 0
    for jobs in batches:
        if jobs and jobs[0].part == "ours":  # the choice may have been made a moment ago
            names = {job.name for job in jobs}
            jobs = [job for job in jobs_of("ours", chosen(arguments.out)) if job.name in names]
        undone += do(jobs, arguments, deadline) if jobs else 0
    print(f"{undone} trainings are left of this lease" if undone else "done", flush=True)
    return int(undone > 0)


def report(arguments: argparse.Namespace) -> int:
    """One JSON file for each part that has figures; where it has targets, a table and a chart too."""
    record = evidence()
    for part in PARTS:
        files = sorted((arguments.out / part).glob("*/result.json"))
        runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        if not runs or part == "speed":
            continue
        found: dict[str, Any] = {**record, "runs": [trimmed(each) for each in runs]}
        if all("targets" in each["selections"]["last"] for each in runs):
            found["selections"] = summaries(part, runs, arguments.to)
        write_json(arguments.to / f"{part}.json", found)
    for name in ("speed.json", "chosen.json"):
        if (arguments.out / name).is_file():
            shutil.copyfile(arguments.out / name, arguments.to / name)
    return 0


def summaries(part: str, runs: Sequence[dict[str, Any]], to: Path) -> dict[str, Any]:
    """Means and spreads of a part by selection; the last weights' also as table and chart."""
    selections: dict[str, Any] = {}
    groups = table.group(runs)
    for selection in ("last", "averaged", "source-validation", "oracle"):
        having = {
            label: each
            for label, each in groups.items()
            if all("targets" in one["selections"].get(selection, {}) for one in each)
        }
        rows = table.summarise(having, selection) if having else {}
        selections[selection] = {
            label: {name: {"mean": mean, "std": std} for name, (mean, std) in row.items()}
            for label, row in rows.items()
        }
        if selection == "last":
            print(f"{part}, last checkpoint\n\n{table.markdown(rows)}")
            save_bars(rows, to / f"{part}.png", title=f"{part}: last checkpoint")
            write_text(to / f"{part}.md", table.markdown(rows))
    return selections


def trimmed(result: dict[str, Any]) -> dict[str, Any]:
    """What a figure needs beside it, and the curve over rounds."""
    keys = ("name", "method", "command", "seed", "versions", "hardware", "git", "started", "domains", "selections")
    more = ("history", "reports", "notes", "steps", "seconds", "gate_share", "peak_memory_bytes", "config")
    return {key: result[key] for key in (*keys, *more)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    for action in ("plan", "next", "run", "report"):
        one = actions.add_parser(action)
        one.add_argument("--out", type=Path, required=True, help="small folder that later leases need")
        if action == "report":
            one.add_argument("--to", type=Path, required=True, help="folder for JSON, tables and charts")
            continue
        one.add_argument("--side", type=int, default=5, help="trainings side by side on a GPU")
        one.add_argument("--gpus", type=int, help="over how many GPUs; all that are visible, if not given")
        one.add_argument("--lease", type=float, default=19.0, help="minutes of work in a lease")
        if action == "plan":
            continue
        if action == "run":
            one.add_argument("part", choices=PARTS)
        one.add_argument("--work", type=Path, required=True, help="large folder of runs, on the machine")
        one.add_argument("--data-dir", type=Path, required=True, help="where the data sets are")
        one.add_argument("--minutes", type=float, default=19.0, help="stop what runs after this time")
        one.add_argument("--set", action="append", metavar="KEY=VALUE", help="over every config, for a trial")
    arguments = parser.parse_args()
    if arguments.action != "report":
        seen = torch.cuda.device_count()
        if arguments.gpus is None:
            arguments.gpus = max(1, seen)
        if arguments.gpus < 1 or (arguments.action != "plan" and arguments.gpus > max(1, seen)):
            parser.error(f"--gpus {arguments.gpus}: {seen} are visible; give 1 to {max(1, seen)}; `plan` takes more")
    return {"plan": plan, "report": report}.get(arguments.action, proceed)(arguments)


if __name__ == "__main__":
    sys.exit(main())
