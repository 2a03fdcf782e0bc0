"""Make the answers and train both drafters of SmolLM2-135M on one GPU: `hass` (3 steps) and its one-step twin.

    python packages/coral-spec/benchmarks/train_h200.py --work WORK --prompts PROMPTS.jsonl.gz --phases data,train

Every phase goes on where a killed one stopped. `data` leaves WORK/answers; `train` runs both presets side by side as
processes of their own and leaves WORK/runs/<name>; `collect` packs what is worth keeping into a few files in --out
(one tar per run, the answers' shards, one tar of records); a short table of the runs comes last. Settings after `--`
go to both trainings: `-- --set optimizer.lr=5e-4`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent / "configs"
PRESETS = ("hass", "eagle2")


def main() -> int:
    arguments, extra = parse()
    arguments.work.mkdir(parents=True, exist_ok=True)
    phases = arguments.phases.split(",")
    failed = 0
    if "data" in phases:
        failed = subprocess.run(data_command(arguments)).returncode
    if "train" in phases and not failed:
        failed = train(arguments, extra)
    if "collect" in phases:
        collect(arguments.work, arguments.out or arguments.work / "out")
    print_table(arguments.work)
    return failed


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for answers and runs")
    parser.add_argument("--out", type=Path, help="folder to collect into; WORK/out by default")
    parser.add_argument("--prompts", type=Path, help="JSON lines of prompts, for the phase data")
    parser.add_argument("--model", default="smollm2-135m", help="alias or folder of the target")
    parser.add_argument("--phases", default="data,train,collect")
    parser.add_argument("--presets", default=",".join(PRESETS), help="configurations trained side by side")
    parser.add_argument("--answers", type=Path, action="append", help="answer folders to train on; WORK/answers")
    parser.add_argument("--minutes", type=float, default=0.0, help="end each training after this time")
    parser.add_argument("--suffix", default="", help="appended to the names of the runs (for sweeps)")
    parser.add_argument("--limit", type=int, help="only the first prompts")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--samples", type=int, default=1, help="answers to each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--cache-gib", type=float, default=72.0)
    parser.add_argument("--shard-size", type=int, default=8192)
    own = sys.argv[1:]
    cut = own.index("--") if "--" in own else len(own)
    return parser.parse_args(own[:cut]), own[cut + 1 :]


def command(verb: str, *options: object) -> list[str]:
    """A verb of the command line, without the installed entry point."""
    return [sys.executable, "-m", "coral_spec", verb, *map(str, options)]


def data_command(arguments: argparse.Namespace) -> list[str]:
    options: list[object] = ["--model", arguments.model, "--out", arguments.work / "answers"]
    options += ["--prompts", arguments.prompts, "--temperature", arguments.temperature]
    options += ["--samples-per-prompt", arguments.samples, "--max-new-tokens", arguments.max_new_tokens]
    options += ["--batch-size", arguments.batch_size, "--cache-gib", arguments.cache_gib]
    options += ["--shard-size", arguments.shard_size]
    if arguments.limit:
        options += ["--limit", arguments.limit]
    return command("data", *options)


def train(arguments: argparse.Namespace, extra: list[str]) -> int:
    """Both presets at once; their output goes to one log each. The first exit code that is not 0."""
    runs = arguments.work / "runs"
    running = []
    for preset in arguments.presets.split(","):
        name = preset + arguments.suffix
        options: list[object] = ["--config", CONFIGS / f"{preset}.toml", "--name", name, "--runs", runs]
        options += ["--model", arguments.model, "--stages", "drafter"]
        for folder in arguments.answers or [arguments.work / "answers"]:
            options += ["--data", folder]
        if arguments.minutes:
            options += ["--max-minutes", arguments.minutes]
        if (runs / name / "config.toml").exists():
            options.append("--resume")
        log = (arguments.work / f"{name}.log").open("a")
        environment = {**os.environ, "OMP_NUM_THREADS": "4", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
        process = subprocess.Popen(
            [*command("train", *options), *extra], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        running.append((name, process))
    codes = [process.wait() for _, process in running]
    for (name, _), code in zip(running, codes, strict=True):
        if code:
            print(
                f"{name} failed ({code}):", *(arguments.work / f"{name}.log").read_text().splitlines()[-15:], sep="\n"
            )
    return next((code for code in codes if code), 0)


def collect(work: Path, out: Path) -> None:
    """One tar per finished run (drafter, figures, curves), the shards of answers, one tar of manifest and logs."""
    out.mkdir(parents=True, exist_ok=True)
    for run in sorted(work.glob("runs/*")):
        if (run / "result.json").exists():
            with tarfile.open(out / f"{run.name}.tar", "w") as tar:
                tar.add(run, run.name, filter=lambda entry: None if "checkpoints" in entry.name else entry)
    for shard in sorted(work.glob("answers/*.safetensors")):
        shutil.copyfile(shard, out / shard.name)
    with tarfile.open(out / "records.tar", "w") as tar:
        for path in [*sorted(work.glob("answers/*.json*")), *sorted(work.glob("*.log"))]:
            tar.add(path, str(path.relative_to(work)))
    for path in sorted(out.iterdir()):
        print(f"{path.name:32} {path.stat().st_size / 2**20:6.2f} MiB")


def print_table(work: Path) -> None:
    """One line per finished run: simulated acceptance length, per depth, steps, minutes, speed."""
    manifest = work / "answers" / "manifest.json"
    if manifest.exists():
        print(f"answers: {json.loads(manifest.read_text())['rows']} rows")
    print(f"{'run':24} {'tau_sim':>7} {'best/steps':>13} {'min':>5} {'tok/s':>8} {'GiB':>5}  accepted per depth")
    for path in sorted(work.glob("runs/*/result.json")):
        found = json.loads(path.read_text())
        rates = " ".join(f"{rate:.3f}" for rate in found["rates"])
        steps = f"{found['best_step']}/{found['steps']}"
        print(
            f"{found['name']:24} {found['tau_sim']:7.3f} {steps:>13} {found['minutes']:5.1f} "
            f"{found['tokens_per_second']:8,.0f} {found['peak_memory_bytes'] / 2**30:5.1f}  {rates}"
        )


if __name__ == "__main__":
    sys.exit(main())
