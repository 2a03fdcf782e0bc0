"""A plot of what drafting did: acceptance per depth, rows read against tau, and where the time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expkit.checkpoint import atomic_path

MARKERS, LINES = "osD^v", ("-", "--", ":")  # of tasks; of drafters and heads beyond the tenth
NAMED = 6  # points that have room for a word beside them
PARTS = ("target", "drafter", "head", "rounds", "rest")


def save_telemetry(runs: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Write a PNG.

    Args:
        runs: entries as in the JSON (`coral_spec.bench.summary`); those with several heads have a `head`.
        path: the file to write.
        title: one line over the plot.
    """
    from matplotlib.figure import Figure

    drafted = [run for run in runs if run["depth_acceptance"]]
    timed = [run for run in drafted if any(run.get("time_split", {}).values())]
    figure = Figure(figsize=(16.5 if timed else 12, 4.4), layout="constrained")
    panels = figure.subplots(1, 3 if timed else 2)
    drafts = list(dict.fromkeys(_name(run, drafted, ("method", "head")) for run in drafted))
    tasks = list(dict.fromkeys(run["task"] for run in drafted))
    for run in drafted:
        rates, draft = run["depth_acceptance"], _name(run, drafted, ("method", "head"))
        place, task = drafts.index(draft), tasks.index(run["task"])
        colour, marker, line = f"C{place % 10}", MARKERS[task % len(MARKERS)], LINES[place // 10 % len(LINES)]
        panels[0].plot(range(1, len(rates) + 1), rates, marker=marker, linestyle=line, color=colour, markersize=4)
        if run["rows_per_round"]:
            panels[1].plot(run["rows_per_round"], run["tau"], marker, color=colour)
            if run["router_recall"] is not None and len(drafted) <= NAMED:
                panels[1].annotate(
                    f"recall {run['router_recall']:.3f}",
                    (run["rows_per_round"], run["tau"]),
                    xytext=(5, 4),
                    textcoords="offset points",
                    fontsize=7,
                )
    panels[0].set(xlabel="depth", ylabel="accepted share of rounds that reached it", ylim=(0, 1))
    panels[1].set(xlabel="head rows read per round", ylabel="tokens per target forward (tau)")
    panels[1].margins(x=0.2, y=0.2)
    panels[1].set_xlim(left=0)
    panels[1].locator_params(axis="x", nbins=5)
    panels[1].xaxis.set_major_formatter("{x:,.0f}")
    if timed:
        _draw_split(panels[2], timed)
    for number, draft in enumerate(drafts):
        panels[0].plot([], [], color=f"C{number % 10}", linestyle=LINES[number // 10 % len(LINES)], label=draft)
    for number, task in enumerate(tasks):
        panels[0].plot([], [], MARKERS[number % len(MARKERS)], color="grey", label=task)
    if drafted:
        figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    with atomic_path(path) as aside:
        figure.savefig(aside, format="png", dpi=150)


def _draw_split(axes: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    left = [0.0] * len(runs)
    for number, part in enumerate(PARTS):
        shares = [run["time_split"].get(part, 0.0) / sum(run["time_split"].values()) for run in runs]
        if any(shares):
            axes.barh(range(len(runs)), shares, left=left, label=part, color=f"C{number}")
            left = [before + share for before, share in zip(left, shares, strict=True)]
    axes.set_yticks(range(len(runs)), [_name(run, runs) for run in runs], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="share of the time", xlim=(0, 1))
    axes.legend(frameon=False, fontsize=7, ncols=len(PARTS), loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _name(
    run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], of: Sequence[str] = ("method", "task", "head")
) -> str:
    """As short as tells the runs apart."""
    keys = [key for key in of if len({each.get(key) for each in runs}) > 1]
    return ", ".join(str(run.get(key)) for key in keys or ["method"])
