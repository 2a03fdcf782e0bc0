"""From records to the figures of the JSON and the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from coral_spec.bench.methods import BASELINES
from coral_spec.bench.records import Key, Record
from coral_spec.bench.runner import Settings
from coral_spec.bench.tasks import Prompt
from coral_spec.check.noise import Judgement, summarise
from coral_spec.statistics import depth_acceptance

PERIOD, TIMES = 32, 3  # of an answer that goes round in circles
DEFINITIONS = {
    "tokens_per_second": "all new tokens over all decoding time, prefill included; the median repeat of every prompt",
    "tau": "tokens per target forward after prefill, before truncation at a stop or the limit; mean over rounds",
    "tau_prompts": "the same, mean over prompts",
    "trees": "shapes of the draft tree, and for how many answers",
    "depth_acceptance": "at each tree level, the accepted share of the rounds that had reached it",
    "rows_per_round": "head rows read in a round, all levels, a router's weights counted as rows; mean over rounds",
    "router_recall": "share of the target's tokens, drawn where children were drafted, among the rows read there",
    "looped": f"share of answers that end in the same block of at most {PERIOD} tokens, {TIMES} times or more",
    "speedup": "tokens per second over those of the named baseline: same prompts, same machine, same run",
    "identical": "greedy ids against ar: exact, ties (gaps within the noise of the working precision) or bug",
}
NOT_MEASURED = "not measured (workers)"


def summarise_runs(
    settings: Settings,
    tasks: Mapping[str, Sequence[Prompt]],
    records: Mapping[Key, Record],
    judgements: Mapping[Key, Judgement],
) -> list[dict[str, Any]]:
    """One entry per task and method, in the order they were asked for."""
    runs: list[dict[str, Any]] = []
    for task, prompts in tasks.items():
        found = {name: [records[task, prompt.id, name] for prompt in prompts] for name in settings.methods}
        speeds = {name: tokens_per_second(several) for name, several in found.items()}
        for name, several in found.items():
            runs.append(_run(settings, task, name, several, speeds, judgements))
    return runs


def tokens_per_second(records: Iterable[Record]) -> float:
    """Over all prompts together."""
    several = list(records)
    return sum(len(record.ids) for record in several) / sum(record.median_seconds for record in several)


def _run(
    settings: Settings,
    task: str,
    name: str,
    records: list[Record],
    speeds: Mapping[str, float],
    judgements: Mapping[Key, Judgement],
) -> dict[str, Any]:
    timed = settings.workers == 1
    rounds = [length for record in records for length in record.accept_lengths or []]
    taus = [record.tau for record in records if record.tau is not None]
    judged = [judgements[record.key] for record in records if record.key in judgements]
    bases = [base for base in BASELINES if base in speeds or base != "hf-compiled"]
    speedup = {base: speeds[name] / speeds[base] if timed and base in speeds else None for base in bases}
    identical: str | None = summarise(each.verdict for each in judged) if judged else None
    if name == "ar" and settings.temperature == 0:
        identical = "exact"
    return {
        "method": name,
        "task": task,
        "temperature": settings.temperature,
        "tokens_per_second": speeds[name] if timed else None,
        "tau": 1.0 + sum(rounds) / len(rounds) if rounds else None,
        "tau_prompts": sum(taus) / len(taus) if taus else None,
        "speedup": speedup,
        "identical": identical,
        **({} if timed else {"speed": NOT_MEASURED}),
        "prompts": len(records),
        "tokens": sum(len(record.ids) for record in records),
        "seconds": sum(record.median_seconds for record in records) if timed else None,
        "rounds": len(rounds) if records[0].accept_lengths is not None else None,
        "trees": Counter(record.tree for record in records if record.tree is not None),
        "depth_acceptance": depth_acceptance(rounds, max(record.depth for record in records)),
        **_telemetry(records),
        "looped": sum(looped(record.ids) for record in records) / len(records),
        "time_split": _sum_parts(records) if timed else {},
        "ties": sum(each.verdict == "tie" for each in judged),
        "bugs": sum(each.verdict == "bug" for each in judged),
        "prompt_records": [_prompt(record, judgements.get(record.key), timed) for record in records],
    }


def _telemetry(records: Iterable[Record]) -> dict[str, float | None]:
    """Means of what the records tell: over rounds, and over the tokens that recall counts."""
    sums = {"rows_per_round": [0.0, 0.0], "router_recall": [0.0, 0.0]}
    for record in records:
        lengths = record.accept_lengths or []
        weights = {"rows_per_round": len(lengths), "router_recall": sum(min(n + 1, record.depth) for n in lengths)}
        for name, value in record.telemetry.items():
            sums[name][0] += value * weights[name]
            sums[name][1] += weights[name]
    return {name: total / weight if weight else None for name, (total, weight) in sums.items()}


def looped(ids: Sequence[int]) -> bool:
    """Whether an answer ends in one block of at most :data:`PERIOD` tokens, :data:`TIMES` times or more."""
    for period in range(1, PERIOD + 1):
        tail = list(ids[-period * TIMES :])
        if len(tail) == period * TIMES and tail == tail[:period] * TIMES:
            return True
    return False


def _sum_parts(records: Iterable[Record]) -> dict[str, float]:
    total: dict[str, float] = {}
    for record in records:
        for part, seconds in record.time_split.items():
            total[part] = total.get(part, 0.0) + seconds
    return total


def _prompt(record: Record, judgement: Judgement | None, timed: bool) -> dict[str, Any]:
    return {
        "prompt": record.prompt,
        "prompt_tokens": record.prompt_tokens,
        "tokens": len(record.ids),
        "seconds": record.seconds if timed else None,
        "tau": record.tau,
        "tree": record.tree,
        "accept_lengths": record.accept_lengths,
        "judgement": vars(judgement) if judgement else None,
    }


def table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """The runs as a table for the terminal."""
    out = Table(title="greedy" if not runs[0]["temperature"] else f"temperature {runs[0]['temperature']}")
    out.add_column("task", no_wrap=True)
    out.add_column("method", no_wrap=True)
    for column in ("tokens/s", "x ar", "x hf", "tau (prompts)"):
        out.add_column(column, justify="right")
    out.add_column("identical")
    for index, run in enumerate(runs):
        last = index + 1 == len(runs) or runs[index + 1]["task"] != run["task"]
        out.add_row(
            run["task"],
            run["method"],
            _number(run["tokens_per_second"], 1),
            _number(run["speedup"]["ar"], 2),
            _number(run["speedup"]["hf"], 2),
            "-" if run["tau"] is None else f"{run['tau']:.2f} ({run['tau_prompts']:.2f})",
            _identical(run),
            end_section=last,
        )
    return out


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _identical(run: Mapping[str, Any]) -> str:
    match run["identical"]:
        case "ties":
            return f"ties ({run['ties']} of {run['prompts']})"
        case "bug":
            return f"[bold red]bug ({run['bugs']} of {run['prompts']})[/]"
        case None:
            return "-"
        case other:
            return str(other)
