"""Methods x targets, mean and spread over seeds, as Markdown, CSV or LaTeX."""

from __future__ import annotations

import io
import json
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from csv import writer as csv_writer
from dataclasses import asdict
from pathlib import Path
from typing import Any

from expkit.config import flatten
from expkit.errors import UsageError

Cell = tuple[float, float]
AVERAGE = "average"


def read_result(path: Path) -> dict[str, Any]:
    """The figures of a finished run, from its folder or its JSON file.

    Raises:
        UsageError: no finished run, or a run that was measured on no target.
    """
    file = path / "result.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{path} is no finished run ({file} does not exist)")
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        has = any("targets" in each and AVERAGE in each for each in found["selections"].values())
        str(found["name"]), int(found["seed"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{file} holds no figures of a run") from None
    if not has:
        raise UsageError(f"{path} was measured on no target; train it with --target")
    return found


def group(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Runs that differ in their seed alone, by label: the run's name without its `-seedN`.

    Raises:
        UsageError: runs of one label that have one seed, or differ in more than it.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        label = str(result["name"]).removesuffix(f"-seed{result['seed']}")
        groups.setdefault(label, []).append(result)
    for label, runs in groups.items():
        seeds = [run["seed"] for run in runs]
        if len(set(seeds)) < len(seeds):
            raise UsageError(f"{label}: seed {max(seeds, key=seeds.count)} is there more than once")
        first, *rest = (_settings(str(run.get("config", ""))) for run in runs)
        if any(each != first for each in rest):
            raise UsageError(f"{label}: its runs differ in more than their seed; give them names of their own")
    return groups


def _settings(config: str) -> dict[str, Any]:
    """Keys of a `config.toml` that bear on figures, those of single runs left out. What a run of before a key was there
    does not name had that key's default."""
    from pden.training.config import TrainConfig  # which imports what evaluates

    try:
        named = flatten(tomllib.loads(config))
    except tomllib.TOMLDecodeError:
        return {"": config}
    own = ("name", "seed", "device", "checkpoint_every", "log_every")
    every = {**flatten(asdict(TrainConfig())), **named}
    # As text, so that nan equals itself, and a list a tuple.
    return {key: json.dumps(value) for key, value in every.items() if key not in own}


def summarise(groups: Mapping[str, Sequence[Mapping[str, Any]]], selection: str) -> dict[str, dict[str, Cell]]:
    """Label -> target -> (mean, sample standard deviation over seeds), the targets' average last.

    Raises:
        UsageError: a run without this selection.
    """
    table: dict[str, dict[str, Cell]] = {}
    for label, results in groups.items():
        rows = []
        for result in results:
            chosen = result["selections"].get(selection)
            if chosen is None or "targets" not in chosen:
                raise UsageError(f'{result["name"]} has no figures for selection "{selection}"')
            rows.append({**chosen["targets"], AVERAGE: chosen[AVERAGE]})
        names = [name for name in rows[0] if all(name in row for row in rows)]
        table[label] = {name: spread([row[name] for row in rows]) for name in names}
    return table


def spread(values: Sequence[float]) -> Cell:
    """Mean and sample standard deviation; the latter is 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def columns(table: Mapping[str, Mapping[str, Cell]]) -> list[str]:
    """All targets in order of appearance, the average last."""
    names = dict.fromkeys(name for row in table.values() for name in row if name != AVERAGE)
    return [*names, AVERAGE]


def markdown(table: Mapping[str, Mapping[str, Cell]]) -> str:
    """A Markdown table in percent."""
    heads = columns(table)
    lines = [f"| method | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    for label, row in table.items():
        form = "{:.2f}" + _spread(row, " ±")
        lines.append(f"| {label} | {' | '.join(_cell(row.get(head), form) for head in heads)} |")
    return "\n".join(lines) + "\n"


def csv(table: Mapping[str, Mapping[str, Cell]], selection: str, seeds: Mapping[str, Sequence[int]]) -> str:
    """Comma-separated: method, target, mean, standard deviation, in percent, the weights measured, how many seeds."""
    file = io.StringIO()
    writer = csv_writer(file, lineterminator="\n")
    writer.writerow(["method", "target", "mean", "std", "selection", "seeds"])
    for label, row in table.items():
        for name, (mean, std) in row.items():
            writer.writerow([label, name, f"{100 * mean:.4f}", f"{100 * std:.4f}", selection, len(seeds[label])])
    return file.getvalue()


def latex(table: Mapping[str, Mapping[str, Cell]]) -> str:
    """A LaTeX tabular (booktabs) in percent, the best mean of each column in bold."""
    heads = columns(table)
    best = {head: max((row[head][0] for row in table.values() if head in row), default=0.0) for head in heads}
    lines = [rf"\begin{{tabular}}{{l{'r' * len(heads)}}}", r"\toprule"]
    lines += [" & ".join(["Method", *map(_escape, heads)]) + r" \\", r"\midrule"]
    for label, row in table.items():
        cells = []
        for head in heads:
            top = head in row and row[head][0] == best[head]
            mean = r"\textbf{{{:.2f}}}" if top else "{:.2f}"
            cells.append(_cell(row.get(head), mean + _spread(row, r" $\pm$")))
        lines.append(" & ".join([_escape(label), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def about(table: Mapping[str, Mapping[str, Cell]], selection: str, seeds: Mapping[str, Sequence[int]]) -> str:
    """A sentence on what a table shows."""
    count = len(columns(table)) - 1
    average = (
        f"; average over {count} target{'s' * (count > 1)}" if any(AVERAGE in row for row in table.values()) else ""
    )
    runs = "; ".join(f"{label} {list(each)}" for label, each in seeds.items())
    return f"selection: {selection}{average}; seeds: {runs}"


def render(
    table: Mapping[str, Mapping[str, Cell]],
    path: Path,
    selection: str,
    seeds: Mapping[str, Sequence[int]],
    notes: Sequence[str],
) -> str:
    """The table in the form that the file's suffix asks for: .md, .csv or .tex, with what `about` says of it.

    Args:
        selection: which weights were measured.
        seeds: those of each row.
        notes: below the table in .md, as comments above it in .tex; .csv has no place for them.

    Raises:
        UsageError: another suffix.
    """
    told = [about(table, selection, seeds), *notes]
    if path.suffix == ".md":
        return markdown(table) + "".join(f"\n{each}\n" for each in told)
    if path.suffix == ".tex":
        return "".join(f"% {each}\n" for each in told) + latex(table)
    if path.suffix == ".csv":
        return csv(table, selection, seeds)
    raise UsageError(f"{path}: the table can be .md, .csv or .tex")


def _cell(cell: Cell | None, form: str) -> str:
    return "-" if cell is None else form.format(100 * cell[0], 100 * cell[1])


def _spread(row: Mapping[str, Cell], sign: str) -> str:
    """Where the deviation stands in a cell; nowhere in a row of one seed, which has none."""
    return sign + " {:.2f}" if any(std > 0 for _, std in row.values()) else ""


def _escape(text: str) -> str:
    return "".join("\\" + each if each in "&%$#_{}" else each for each in text)
