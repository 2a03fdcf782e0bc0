"""Milliseconds of a training step on this machine, for each method, alone and side by side on one device.

    python packages/pden/benchmarks/step_time.py --side 1,3,5 --json out.json

The digits net, batch 128, images made at random (their values cost no time). Each process warms up in one round and in
ten steps of the next, whose others are timed, all processes at once: those of the half in which a generator learns and
those of the other half. What counts for a study is the time a step takes of the device: that of a process divided by
how many ran beside one another. `--profile FOLDER` keeps a trace of 30 steps of the first method besides.
`--cudnn-benchmark` has cuDNN time its algorithms for each convolution and keep the fastest, which may want more memory.
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from expkit.checkpoint import write_json
from expkit.config import load_config
from expkit.device import reserved_memory, resolve_device, resolve_dtype, synchronize
from expkit.rundir import evidence
from pden.data import Domain
from pden.training.config import TrainConfig
from pden.training.trainer import Trainer

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
WARM = 10  # steps of a half, in which it is recorded
CLASSES = tuple(str(digit) for digit in range(10))


def trainer(method: str, steps: int, device: torch.device, engine: str, dtype: str = "fp32", **more: Any) -> Trainer:
    """Two rounds of so many steps after a short start; `more` settings by key."""
    config = "digits-paper" if method == "pden" else "digits-baseline"
    keys: dict[str, Any] = {"method": method, "rounds": 2, "round_steps": steps, "pretrain_steps": 20,
                            "engine": engine}  # fmt: skip
    keys |= {"gate.mode": "record", "gate.judge_steps": 20} if method == "pden" else {}
    settings = load_config(TrainConfig, CONFIGS / f"{config}.toml", keys | more)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2000, 3, 32, 32), generator=generator).to(torch.uint8)
    made = Domain("made", images, torch.arange(2000) % 10, CLASSES)
    return Trainer(settings, made, made, device=device, dtype=resolve_dtype(dtype, device))


def work(method: str, steps: int, engine: str, dtype: str, benchmark: bool, barrier: Any, found: Any) -> None:
    """One process: milliseconds of a step in either half of the second round, recordings and the gate left out, and
    most bytes of memory."""
    torch.backends.cudnn.benchmark = benchmark
    device = resolve_device("auto")
    one = trainer(method, steps, device, engine, dtype)
    halves = []
    for begin, end in ((WARM, one.config.learning_steps - 1), (one.config.learning_steps + WARM, steps - 1)):
        while not (one.clock.stage == "round" and one.clock.round == 2 and one.clock.step >= begin):
            one.step()
        synchronize(device)
        barrier.wait()
        begun = time.perf_counter()
        for _ in range(end - begin):
            one.step()
        synchronize(device)
        halves.append(1000 * (time.perf_counter() - begun) / (end - begin))
    found.put((*halves, reserved_memory(device)))


def measure(method: str, engine: str, dtype: str, side: int, steps: int, benchmark: bool) -> dict[str, Any]:
    """So many processes at once, each of them new."""
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(side), context.Queue()
    given = (method, steps, engine, dtype, benchmark, barrier, found)
    processes = [context.Process(target=work, args=given) for _ in range(side)]
    for each in processes:
        each.start()
    for each in processes:
        each.join()
    if any(each.exitcode for each in processes):
        raise SystemExit(f"{method}, {side} side by side: a process failed")
    *halves, memory = (sum(each) / side for each in zip(*(found.get() for _ in processes), strict=True))
    mean = sum(halves) / 2
    times = {"ms": mean, "ms_of_halves": halves, "ms_of_device": mean / side, "memory_bytes": memory}
    return {"method": method, "engine": engine, "dtype": dtype, "cudnn_benchmark": benchmark, "side": side, **times}


def profile(method: str, engine: str, dtype: str, benchmark: bool, folder: Path) -> None:
    """A trace of steps of the second round, and its operations by time."""
    torch.backends.cudnn.benchmark = benchmark
    device = resolve_device("auto")
    one = trainer(method, 200, device, engine, dtype)
    while not (one.clock.stage == "round" and one.clock.round == 2 and one.clock.step > 20):
        one.step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as seen:
        for _ in range(30):
            one.step()
        synchronize(device)
    folder.mkdir(parents=True, exist_ok=True)
    seen.export_chrome_trace(str(folder / f"{method}.json.gz"))
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    (folder / f"{method}.txt").write_text(seen.key_averages().table(sort_by=key, row_limit=60), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="pden,augmix,randconv,me-ada,erm")
    parser.add_argument("--engines", default="auto", help="some of auto, graphs, eager")
    parser.add_argument("--dtypes", default="fp32", help="some of fp32, bf16")
    parser.add_argument("--cudnn-benchmark", action="store_true")
    parser.add_argument("--side", type=lambda text: [int(each) for each in text.split(",")], default=[1, 3])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.steps < 4 * WARM:
        parser.error(f"--steps {arguments.steps}: at least {4 * WARM} are needed")
    record, rows = evidence(), []
    methods, engines, dtypes = (each.split(",") for each in (arguments.methods, arguments.engines, arguments.dtypes))
    benchmark = arguments.cudnn_benchmark
    for method, engine, dtype, side in product(methods, engines, dtypes, arguments.side):
        rows.append(row := measure(method, engine, dtype, side, arguments.steps, benchmark))
        first, second = row["ms_of_halves"]
        print(f"{method:10} {engine:6} {dtype} {side} side by side: {row['ms']:7.2f} ms a step ({first:.2f}, "
              f"{second:.2f}), {row['ms_of_device']:6.2f} of the device, {row['memory_bytes'] / 2**20:6.0f} MiB",
              flush=True)  # fmt: skip
    if arguments.profile:
        profile(methods[0], engines[0], dtypes[0], benchmark, arguments.profile)
    if arguments.json:
        write_json(arguments.json, {**record, "rows": rows})


if __name__ == "__main__":
    main()
