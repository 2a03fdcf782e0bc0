"""A bar chart of tokens per second: methods side by side in every task, their speed-up written on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expkit.checkpoint import atomic_path

# Okabe and Ito's palette, which colour-blind readers can tell apart; baselines are greys.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
_GREYS = {"hf": "#BDBDBD", "hf-compiled": "#8F8F8F", "ar": "#5F5F5F"}


def save_chart(runs: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Write a PNG. Without measured speeds the bars show tau.

    Args:
        runs: entries as in the JSON; all of one temperature.
        path: the file to write.
        title: one line over the chart.
    """
    from matplotlib.figure import Figure

    timed = any(run["tokens_per_second"] is not None for run in runs)
    value = "tokens_per_second" if timed else "tau"
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    methods = list(dict.fromkeys(run["method"] for run in runs))
    bars = {(run["task"], run["method"]): run for run in runs}
    width = 0.8 / len(methods)
    figure = Figure(figsize=(max(6.4, 1.0 + 0.85 * len(tasks) * len(methods)), 4.4), layout="constrained")
    axes = figure.subplots()
    coloured = [method for method in methods if method not in _GREYS]
    for place, method in enumerate(methods):
        several = [bars[task, method] for task in tasks]
        offset = (place - (len(methods) - 1) / 2) * width
        drawn = axes.bar(
            [index + offset for index in range(len(tasks))],
            [run[value] or 0.0 for run in several],
            width * 0.92,
            label=method,
            color=_GREYS.get(method) or _COLOURS[coloured.index(method) % len(_COLOURS)],
        )
        axes.bar_label(drawn, [_label(run, value) for run in several], padding=2, fontsize=8)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel("tokens per second" if timed else "tokens per target forward (tau)")
    axes.set_title(title, fontsize=10)
    axes.margins(y=0.18)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=min(len(methods), 5), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    with atomic_path(path) as aside:
        figure.savefig(aside, format="png", dpi=150)


def _label(run: Mapping[str, Any], value: str) -> str:
    if run[value] is None:
        return ""
    if value == "tau":
        return f"{run['tau']:.2f}"
    shown = {"hf": (), "ar": ("hf",)}.get(run["method"], ("hf", "ar"))
    lines = [f"{run['speedup'][base]:.2f}x {base}" for base in shown if run["speedup"][base] is not None]
    return "\n".join([f"{run[value]:.1f}", *lines])
