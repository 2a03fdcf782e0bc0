"""The study of CORAL: {SmolLM2-135M-Instruct, Gemma3-270M} x {EAGLE-2, HASS, HASS + CSRA, CORAL} and its settings.

    python packages/coral-spec/benchmarks/study.py --work WORK --plan
    python packages/coral-spec/benchmarks/study.py --work WORK --lease smollm2-seed0 --minutes 24 --prompts PROMPTS

A lease of a GPU lasts about 25 minutes and starts bare, so the study is a list of leases, each with what it needs
from those before it (`--plan` prints them with estimates). A step that has left its file is not done again, a command
goes on where it was killed, and from the first step on that would not end within `--minutes` none is begun. What a
later lease needs lies in WORK/keep, what is to be committed in WORK/results; WORK/runs (checkpoints) stays behind.
With `--gpus 4` commands of a step run side by side, one on each; `--lease gemma3-data,gemma3-seed0` does two in a row.

Leases: `-data` (answers), `-sweep` (the alignment's settings), `-seed0` to `-seed2` (recipes with equal steps),
`-settings` (controls), `-router`, `-heads` (all at equal drafter; temperature 1; speed), `-bundled`; `cpu`.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from expkit.device import visible_gpus
from expkit.errors import UsageError

sys.path.insert(0, str(Path(__file__).resolve().parent))
from study_plan import Plan, Step


class Study(Plan):
    """A plan that is run."""

    def minutes(self, step: Step) -> float:
        """Of a step on these GPUs."""
        return step.minutes * math.ceil(len(step.commands) / len(self.gpus)) / len(step.commands)

    def run(self, lease: str, ends: float) -> bool:
        """Do what of a lease is left, up to the first step that does not fit, since later ones may need it.

        Returns:
            whether all of it is done.
        """
        for number in range(len(self.leases()[lease])):
            step = self.leases()[lease][number]  # anew: where drafters lie depends on the steps before
            if not all(self.done(out) for out in step.commands):
                if time.monotonic() + 60 * self.minutes(step) > ends:
                    print(f"left for another lease: {', '.join(step.commands)} ({self.minutes(step):g} minutes)")
                    return False
                self.do(step)
            self.keep(step)
        return True

    def done(self, out: str) -> bool:
        """Whether a command has left its file, in this lease or (a training, whose run stays behind) in an earlier."""
        kept = self.work / "results" / "training" / Path(out).relative_to("runs") if out.startswith("runs/") else None
        return (self.work / out).exists() or (kept is not None and kept.exists())

    def do(self, step: Step) -> None:
        """Run a step's commands, one on each GPU; when one fails, the others end, and its last lines are the error."""
        waiting = [(out, options) for out, options in step.commands.items() if not self.done(out)]
        running: dict[str, tuple[Path, subprocess.Popen[bytes]]] = {}
        failed: list[Path] = []
        (self.work / "results").mkdir(parents=True, exist_ok=True)
        while running or (waiting and not failed):
            for gpu, (log, process) in list(running.items()):
                if process.poll() is not None:
                    del running[gpu]
                    failed += [log] if process.returncode else []
            for gpu in self.gpus:
                if waiting and not failed and gpu not in running:
                    running[gpu] = self.start(*waiting.pop(0), gpu)
            time.sleep(0.1)
        if failed:
            raise SystemExit("\n".join([f"{failed[0]}:", *failed[0].read_text().splitlines()[-12:]]))
        for out, options in step.commands.items():
            if options[0] == "data":
                (self.work / out).touch()  # answers are complete when their command has ended

    def start(self, out: str, options: list[str], gpu: str) -> tuple[Path, subprocess.Popen[bytes]]:
        """One command on one GPU, going on where it was killed; its log and its process."""
        if options[0] == "train" and list((self.work / "runs" / options[options.index("--name") + 1]).glob("*")):
            options = [*options, "--resume"]
        log = self.work / "logs" / f"{out.replace('/', '_')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        own = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "CUDA_VISIBLE_DEVICES": gpu}
        with log.open("a") as file:
            command = [sys.executable, "-m", "coral_spec", *options]
            return log, subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **own})

    def keep(self, step: Step) -> None:
        """Copy what later leases and RESULTS.md need out of the runs."""
        for source, name in step.keep.items():
            if (self.work / source).is_dir():
                shutil.copytree(self.work / source, self.work / "keep" / name, dirs_exist_ok=True)
        for out in (each for each in step.commands if each.startswith("runs/")):
            for run in {(self.work / out).parent, self.work / "runs" / Path(out).parts[1]}:  # of a stage, and before it
                kept = self.work / "results" / "training" / run.relative_to(self.work / "runs")
                kept.mkdir(parents=True, exist_ok=True)
                for file in ("config.toml", "metrics.jsonl", "result.json", "curves.png"):
                    if (run / file).is_file():
                        shutil.copyfile(run / file, kept / file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the study")
    parser.add_argument("--lease", default="", help="which part to do, or several, separated by commas")
    parser.add_argument("--minutes", type=float, default=24.0, help="no step is begun that would not end by then")
    parser.add_argument("--gpus", type=int, default=1, help="over how many commands of a step are spread")
    parser.add_argument("--prompts", type=Path, help="JSON lines of prompts, for the leases of answers")
    parser.add_argument("--plan", action="store_true", help="print the leases and what of them is done")
    arguments = parser.parse_args()
    try:
        study = Study(arguments.work, arguments.prompts, visible_gpus(arguments.gpus))
    except UsageError as error:
        parser.error(f"--gpus: {error}")
    leases, wanted = study.leases(), arguments.lease.split(",")
    if arguments.plan or not set(wanted) <= set(leases):
        for name, steps in leases.items():
            done = sum(all(study.done(out) for out in step.commands) for step in steps)
            total = sum(map(study.minutes, steps))
            print(f"{name:16} {total:5.0f} minutes, {done} of {len(steps)} steps done")
        return 0 if arguments.plan else 2
    if arguments.prompts is None and any(lease.endswith("-data") for lease in wanted):
        parser.error("answers need --prompts")
    ends = time.monotonic() + 60 * arguments.minutes
    return 0 if all(study.run(lease, ends) for lease in wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
