"""Several seeds of one run in one command, as processes of their own."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from expkit.checkpoint import write_text
from expkit.cli import progress
from expkit.config import to_toml
from expkit.errors import UsageError
from expkit.rundir import default_toml, evidence, require_same
from pden.data import Home
from pden.evaluation.table import about, group, markdown, read_result, summarise
from pden.training.config import TrainConfig


def train_seeds(
    config: TrainConfig, seeds: Sequence[int], home: Home, runs: Path, *, jobs: int = 1, resume: bool = False
) -> dict[str, Any]:
    """Train `NAME-seedN` for each seed, `jobs` at a time; finished ones are kept, begun ones need `resume`.

    Returns:
        the evidence, each run's selections, their means and spreads, and a table of the last weights.

    Raises:
        UsageError: no targets to measure on, a finished run of other settings, or runs that refused their settings or
            data.
        RuntimeError: a run failed; its own message has been printed.
    """
    if not config.data.targets:
        raise UsageError("several seeds are compared on targets; name at least one with --target")
    record = evidence()
    names = {seed: f"{config.name}-seed{seed}" for seed in seeds}
    configs = {seed: to_toml(replace(config, name=names[seed], seed=seed)) for seed in seeds}
    open_seeds = [seed for seed in seeds if not (runs / names[seed] / "result.json").is_file()]
    for seed in set(seeds) - set(open_seeds):
        require_same(runs / names[seed] / "config.toml", configs[seed], default_toml(TrainConfig))
    with tempfile.TemporaryDirectory() as folder:
        commands = []
        for seed in open_seeds:
            file = Path(folder) / f"{seed}.toml"
            write_text(file, configs[seed])
            arguments = ["train", "--config", str(file), "--runs", str(runs)]
            arguments += ["--data-dir", str(home.folders[0])] if len(home.folders) > 1 else []
            arguments += ["--resume"] if resume and (runs / names[seed]).is_dir() else []
            commands.append(_start(arguments, record["command"]))
        _run_all(commands, jobs, config.name)
    results = [read_result(runs / name) for name in names.values()]
    groups = group(results)
    measured = [{name for name, each in one["selections"].items() if "targets" in each} for one in results]
    found = {name: _figures(results, name) for name in results[0]["selections"] if all(name in m for m in measured)}
    rows = summarise(groups, "last")
    table = f"{markdown(rows)}\n{about(rows, 'last', {config.name: seeds})}"
    kept = [{"seed": result["seed"], "selections": result["selections"]} for result in results]
    return {**record, "name": config.name, "method": config.method, "seeds": list(seeds), "table": table} | {
        "selections": found,
        "runs": kept,
        "config": to_toml(config),
    }


def _figures(results: Sequence[dict[str, Any]], selection: str) -> dict[str, Any]:
    (row,) = summarise({"all": results}, selection).values()
    return {name: {"mean": mean, "std": std} for name, (mean, std) in row.items()}


def _start(arguments: Sequence[str], told: str) -> list[str]:
    """A process that runs `pden ARGUMENTS` and records `told` as its command: ARGUMENTS name a temporary file."""
    imports = "import sys; from expkit.cli import main; from pden.cli import build"
    argv = f"sys.argv = {shlex.split(told)}"  # which `evidence` reads
    return [sys.executable, "-c", f"{imports}; {argv}; main(build(), {list(arguments)})"]


def _run_all(commands: Sequence[list[str]], jobs: int, name: str) -> None:
    """Run all commands, `jobs` at a time; their messages go on to ours."""
    waiting, codes = list(commands), []
    running: list[subprocess.Popen[bytes]] = []
    with progress() as bar:
        task = bar.add_task(f"{name}: seeds", total=len(commands))
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(subprocess.Popen(waiting.pop(0), stdout=subprocess.DEVNULL))
                ended = [process for process in running if process.poll() is not None]
                running = [process for process in running if process.poll() is None]
                codes += [process.returncode for process in ended if process.returncode]
                bar.advance(task, len(ended))
                time.sleep(0.05)
        finally:
            for process in running:
                process.terminate()
    if set(codes) == {2}:
        raise UsageError(f"{len(codes)} of {len(commands)} runs refused what they were given; see above")
    if codes:
        raise RuntimeError(f"{len(codes)} of {len(commands)} runs failed; run the command again with --resume")
