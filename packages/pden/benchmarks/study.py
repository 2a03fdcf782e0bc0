"""The study, on all GPUs of a machine, in leases of about 24 minutes on machines that are bare at their start.

    python packages/pden/benchmarks/study.py plan --gpus 2 --out OUT
    python packages/pden/benchmarks/study.py run --gpus 2 --data-dir DATA --work WORK --out OUT
    python packages/pden/benchmarks/study.py report --out OUT --to packages/pden/results
    python packages/pden/benchmarks/study.py restore --out OUT --to packages/pden/results

`run` gives every GPU `--side` trainings at a time and begins none that would not end within `--lease` minutes of the
first `run` on this machine. Where a command may not last so long, start it in the background, or repeat it with
`--minutes 9`: trainings go on from their checkpoints in WORK, which is large and stays there (best in memory, as
/dev/shm). OUT is small (figures and pictures, a few MiB in all), and all that a later lease needs: what has its figures
there is not run again, nor is a training that has failed by itself (`failed.json` in the place of its figures, to be
removed for another try); one that was killed, or for which there was no memory, is tried again by the next `run`.
Several `run`s with one OUT, each with its own GPU, WORK and `--only`, share the work where a GPU is taken by something
else for a while. `restore` fills OUT from what `report` has published.

Parts: `paper` (PDEN on digits with the paper's settings, 5 seeds, the first alone on its GPU: minutes and memory),
`choice` (settings of PDEN on a seed of its own, none of the study's targets loaded), `ours` (5 seeds), `baselines`
(ERM, RandConv, RandAugment, ME-ADA, AugMix, 5 seeds each; RandAugment and RandConv together in two ways, 3 seeds),
`ablation` (each loss left out, each kind of generator, and what is ours left out of ours, K = 4, 2 seeds; it decides
nothing), `cifar` (CIFAR-10 to recomputed CIFAR-10-C: the paper's losses, and ours). `run PART ...` does some. Where the
first trainings all fail, `run` ends, and what made them fail is to be mended.

`ours` is what `choice` comes to by a rule that reads development domains alone (`study_jobs.choose`).
It is written to OUT/chosen.json when the last training of `choice` is done, and nothing else begins before. What is
reported of `ours` are its averaged weights, of the others the last; the tables have both for all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from expkit.checkpoint import write_json
from expkit.device import visible_gpus
from expkit.rundir import evidence

sys.path.insert(0, str(Path(__file__).resolve().parent))
from study_jobs import PARTS, Estimates, Job, choose, jobs_of, leases, next_job, queue
from study_tables import report, restore

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
STOPPING = 20  # seconds that a training may take to end
FAULTS = 3  # trainings that fail before any succeeds are no fault of theirs


class Study:
    """Trainings and where their figures lie.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out: Path = arguments.out
        self.running: dict[Job, tuple[str, subprocess.Popen[bytes]]] = {}
        self.lost: set[Job] = set()  # killed from outside, or without memory: not tried again by this command
        self.ended: dict[Job, bool] = {}  # by this command; whether they have figures

    def file(self, job: Job, name: str = "result.json") -> Path:
        """A small file of a training that has ended."""
        return self.out / job.part / job.name / name

    def has(self, job: Job, name: str = "result.json") -> bool:
        return self.file(job, name).is_file()

    def read(self, job: Job) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file(job).read_text(encoding="utf-8"))
        return found

    @property
    def chosen(self) -> list[str] | None:
        """The settings of `ours`; None before they are chosen."""
        file = self.out / "chosen.json"
        return list(json.loads(file.read_text(encoding="utf-8"))["settings"]) if file.is_file() else None

    @property
    def todo(self) -> list[Job]:
        """What has neither figures nor failed nor is running; what was begun on this machine comes first."""
        parts, only = getattr(self.arguments, "parts", None) or PARTS, self.arguments.only
        jobs = [job for job in queue(self.chosen or ()) if job.part in parts and job not in self.running]
        jobs = [job for job in jobs if only is None or job.place in only.split(",")]
        jobs = [job for job in jobs if not (self.has(job) or self.has(job, "failed.json"))]
        return sorted(jobs, key=lambda job: not self.begun(job))

    @property
    def choosing(self) -> bool:
        """Whether `ours` waits for trainings of the choice, which have all places until they are done."""
        return self.chosen is None and any(job.part == "choice" for job in [*self.todo, *self.running])

    @property
    def estimates(self) -> Estimates:
        done = [job for job in queue(self.chosen or ()) if self.has(job)]
        return Estimates(self.arguments.side, {job: self.read(job) for job in done})

    def folder(self, job: Job) -> Path:
        """Of the run."""
        return Path(self.arguments.work) / job.part / job.name

    def begun(self, job: Job) -> bool:
        work = getattr(self.arguments, "work", None)
        return work is not None and (self.folder(job) / "config.toml").is_file()

    def plan(self) -> None:
        """Print the leases that are left."""
        arguments, estimates = self.arguments, self.estimates
        names = [str(each) for each in range(arguments.gpus)]
        print(
            f"{arguments.side} side by side on each GPU, GPUs: {arguments.gpus}; leases of {arguments.lease:g} minutes"
        )
        planned = leases(self.todo, estimates, names, arguments.lease)
        for number, lease in enumerate(planned, start=1):
            length = max(end for *_, end in lease)
            warning = f", DOES NOT FIT: give --lease {math.ceil(length)}" if length > arguments.lease else ""
            print(f"lease {number}: {length:.0f} minutes{warning}")
            for job, gpu, begin, end in lease:
                print(f"  GPU {gpu} {begin:5.1f} to {end:5.1f}  {job.part}: {job.name}")
        print(f"{len(planned)} leases" if planned else "nothing is left; see `report`")

    def run(self) -> int:
        """Trainings until all is done or time is over; the exit code is 1 while something is left."""
        arguments = self.arguments
        lease_ends = began_on(arguments.work) + 60 * arguments.lease
        deadline = min(time.time() + 60 * arguments.minutes, lease_ends)
        gpus, estimates, choosing = visible_gpus(arguments.gpus), self.estimates, self.choosing
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the trainings end too

        def may_begin(job: Job) -> bool:
            if job in self.lost:
                return False
            if job.part != "choice" and (choosing or (job.config == "digits-choice" and self.chosen is None)):
                return False
            return self.begun(job) or time.time() + 60 * estimates.minutes(job) <= lease_ends

        try:
            while time.time() < deadline:
                if self.collect_ended():
                    estimates = self.estimates
                self.settle_choice()
                if self.hopeless:
                    break
                choosing = self.choosing
                running = [(job, gpu) for job, (gpu, _) in self.running.items()]
                found = next_job(self.todo, running, arguments.side, gpus, may_begin)
                if found is not None:
                    self.start(*found)
                elif self.running:
                    time.sleep(0.3)
                else:
                    break
        finally:
            self.collect_ended()
            for _, process in self.running.values():  # all before the first wait: each takes a moment to leave its GPU
                process.terminate()
            for job, (_, process) in self.running.items():
                try:
                    process.wait(STOPPING)
                except subprocess.TimeoutExpired:
                    process.kill()
                print(f"{job.part}, {job.name}: stopped, time is over", flush=True)
            self.running = {}
        if self.hopeless:
            print(
                f"the first {len(self.ended)} trainings have all failed: stopped; they may be tried again", flush=True
            )
            for job in self.ended:
                self.file(job, "failed.json").unlink(missing_ok=True)
        left, failed = self.todo, self.failed
        print(f"{len(left)} trainings are left{told(failed)}" if left or failed else "done", flush=True)
        return int(bool(left or failed))

    @property
    def hopeless(self) -> bool:
        """Whether all trainings of this command have failed so far, and enough to tell."""
        return len(self.ended) >= FAULTS and not any(self.ended.values())

    @property
    def failed(self) -> list[Job]:
        """Trainings that have failed by themselves."""
        return [job for job in queue(self.chosen or ()) if self.has(job, "failed.json")]

    def start(self, job: Job, gpu: str) -> None:
        """A training as a process of its own."""
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": gpu}
        log = self.folder(job).with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(self.command(job), stdout=file, stderr=file, env=environment)
        self.running[job] = gpu, process

    def command(self, job: Job) -> list[str]:
        """Of a training."""
        arguments, runs = self.arguments, self.folder(job).parent
        words: list[object] = [sys.executable, "-m", "pden", "train", "--config", CONFIGS / f"{job.config}.toml"]
        words += ["--name", job.name, "--seed", job.seed, "--runs", runs, "--data-dir", arguments.data_dir, *job.flags]
        for setting in arguments.set or []:
            words += ["--set", setting]
        return [str(each) for each in words] + (["--resume"] if self.begun(job) else [])

    def collect_ended(self) -> bool:
        """Keep what is small of trainings that have ended; whether any has."""
        ended = [job for job, (_, process) in self.running.items() if process.poll() is not None]
        for job in ended:
            self.collect(job)
        return bool(ended)

    def collect(self, job: Job) -> None:
        """Keep what is small of a training that has ended."""
        (_, process), run = self.running.pop(job), self.folder(job)
        out = self.file(job).parent
        out.mkdir(parents=True, exist_ok=True)
        self.ended[job] = not process.returncode
        if process.returncode:
            last = run.with_suffix(".log").read_text(encoding="utf-8")[-1500:]
            print(f"{job.part}, {job.name}: exit code {process.returncode}\n{last}", flush=True)
            if process.returncode < 0 or "out of memory" in last:
                self.lost.add(job)
            else:
                write_json(out / "failed.json", {"exit_code": process.returncode, "log": last})
            return
        pictures = ("curve.png", "gallery.png") if job.seed in (0, 100) else ()  # of one seed: OUT is to be small
        for name in (*pictures, "result.json"):  # the last one says that all are there
            if (run / name).is_file():
                shutil.copyfile(run / name, out / name)
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        print(f"{job.part}, {job.name}: done", flush=True)

    def settle_choice(self) -> None:
        """Write what `ours` is when the last training of the choice has ended."""
        if self.chosen is not None:
            return
        jobs = jobs_of("choice")
        done, failed = ([job for job in jobs if self.has(job, name)] for name in ("result.json", "failed.json"))
        if not done or len(done) + len(failed) < len(jobs):  # where all have failed `ours` waits for ever
            return
        found = choose([self.read(job) for job in done], [job.name for job in failed])
        write_json(self.out / "chosen.json", {**evidence(), **found})
        print(
            f"chosen: {found['chosen']} ({100 * found['means'][found['chosen']]:.2f} % on development domains)",
            flush=True,
        )


def told(failed: Sequence[Job]) -> str:
    """Of trainings that have failed."""
    return f"; {len(failed)} have failed: {', '.join(job.name for job in failed)}" if failed else ""


def began_on(work: Path) -> float:
    """When the first `run` on this machine began."""
    file = work / "began.json"
    if not file.is_file():
        work.mkdir(parents=True, exist_ok=True)
        write_json(file, time.time())
    return float(json.loads(file.read_text(encoding="utf-8")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    for action in ("plan", "run", "report", "restore"):
        one = actions.add_parser(action)
        one.add_argument("--out", type=Path, required=True, help="small folder that later leases need")
        if action in ("report", "restore"):
            one.add_argument("--to", type=Path, required=True, help="folder of JSON, tables and charts")
            continue
        one.add_argument("--side", type=int, default=1, help="trainings side by side on a GPU")
        one.add_argument("--gpus", type=int, help="over how many GPUs; all that are visible, if not given")
        one.add_argument("--only", metavar="NAME,...", help="trainings of these names (without -seedN) alone")
        one.add_argument("--lease", type=float, default=24.0, help="minutes from the first `run` on this machine")
        if action == "plan":
            continue
        one.add_argument("parts", nargs="*", help="some of " + ", ".join(PARTS))
        one.add_argument("--work", type=Path, required=True, help="large folder of runs, on the machine")
        one.add_argument("--data-dir", type=Path, required=True, help="where the data sets are")
        one.add_argument("--minutes", type=float, default=1e6, help="stop what runs after this time")
        one.add_argument("--set", action="append", metavar="KEY=VALUE", help="over every config, for a trial")
    arguments = parser.parse_args()
    study = Study(arguments)
    if arguments.action == "report":
        if study.failed:
            print(f"left out{told(study.failed)}")
        report(study.out, arguments.to)
        return 0
    if arguments.action == "restore":
        if not any((arguments.to / f"{part}.json").is_file() for part in PARTS):
            parser.error(f"restore: --to {arguments.to} has no figures of this study")
        print(f"{restore(arguments.to, study.out)} files written")
        return 0
    seen = torch.cuda.device_count()
    if arguments.gpus is None:
        arguments.gpus = max(1, seen)
    if arguments.gpus < 1 or (arguments.action != "plan" and arguments.gpus > max(1, seen)):
        parser.error(f"--gpus {arguments.gpus}: {seen} are visible; give 1 to {max(1, seen)}; `plan` takes more")
    if arguments.action == "plan":
        study.plan()
        return 0
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {min(unknown)!r}; they are {', '.join(PARTS)}")
    places = {job.place for job in queue()}
    strange = set() if arguments.only is None else set(arguments.only.split(",")) - places
    if strange:
        parser.error(f"--only: no training {min(strange)!r}; they are {', '.join(sorted(places))}")
    return study.run()


if __name__ == "__main__":
    sys.exit(main())
