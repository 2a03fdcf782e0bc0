"""Charts: figures over rounds, and methods side by side on every target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

from expkit.checkpoint import atomic_path

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#5F5F5F", "#9A9A9A")
_MOST_LINES = 9


def save_curve(history: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Validation and targets over rounds as PNG: lines for the last weights, dashes for the averaged targets."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    rounds = [entry["round"] for entry in history]
    axes.plot(rounds, [100 * entry["last"]["validation"] for entry in history], color="black", label="source, held out")
    disguised = [
        (entry["round"], 100 * entry["last"]["disguised"]) for entry in history if "disguised" in entry["last"]
    ]
    if disguised:
        axes.plot(*zip(*disguised, strict=True), color="black", linestyle=":", label="source, in disguise")
    measured = [entry for entry in history if "targets" in entry["last"]]
    names = list(measured[-1]["last"]["targets"]) if measured else []
    lines: list[tuple[str, Any]] = [(name, lambda found, name=name: found["targets"][name]) for name in names]
    if len(lines) > _MOST_LINES:
        lines = [(f"average of {len(names)} targets", lambda found: found["average"])]
    for (name, value), colour in zip(lines, _COLOURS, strict=False):
        shown = [entry["round"] for entry in measured]
        axes.plot(shown, [100 * value(entry["last"]) for entry in measured], color=colour, label=name, marker=".")
        averaged = [entry for entry in measured if "targets" in entry.get("averaged", {})]
        points = [100 * value(entry["averaged"]) for entry in averaged]
        axes.plot([entry["round"] for entry in averaged], points, color=colour, linestyle="--", linewidth=0.9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round (0: after pre-training); dashes: averaged weights")
    axes.set_ylabel("%")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    with atomic_path(path) as aside:
        figure.savefig(aside, format="png", dpi=150)


def save_bars(rows: Mapping[str, Mapping[str, tuple[float, float]]], path: Path, *, title: str) -> None:
    """Methods side by side as PNG.

    Args:
        rows: method -> target -> (mean, standard deviation over seeds), in [0, 1].
    """
    from matplotlib.figure import Figure

    targets = list(dict.fromkeys(target for row in rows.values() for target in row))
    figure = Figure(figsize=(max(6.4, 1.5 + 0.32 * len(targets) * (len(rows) + 1)), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(rows)
    for place, (method, row) in enumerate(rows.items()):
        offset = (place - (len(rows) - 1) / 2) * width
        drawn = axes.bar(
            [index + offset for index in range(len(targets))],
            [100 * row.get(target, (nan, nan))[0] for target in targets],
            width * 0.92,
            yerr=[100 * row.get(target, (nan, nan))[1] for target in targets],
            error_kw={"linewidth": 0.8},
            label=method,
            color=_COLOURS[place % len(_COLOURS)],
        )
        axes.bar_label(drawn, fmt="%.0f", padding=2, fontsize=6)
    axes.set_xticks(range(len(targets)), targets, rotation=20 if len(targets) > 5 else 0)
    axes.set_xlim(-0.5, len(targets) - 0.5)  # also where an outer bar is missing
    axes.set_ylabel("%")
    axes.set_title(title, fontsize=10)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    fitting = int(figure.get_figwidth() / (0.5 + 0.07 * max(map(len, rows))))  # inches of a patch and its text
    figure.legend(frameon=False, fontsize=8, ncols=max(1, min(len(rows), fitting)), loc="outside lower center")
    with atomic_path(path) as aside:
        figure.savefig(aside, format="png", dpi=150)
