"""Time of calls on a GPU, captured one after another in a CUDA graph: what they take where launching costs nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

REPEATS = 15
WARM_UP = 0.05  # seconds: a GPU that has been idle takes a while to its full clock


def microseconds(calls: Sequence[Callable[[], Any]]) -> float:
    """Median time of one call; without a GPU every call is made once, and the answer is not a number."""
    if not torch.cuda.is_available():
        for call in calls:
            call()
        return float("nan")
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times, until = [], time.perf_counter() + WARM_UP
    while time.perf_counter() < until:
        graph.replay()
        torch.cuda.synchronize()
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)
