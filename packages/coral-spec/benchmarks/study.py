"""The study of CORAL: {SmolLM2-135M-Instruct, Gemma3-270M} x {EAGLE-2, HASS, HASS + CSRA, CORAL} and its settings.

    python packages/coral-spec/benchmarks/study.py --work WORK --plan
    python packages/coral-spec/benchmarks/study.py --work WORK --gpus 4 --prompts P --lease smollm2-data,smollm2-seed0

A lease of a GPU lasts about 25 minutes and starts bare, so the study is a list of leases, each of some jobs; `--plan`
prints them with estimates. A job begins when those have ended whose folders its command names, on a GPU that it has
for itself, the one with the longest work behind it first; none begins that would not end within `--minutes`.
Benchmarks on a CPU, and those of transformers' own decoding, which the host bounds, have the machine for themselves.
A job that has left its file is not done again, one that was killed goes on, and one that failed keeps back only what
waits for it. `--only` takes jobs of any lease by patterns of what they leave. What a later lease needs lies in
WORK/keep (a drafter may also be put there), what is to be committed in WORK/results; WORK/runs (checkpoints) stays
behind.

Leases: `-data` (answers), `-sweep` (the alignment's settings), `-seed0` to `-seed2` (recipes with equal steps),
`-settings` (controls), `-router`, `-heads` (all at equal drafter; temperature 1; speed), `-bundled`; `cpu`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from fnmatch import fnmatch
from pathlib import Path

from expkit.device import visible_gpus
from expkit.errors import UsageError

sys.path.insert(0, str(Path(__file__).resolve().parent))
from study_plan import Job, Plan, needs

STOPPING = 20  # seconds that a job may take to end


class Study:
    """Jobs that are run.

    Args:
        plan: what there is to do.
        gpus: each the CUDA_VISIBLE_DEVICES of the jobs on it.
    """

    def __init__(self, plan: Plan, gpus: Sequence[str] = ("0",)) -> None:
        self.work, self.gpus, self.all = plan.work, gpus, plan.jobs()
        self.needs = needs(self.all, plan.work)

    def chosen(self, leases: Sequence[str], patterns: Sequence[str] = ()) -> list[Job]:
        """Jobs of some leases, and those of any lease that leave a file of such a name."""
        return [job for job in self.all if job.lease in leases or any(fnmatch(job.out, each) for each in patterns)]

    def done(self, job: Job) -> bool:
        """Whether it has left its file, in this lease or (a training, whose run stays behind) in an earlier one."""
        out, kept = Path(job.out), self.work / "results" / "training"
        return (self.work / out).exists() or (out.parts[0] == "runs" and (kept / out.relative_to("runs")).exists())

    def lacks(self, job: Job, unfinished: Collection[Job] = ()) -> list[Job]:
        """What must have ended before it. A drafter that lies among those that are kept may be from elsewhere.

        Args:
            unfinished: of those that are asked for; what they have left so far is not whole.
        """
        return [each for each in self.needs[job] if each in unfinished or not self.there(each)]

    def there(self, job: Job) -> bool:
        """Whether others find what it makes."""
        folders = [self.work / "keep" / name for name in job.keep.values()]
        return all(each.is_dir() for each in folders) if folders else self.done(job)

    def behind(self, job: Job, jobs: Sequence[Job]) -> float:
        """Minutes until the last of what waits for it has ended, with GPUs enough."""
        waiting = [each for each in jobs if job in self.needs[each]]
        return job.minutes + max((self.behind(each, jobs) for each in waiting), default=0.0)

    def run(self, jobs: Sequence[Job], ends: float) -> bool:
        """Do these, but for those that would not end by then; returns whether all are done."""
        for job in jobs:
            if self.done(job):
                self.keep(job)
        waiting = [job for job in jobs if not self.done(job)]
        failed: list[Job] = []
        (self.work / "results").mkdir(parents=True, exist_ok=True)
        running: dict[str, tuple[Job, Path, subprocess.Popen[bytes]]] = {}
        try:
            while True:
                for gpu, (job, log, process) in list(running.items()):
                    if process.poll() is not None:
                        failed += [] if self.collect(job, log, process.returncode) else [job]
                        del running[gpu]
                unfinished = [*waiting, *failed, *(job for job, *_ in running.values())]
                left = [job for job in waiting if time.monotonic() + 60 * job.minutes <= ends]
                left = [job for job in left if not self.lacks(job, unfinished)]
                left.sort(key=lambda job: (job.alone, -self.behind(job, waiting)))
                for gpu in self.gpus:
                    alone = any(job.alone for job, *_ in running.values())
                    if not left or gpu in running or alone or (left[0].alone and running):
                        continue
                    job = left.pop(0)
                    waiting.remove(job)
                    running[gpu] = (job, *self.start(job, gpu))
                    print(f"begun on GPU {gpu}: {job.out}, log {running[gpu][1]}", flush=True)
                if not running:
                    break
                time.sleep(0.1)
        finally:  # or what goes on here would write beside what a later call resumes
            for _, _, process in running.values():
                process.terminate()
            for _, _, process in running.values():
                try:
                    process.wait(STOPPING)
                except subprocess.TimeoutExpired:
                    process.kill()
        for job in waiting:
            lacking = ", ".join(each.out for each in self.lacks(job, [*waiting, *failed]))
            print(f"left: {job.out} ({f'needs {lacking}' if lacking else f'{job.minutes:g} minutes'})", flush=True)
        return not (waiting or failed)

    def start(self, job: Job, gpu: str) -> tuple[Path, subprocess.Popen[bytes]]:
        """On one GPU, going on where it was killed; its log and its process."""
        options = list(job.options)
        if options[0] == "train" and list((self.work / "runs" / options[options.index("--name") + 1]).glob("*")):
            options.append("--resume")
        log = self.work / "logs" / f"{job.out.replace('/', '_')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        own = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "CUDA_VISIBLE_DEVICES": gpu}
        with log.open("a") as file:
            command = [sys.executable, "-m", "coral_spec", *options]
            return log, subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **own})

    def collect(self, job: Job, log: Path, code: int) -> bool:
        """Keep what it has left; its last lines are printed if it failed."""
        if code:
            last = log.read_text(errors="replace").splitlines()[-12:]
            print("\n".join([f"{log}: exit code {code}", *last]), flush=True)
            return False
        if job.options[0] == "data":
            (self.work / job.out).touch()  # answers are complete when their command has ended
        self.keep(job, anew=True)
        print(f"done: {job.out}", flush=True)
        return True

    def keep(self, job: Job, anew: bool = False) -> None:
        """Copy what later leases and RESULTS.md need out of the runs; folders that are there already stay, or go."""
        for source, name in job.keep.items():
            target = self.work / "keep" / name
            if (self.work / source).is_dir() and (anew or not target.is_dir()):
                aside = target.with_name(f"{target.name}.partial")
                shutil.rmtree(aside, ignore_errors=True)
                shutil.copytree(self.work / source, aside)
                shutil.rmtree(target, ignore_errors=True)
                aside.rename(target)
        if not job.out.startswith("runs/"):
            return
        # its own, and the one before
        stages = {(self.work / job.out).parent, self.work / "runs" / Path(job.out).parts[1]}
        for run in stages:
            kept = self.work / "results" / "training" / run.relative_to(self.work / "runs")
            kept.mkdir(parents=True, exist_ok=True)
            # the last says that all are there
            for file in ("config.toml", "metrics.jsonl", "curves.png", "result.json"):
                if (run / file).is_file():
                    shutil.copyfile(run / file, kept / file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the study")
    parser.add_argument("--lease", default="", help="which part to do, or several, separated by commas")
    parser.add_argument("--only", default="", metavar="PATTERNS", help="as results/smollm2-speed-*,runs/*-lowrank*")
    parser.add_argument("--minutes", type=float, default=24.0, help="nothing is begun that would not end by then")
    parser.add_argument("--gpus", type=int, default=1, help="how many to use, a job on each")
    parser.add_argument("--prompts", type=Path, help="JSON lines of prompts, for the leases of answers")
    parser.add_argument("--plan", action="store_true", help="print the leases and what of them is done")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the jobs end too
    work = arguments.work.resolve()
    if set(",=") & set(str(work)):
        parser.error(f"--work: {work} has a comma or =, which options of methods cannot hold")
    try:
        study = Study(Plan(work, arguments.prompts), visible_gpus(arguments.gpus))
    except UsageError as error:
        parser.error(f"--gpus: {error}")
    wanted, patterns = ([each for each in text.split(",") if each] for text in (arguments.lease, arguments.only))
    leases = list(dict.fromkeys(job.lease for job in study.all))
    if arguments.plan:
        for name in leases:
            jobs = study.chosen([name])
            done, total = sum(map(study.done, jobs)), sum(job.minutes for job in jobs)
            print(f"{name:16} {total:5.0f} minutes of a GPU, {done} of {len(jobs)} jobs done")
        return 0
    for each in set(wanted) - set(leases):
        parser.error(f"--lease: there is no {each!r}; they are {', '.join(leases)}")
    jobs = study.chosen(wanted, patterns)
    for pattern in patterns:
        if not any(fnmatch(job.out, pattern) for job in jobs):
            parser.error(f"--only: nothing leaves {pattern!r}")
    if not jobs:
        parser.error("nothing is asked for: give --lease, --only or --plan")
    if arguments.prompts is None and any("--prompts" in job.options and not study.done(job) for job in jobs):
        parser.error("answers need --prompts")
    return 0 if study.run(jobs, time.monotonic() + 60 * arguments.minutes) else 1


if __name__ == "__main__":
    sys.exit(main())
