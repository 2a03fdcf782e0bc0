"""Run the study on one GPU: seeds and variants as parallel processes, in parts that fit a lease of about 25 minutes.

    python packages/pden/benchmarks/study.py baselines --data-dir DATA --work WORK --out OUT
    python packages/pden/benchmarks/study.py report --work WORK --out packages/pden/results

Parts: `baselines` (ERM, RandConv, ME-ADA, AugMix on digits, 5 seeds each), `paper` and `ours` (PDEN on digits, 5 seeds
each), `ablation` (each loss left out, and each kind of generator, K = 10, 2 seeds), `cifar` (CIFAR-10 to recomputed
CIFAR-10-C, level 5), `speed` (one run alone: minutes and memory). A run that has finished is not run again; one that
was cut off goes on from its checkpoint. `report` reads all finished runs below WORK and writes one JSON file and
one table for each part.

Where one command may not run for long, give `--minutes 9` and repeat it: runs go on from their checkpoints in WORK.

Durations foreseen for an H200, from kernel counts, before any was measured: a digits step of PDEN is 6 ms while the
generator learns and 3 ms after, so 65,000 steps alone take 5 minutes, and five at once 10 to 12; ERM 1.5 minutes,
RandConv 2, ME-ADA 2, AugMix 10 (five at once 15); an ablation of 35,500 steps 3 minutes alone, and all 22 of them,
seven at once, 22 minutes; CIFAR-10 10 to 15 minutes each, three at once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from expkit.checkpoint import write_json, write_text
from expkit.rundir import evidence
from pden.evaluation import table
from pden.evaluation.chart import save_bars

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True)
class Job:
    """One training: a config, flags over it, and a seed."""

    part: str
    label: str
    config: str
    seed: int
    flags: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        return f"{self.label}-seed{self.seed}"


ABLATIONS: dict[str, tuple[str, ...]] = {
    "full": (),
    "no-safety": ("--set", "loss.safety=0.0"),
    "no-diversity": ("--set", "loss.diversity=0.0"),
    "no-cycle": ("--set", "loss.cycle=0.0"),
    "no-adversarial": ("--set", "loss.adversarial=0.0"),
    "adversarial-1": ("--set", "loss.adversarial=1.0"),
    "no-contrast": ("--set", "loss.contrast=none"),
    "supervised": ("--set", "loss.contrast=supervised"),
    "barlow": ("--set", "loss.contrast=barlow", "--set", "loss.contrast_weight=0.02"),
    "geometric": ("--set", 'generator.kinds=["geometric"]'),
    "composite": ("--set", 'generator.kinds=["composite"]'),
}


def jobs_of(part: str) -> list[Job]:
    """All trainings of a part, the longest first."""
    if part == "baselines":
        methods = ("augmix", "randconv", "me-ada", "erm")
        return [Job(part, each, "digits-baseline", seed, ("--method", each)) for each in methods for seed in range(5)]
    if part in ("paper", "ours"):
        return [Job(part, f"pden-{part}", f"digits-{part}", seed) for seed in range(5)]
    if part == "ablation":
        return [
            Job(part, label, "digits-paper", seed, ("--rounds", "10", *flags))
            for label, flags in ABLATIONS.items()
            for seed in range(2)
        ]
    if part == "cifar":
        return [Job(part, each, "cifar10", 0, ("--method", each)) for each in ("augmix", "pden", "erm")]
    return [Job(part, "pden-alone", "digits-paper", 0)]


def command(job: Job, arguments: argparse.Namespace) -> list[str]:
    """The training as a process of its own."""
    runs = arguments.work / job.part
    words: list[object] = [sys.executable, "-m", "pden", "train", "--config", CONFIGS / f"{job.config}.toml"]
    words += ["--name", job.name, "--seed", job.seed, "--runs", runs, "--data-dir", arguments.data_dir, *job.flags]
    for setting in arguments.set or []:
        words += ["--set", setting]
    return [str(each) for each in words] + (["--resume"] if (runs / job.name / "config.toml").is_file() else [])


def run_part(arguments: argparse.Namespace) -> int:
    """The part's trainings, so many at a time, until they are done or time is over; the number that failed."""
    folder = arguments.work / arguments.part
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [job for job in jobs_of(arguments.part) if not (folder / job.name / "result.json").is_file()]
    running: list[tuple[Job, subprocess.Popen[bytes]]] = []
    deadline, failed = time.monotonic() + 60 * arguments.minutes, 0
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    while (waiting or running) and time.monotonic() < deadline:
        while waiting and len(running) < arguments.jobs:
            job = waiting.pop(0)
            log = (folder / f"{job.name}.log").open("ab")
            process = subprocess.Popen(command(job, arguments), stdout=log, stderr=log, env=environment)
            running.append((job, process))
        for job, process in [each for each in running if each[1].poll() is not None]:
            running.remove((job, process))
            failed += process.returncode != 0
            print(f"{job.name}: exit code {process.returncode}", flush=True)
            if process.returncode:
                print((folder / f"{job.name}.log").read_text()[-1500:], flush=True)
        time.sleep(1)
    for job, process in running:
        process.terminate()
        process.wait()
        print(f"{job.name}: stopped, time is over; run the part again", flush=True)
    if arguments.out is not None:
        collect(folder, arguments.out / arguments.part)
    return failed


def collect(folder: Path, out: Path) -> None:
    """Figures, curves, galleries and logs of all runs; weights stay, being large."""
    out.mkdir(parents=True, exist_ok=True)
    for run in sorted(path for path in folder.iterdir() if path.is_dir()):
        for name in ("result.json", "config.toml", "curve.png", "gallery.png"):
            if (run / name).is_file():
                (out / run.name).mkdir(exist_ok=True)
                shutil.copyfile(run / name, out / run.name / name)
    for log in folder.glob("*.log"):
        shutil.copyfile(log, out / log.name)


def report(arguments: argparse.Namespace) -> int:
    """One JSON file, table and chart for each part that has finished runs."""
    record = evidence()
    for folder in sorted(path for path in arguments.work.iterdir() if path.is_dir()):
        files = sorted(folder.glob("*/result.json"))
        if not files:
            continue
        groups = table.group([table.read_result(file) for file in files])
        selections: dict[str, object] = {}
        for selection in ("last", "averaged", "source-validation", "oracle"):
            having = {
                label: runs
                for label, runs in groups.items()
                if all("targets" in each["selections"].get(selection, {}) for each in runs)
            }
            rows = table.summarise(having, selection) if having else {}
            selections[selection] = {
                label: {name: {"mean": mean, "std": std} for name, (mean, std) in row.items()}
                for label, row in rows.items()
            }
            if selection == "last":
                print(f"{folder.name}, last checkpoint\n\n{table.markdown(rows)}")
                save_bars(rows, arguments.out / f"{folder.name}.png", title=f"{folder.name}: last checkpoint")
                write_text(arguments.out / f"{folder.name}.md", table.markdown(rows))
        runs = [trimmed(each) for runs in groups.values() for each in runs]
        write_json(arguments.out / f"{folder.name}.json", {**record, "selections": selections, "runs": runs})
    return 0


def trimmed(result: dict[str, object]) -> dict[str, object]:
    """What a figure needs beside it, and the curve over rounds."""
    keys = ("name", "method", "command", "seed", "versions", "hardware", "git", "started", "domains", "selections")
    more = ("history", "reports", "notes", "steps", "seconds", "gate_share", "peak_memory_bytes", "config")
    return {key: result[key] for key in (*keys, *more)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["baselines", "paper", "ours", "ablation", "cifar", "speed", "report"])
    parser.add_argument("--work", type=Path, required=True, help="folder of runs")
    parser.add_argument("--out", type=Path, help="folder for what is worth keeping")
    parser.add_argument("--data-dir", type=Path, help="where the data sets are")
    parser.add_argument("--jobs", type=int, default=5, help="trainings at once")
    parser.add_argument("--minutes", type=float, default=24.0, help="stop what runs after this time")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="over every config, for a trial")
    arguments = parser.parse_args()
    if arguments.part == "report":
        if arguments.out is None:
            parser.error("report needs --out")
        return report(arguments)
    if arguments.data_dir is None:
        parser.error(f"{arguments.part} needs --data-dir")
    return run_part(arguments)


if __name__ == "__main__":
    sys.exit(main())
