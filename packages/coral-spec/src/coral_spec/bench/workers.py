"""Acceptance measured by several processes on one device: tau is as valid as ever, speed is not measured."""

from __future__ import annotations

import os
import queue
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from typing import Any

from coral_spec.bench.records import Key, PartialFile
from coral_spec.bench.runner import Bench, Settings
from coral_spec.bench.tasks import Prompt
from expkit.cli import progress

Job = tuple[str, int, Prompt]

_POLL_SECONDS = 0.5


def run_workers(settings: Settings, tasks: Mapping[str, list[Prompt]], partial: PartialFile) -> None:
    """Measure all that `partial` does not hold yet; every process takes each W-th prompt.

    Raises:
        UsageError: as in a single process, from a worker.
    """
    done = frozenset(partial.records)
    jobs = [(task, index, prompt) for task, prompts in tasks.items() for index, prompt in enumerate(prompts)]
    left = [job for job in jobs if any((job[0], job[2].id, name) not in done for name in settings.methods)]
    count = min(settings.workers, len(left))
    if not count:
        return
    context = get_context("spawn")  # CUDA cannot be used in a forked process
    manager = SyncManager(ctx=context)
    manager.start()
    with manager, ProcessPoolExecutor(count, context) as pool, progress() as bar:
        shown = bar.add_task("prompts", total=len(jobs), completed=len(jobs) - len(left))
        records: Any = manager.Queue()
        futures = [pool.submit(_work, settings, left[rank::count], done, count, records) for rank in range(count)]
        while True:
            running = any(not future.done() for future in futures)
            try:
                for record in records.get(timeout=_POLL_SECONDS if running else 0.01):
                    partial.add(record)
                bar.advance(shown)
            except queue.Empty:
                for future in futures:
                    if future.done():
                        future.result()  # raises what the worker raised
                if not running:
                    return


def _work(settings: Settings, jobs: list[Job], done: frozenset[Key], count: int, records: Any) -> None:
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    bench = Bench.load(settings)
    for task, index, prompt in jobs:
        records.put(bench.measure(task, index, prompt, skip=done.__contains__))
