"""The study on several GPUs of one machine: a process for every arm, one at a time on each GPU. No torch here."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from study_arms import Job, next_job

POLL = 0.5  # seconds between two looks at the processes
SHOWN = 20  # lines of the log of an arm that failed


@dataclass(frozen=True)
class Worker:
    """A process that trains and judges one arm.

    Attributes:
        log: all that it says.
        began: by the monotonic clock.
    """

    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    began: float


def run_on(
    ids: Sequence[str], command: Sequence[str], work: Path, end: float, read_left: Callable[[], list[Job]]
) -> list[str]:
    """Keep every GPU at an arm, as long as arms fit into what is left of the lease.

    What needs the sweeps waits for all of them, also for one that failed: what is chosen might be another one with it.

    Args:
        ids: the GPUs, as CUDA_VISIBLE_DEVICES names them. Each has a folder of runs below `work` for itself, so that
            no two processes train one standard model.
        command: the call of this script; of an option that is given twice the last one counts.
        end: of the lease, in seconds since the epoch.
        read_left: the arms without all their figures, in order; asked again after every arm, since lambda and the
            seconds on paper come from the arms before.

    Returns:
        the names of the arms that failed.
    """
    folders = [work / f"gpu{number}" for number in range(len(ids))]
    running: dict[int, Worker] = {}
    failed: set[str] = set()
    left = read_left()
    while True:
        for number in sorted(set(range(len(ids))) - running.keys()):
            barred = failed | {worker.job.name for worker in running.values()}
            barred |= {job.name for job in left if _home(job, folders) not in (None, number)}
            there = {path.parent.name for path in folders[number].glob("*/result.json")}
            job = next_job(left, barred, there, end - time.time(), first=number == 0)
            if job is not None:
                running[number] = _begin(job, ids[number], folders[number], command, end)
        if not running:
            return sorted(failed)
        while all(worker.process.poll() is None for worker in running.values()):
            time.sleep(POLL)
        ended = {number: worker for number, worker in running.items() if worker.process.poll() is not None}
        left = read_left()
        for number, worker in ended.items():
            del running[number]
            done = worker.process.returncode == 0 and worker.job.name not in {job.name for job in left}
            failed |= set() if done else {worker.job.name}
            print(_ended(worker, number, done=done), flush=True)


def _home(job: Job, folders: Sequence[Path]) -> int | None:
    """The GPU whose folder has the arm's run: there it goes on from its last epoch."""
    return next((number for number, folder in enumerate(folders) if (folder / job.name).exists()), None)


def _begin(job: Job, gpu: str, folder: Path, command: Sequence[str], end: float) -> Worker:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{job.name}.log"
    own = ["--only", job.arm.name, "--seeds", str(job.seed), "--gpus", "1", "--work", str(folder), "--end", str(end)]
    print(f"{folder.name}: {job.name} begins, {job.seconds / 60:.1f} min on paper; see {log}", flush=True)
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*command, *own],
            stdin=subprocess.PIPE,  # see `end_with_parent`
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu},
        )
    return Worker(job, process, log, time.monotonic())


def _ended(worker: Worker, number: int, *, done: bool) -> str:
    minutes = (time.monotonic() - worker.began) / 60
    if done:
        return f"gpu{number}: {worker.job.name} ended after {minutes:.1f} min"
    last = worker.log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN:]
    head = f"gpu{number}: {worker.job.name} FAILED (exit code {worker.process.returncode}) after {minutes:.1f} min"
    return "\n    ".join([f"{head}; the last lines of {worker.log}:", *last])


def end_with_parent() -> None:
    """Have this process end when the parent is gone, however it went: a repeated call must not find it at work."""

    def wait() -> None:
        os.read(0, 1)  # the parent writes nothing, so this returns when its end of the pipe is closed
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
