"""What the study has found: tables, charts, and the figures that were aimed at."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from study_jobs import ABLATION_ROUNDS, METHODS, PARTS, SEEDS, WHOLE, jobs_of

from expkit.checkpoint import write_json, write_text
from expkit.rundir import evidence
from pden.evaluation import table
from pden.evaluation.chart import save_bars


def report(out: Path, to: Path) -> None:
    """One JSON file for each part that has figures; where it has targets, a table and a chart too. The digits' methods
    stand in one table besides, with the figures that were aimed at. What was published before stays: see `restore`."""
    restore(to, out)
    record = publishable(evidence())
    files = {part: [out / part / job.name / "result.json" for job in jobs_of(part)] for part in PARTS}
    files = {part: [file for file in each if file.is_file()] for part, each in files.items()}
    found = {part: [json.loads(file.read_text(encoding="utf-8")) for file in each] for part, each in files.items()}
    for part, runs in found.items():
        if not runs:
            continue
        about: dict[str, Any] = {**record, "runs": [publishable(each) for each in runs]}
        if part == "ablation":
            whole = [each for each in (*found["paper"], *found["ours"]) if each["seed"] in SEEDS[:2]]
            runs = [*(after_round(each, ABLATION_ROUNDS) for each in whole), *runs]
        if part == "cifar":
            print(f"{part}, last checkpoint, means over 15 corruptions by level\n\n{table.markdown(by_level(runs))}")
            runs = [hardest(each) for each in runs]
        if all("targets" in each["selections"]["last"] for each in runs):
            about["selections"] = summaries(part, runs, to)
        write_json(to / f"{part}.json", about)
        pictures = [file.with_name(f"{name}.png") for file in files[part] for name in ("curve", "gallery")]
        for picture in pictures if part in ("paper", "ours") else ():
            if picture.is_file():
                shutil.copyfile(picture, to / f"{part}-{picture.name}")
    methods = [*found["baselines"], *found["paper"], *found["ours"]]
    if methods:
        selections = summaries("digits", methods, to)
        aims = aimed_at(selections, found)
        print(aims)
        write_json(to / "digits.json", {**record, "selections": selections, "aims": aims.splitlines()})
    if (out / "chosen.json").is_file():
        chosen = json.loads((out / "chosen.json").read_text(encoding="utf-8"))
        write_json(to / "chosen.json", publishable(chosen))


def aimed_at(digits: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> str:
    """The figures that the study was to reach, a line each, as far as they are there."""
    rows: list[tuple[str, float, float, bool]] = []  # what, measured, aimed at, whether more is better

    def mean(label: str, target: str, selection: str = "last") -> float | None:
        cell = digits.get(selection, {}).get(label, {}).get(target)
        return None if cell is None else 100 * float(cell["mean"])

    def aim(what: str, value: float | None, wanted: float, more: bool = True) -> None:
        if value is not None:
            rows.append((what, value, wanted, more))

    for target, paper, ours in (("mnist-m", 80, 84), ("usps", 84, 88)):
        aim(f"the paper's settings, {target}, last (%)", mean("pden-paper", target), paper)
        aim(f"ours, {target}, averaged (%)", mean("pden-ours", target, "averaged"), ours)
    rivals = [mean(each, "average", which) for each in METHODS for which in ("last", "averaged")]
    best, own = (
        max((each for each in rivals if each is not None), default=None),
        mean("pden-ours", "average", "averaged"),
    )
    if best is not None and own is not None:
        aim("ours, averaged, above the best baseline's better weights, on average (points)", own - best, 3)
    for target, published in (("mnist-m", 52.7), ("usps", 77.0)):
        value = mean("erm", target)
        aim(
            f"ERM, {target}, last, off the literature's {published} (points)",
            value and abs(value - published),
            5,
            False,
        )
    for each in found["paper"]:
        if each["seed"] == SEEDS[0]:  # alone on its GPU
            card = ", ".join(each["hardware"]["gpu"] or ["CPU"])
            aim(f"20 rounds alone on one {card} (minutes)", each["seconds"] / 60, 8, False)
            aim("their memory (GB)", each["reserved_memory_bytes"] / 1e9, 2, False)
            aim("their gate's share of the time (%)", 100 * each["gate_share"], 3, False)
    for each in found["cifar"]:
        if each["name"] == "pden-seed0":  # the paper's losses: the better one of two would be chosen by the targets
            level = 100 * hardest(each)["selections"]["last"]["average"]
            aim("PDEN, CIFAR-10-C (recomputed), level 5, 15 corruptions (%)", level, 74)
    lines = [
        f"{what}: {value:.2f}, aimed at {'>=' if more else '<='} {wanted:g}: "
        f"{'met' if (value >= wanted if more else value <= wanted) else 'missed'}"
        for what, value, wanted, more in rows
    ]
    return "\n".join(lines)


def after_round(result: dict[str, Any], number: int) -> dict[str, Any]:
    """A longer run as it was after so many rounds, which is what a run of that length would have been."""
    entry = next(each for each in result["history"] if each["round"] == number)
    selections = {name: {**entry[name], "round": number} for name in ("last", "averaged") if name in entry}
    label = WHOLE[result["name"].rpartition("-seed")[0]]
    return {**result, "name": f"{label}-seed{result['seed']}", "selections": selections}


def hardest(result: dict[str, Any]) -> dict[str, Any]:
    """Level 5 of the corruptions alone; their average is without the clean images, as it is published."""
    selections = {}
    for name, figures in result["selections"].items():
        rows = {target: value for target, value in figures["targets"].items() if target.endswith("/5")}
        selections[name] = {**figures, "targets": rows, "average": sum(rows.values()) / len(rows)}
    return {**result, "selections": selections}


def by_level(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, table.Cell]]:
    """Each run's last checkpoint, averaged over the corruptions of a level."""
    rows = {}
    for result in runs:
        levels: dict[str, list[float]] = {}
        for name, value in result["selections"]["last"]["targets"].items():
            _, _, level = name.partition("/")
            for column in (f"level {level}", table.AVERAGE) if level else (name,):
                levels.setdefault(column, []).append(value)
        rows[result["name"]] = {name: (sum(values) / len(values), 0.0) for name, values in levels.items()}
    return rows


def summaries(part: str, runs: Sequence[dict[str, Any]], to: Path) -> dict[str, Any]:
    """Means and spreads by selection; of the last weights, and the methods' averaged ones, also a table and a chart."""
    selections: dict[str, Any] = {}
    groups = table.group(runs)
    for selection in ("last", "averaged", "source-validation", "oracle"):
        having = {
            label: each
            for label, each in groups.items()
            if all("targets" in one["selections"].get(selection, {}) for one in each)
        }
        rows = table.summarise(having, selection) if having else {}
        selections[selection] = {
            label: {name: {"mean": mean, "std": std} for name, (mean, std) in row.items()}
            for label, row in rows.items()
        }
        if rows and (selection == "last" or (selection, part) == ("averaged", "digits")):
            title, name = f"{part}, {selection} weights", part if selection == "last" else f"{part}-{selection}"
            print(f"{title}\n\n{table.markdown(rows)}")
            save_bars(rows, to / f"{name}.png", title=title)
            write_text(to / f"{name}.md", table.markdown(rows))
    return selections


def publishable(result: dict[str, Any]) -> dict[str, Any]:
    """What a command has found, without the paths of the machine that it ran on."""
    command = str(result["command"])
    for option, word in (("data-dir", "DATA"), ("runs", "WORK"), ("work", "WORK"), ("out", "OUT"), ("to", "RESULTS")):
        command = re.sub(rf"(--{option}) \S+", rf"\1 {word}", command)
    command = re.sub(r"(--config) \S*?(packages/pden/configs/)", r"\1 \2", command)
    return {**result, "command": command}


def restore(to: Path, out: Path) -> int:
    """Write the figures that were published and are not in `out`, so that a study goes on elsewhere; how many."""
    count = 0
    for part in PARTS:
        file = to / f"{part}.json"
        for run in json.loads(file.read_text(encoding="utf-8"))["runs"] if file.is_file() else ():
            path = out / part / run["name"] / "result.json"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, run)
                count += 1
    if (to / "chosen.json").is_file() and not (out / "chosen.json").exists():
        shutil.copyfile(to / "chosen.json", out / "chosen.json")
    return count
