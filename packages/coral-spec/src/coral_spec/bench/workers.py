"""Acceptance measured by several processes on one device: tau is as valid as ever, speed is not measured."""

from __future__ import annotations

import queue
from collections.abc import Mapping
from multiprocessing import get_context
from typing import Any

from coral_spec.bench.records import Key, PartialFile, Record
from coral_spec.bench.runner import Bench, Settings
from coral_spec.bench.tasks import Prompt
from expkit.cli import progress

Job = tuple[str, int, Prompt]

_POLL_SECONDS = 1.0


def run_workers(settings: Settings, tasks: Mapping[str, list[Prompt]], partial: PartialFile) -> None:
    """Measure all that `partial` does not hold yet; every process takes each W-th prompt.

    Raises:
        UsageError: as in a single process, from a worker.
        RuntimeError: a worker was killed, for instance for want of memory.
    """
    done = frozenset(partial.records)
    jobs = [(task, index, prompt) for task, prompts in tasks.items() for index, prompt in enumerate(prompts)]
    left = [job for job in jobs if any((job[0], job[2].id, name) not in done for name in settings.methods)]
    count = min(settings.workers, len(left))
    context = get_context("spawn")  # CUDA cannot be used in a forked process
    answers: Any = context.Queue()
    workers = [
        context.Process(target=_work, args=(settings, left[rank::count], done, count, answers), daemon=True)
        for rank in range(count)
    ]
    for worker in workers:
        worker.start()
    try:
        with progress() as bar:
            shown = bar.add_task("prompts", total=len(jobs), completed=len(jobs) - len(left))
            for _ in left:
                for record in _next(answers, workers):
                    partial.add(record)
                bar.advance(shown)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _next(answers: Any, workers: list[Any]) -> list[Record]:
    """The records of one more prompt, whoever measured it."""
    while True:
        dead = [worker.exitcode for worker in workers if worker.exitcode]
        try:
            answer = answers.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            if not dead and all(worker.exitcode is not None for worker in workers):
                raise RuntimeError("the worker processes ended without an answer; try --workers 1") from None
            if dead:
                raise RuntimeError(f"a worker process ended with code {dead[0]}; try fewer --workers") from None
            continue
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]


def _work(settings: Settings, jobs: list[Job], done: frozenset[Key], count: int, answers: Any) -> None:
    import signal

    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends its workers
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    try:
        bench = Bench.load(settings)
        for task, index, prompt in jobs:
            answers.put(bench.measure(task, index, prompt, skip=done.__contains__))
    except Exception as error:
        answers.put(error)
