"""The job behind `coral-spec eval`: acceptance of drafters with several heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from coral_spec.bench.records import PartialFile
from coral_spec.bench.runner import Bench, Settings, open_partial
from coral_spec.bench.runner import run as measure
from coral_spec.bench.summary import summarise_runs
from coral_spec.bench.tasks import Prompt
from coral_spec.bench.workers import run_workers

Figures = dict[str, Any]
_TIMES = ("tokens_per_second", "speedup", "seconds", "time_split", "speed", "identical", "ties", "bugs")


def evaluate_heads(
    settings: Mapping[str, Settings], questions: Mapping[str, list[Prompt]], json_path: Path | None
) -> tuple[list[Figures], list[PartialFile]]:
    """Runs of all heads, without figures of speed, and the files that hold their records until they are removed.

    Args:
        settings: by head; they differ in that alone.
        json_path: where the figures will go; each head's records are kept beside it.
    """
    runs: list[Figures] = []
    partials: list[PartialFile] = []
    for head, own in settings.items():
        path = json_path and json_path.with_stem(f"{json_path.stem}-{head.replace(':', '-').replace(',', '-')}")
        partial = open_partial(own, questions, path)
        partials.append(partial)
        try:
            if own.workers > 1:
                run_workers(own, questions, partial)
            else:
                measure(Bench.load(own), questions, partial)
        finally:
            partial.close()
        for figures in summarise_runs(own, questions, partial.records, {}):
            records = [_without(each, ("seconds", "judgement")) for each in figures["prompt_records"]]
            runs.append({"head": head, **_without(figures, _TIMES), "prompt_records": records})
    return runs, partials


def _without(figures: Figures, names: Sequence[str]) -> Figures:
    return {name: value for name, value in figures.items() if name not in names}


def table(runs: Sequence[Figures]) -> Table:
    """For the terminal."""
    out = Table(title="greedy" if not runs[0]["temperature"] else f"temperature {runs[0]['temperature']}")
    for column in ("task", "drafter", "head"):
        out.add_column(column, overflow="fold")
    for column in ("rows a round", "recall", "tau (prompts)", "looped"):
        out.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        tau = "-" if run["tau"] is None else f"{run['tau']:.3f} ({run['tau_prompts']:.3f})"
        out.add_row(
            run["task"],
            run["method"],
            run["head"],
            "-" if run["rows_per_round"] is None else f"{run['rows_per_round']:,.0f}",
            "-" if run["router_recall"] is None else f"{run['router_recall']:.3f}",
            tau,
            f"{run['looped']:.0%}",
        )
    return out
