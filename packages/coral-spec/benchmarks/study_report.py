"""The study's tables from its JSON files: tau by recipe with intervals, heads at equal drafter, speed.

    python packages/coral-spec/benchmarks/study_report.py RESULTS --json OUT.json --curve CURVE.png

RESULTS is WORK/results of `study.py`, or this package's results/study. Differences between recipes and between heads
are paired: same seed, same prompt, and where they were measured in fp32 the same answer; sampled answers differ. Two
95 % intervals: one over other prompts, which resamples prompts within each set for the trainings that there are; and
Student's over other trainings, from one mean difference a seed, which is wide for few seeds. Logs of trainings are
large and not kept: `--before` is an earlier report, from which those are taken that RESULTS has no longer. Trainings
below training/again were made on answers written anew: what is simulated on those compares among themselves only.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expkit.checkpoint import atomic_path, write_json
from expkit.metrics import read_metrics
from expkit.rundir import evidence

SAMPLES, SEED = 10_000, 0
TERMS = {"smollm2": "t0", "gemma3": "t1"}  # temperature at which recipes are compared
PAIRS = (("hass", "eagle2"), ("csra", "hass"), ("csra", "eagle2"), ("weight1", "hass"), ("weight1", "csra"))
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # 97.5 % quantiles by degrees of freedom
SHORT = 64  # tokens: long answers of small models repeat themselves

Taus = dict[tuple[int, str, str], list[float]]  # by seed, task and recipe: one for each prompt


def require_same_prompts(runs: Sequence[dict[str, Any]]) -> None:
    """Runs are paired by their prompts' places, so these must be the same.

    Raises:
        ValueError: two runs of a set have not.
    """
    found: dict[str, list[str]] = {}
    for run in runs:
        prompts = [each["prompt"] for each in run["prompt_records"]]
        if found.setdefault(run["task"], prompts) != prompts:
            raise ValueError(f"{run['task']} was not measured on the same prompts everywhere: nothing can be paired")


def read_taus(results: Path, family: str, most: int | None = None) -> Taus:
    """Per-prompt tau of all recipes and weights; of the first ``most`` tokens of each answer, if given."""
    found: Taus = {}
    runs: list[dict[str, Any]] = []
    for path in sorted(results.glob(f"{family}-*-seed*-{TERMS[family]}.json")):
        seed = int(re.findall(r"seed(\d+)", path.name)[0])
        for run in json.loads(path.read_text())["runs"]:
            runs.append(run)
            records = run["prompt_records"]
            found[seed, run["task"], run["method"]] = [
                each["tau"] if most is None else tau_of(each["accept_lengths"], most) for each in records
            ]
    require_same_prompts(runs)
    return found


def tau_of(accept_lengths: Sequence[int], most: int) -> float | None:
    """Tokens per round over the rounds of an answer's first tokens."""
    rounds, tokens = 0, 0
    for length in accept_lengths:
        if tokens >= most:
            break
        rounds, tokens = rounds + 1, tokens + length + 1
    return tokens / rounds if rounds else None


def looped(results: Path, family: str) -> dict[str, float]:
    """Share of answers that end in a repetition, by recipe."""
    found: dict[str, list[float]] = defaultdict(list)
    for path in sorted(results.glob(f"{family}-recipes-seed*-{TERMS[family]}.json")):
        for run in json.loads(path.read_text())["runs"]:
            found[run["method"]].append(run["looped"])
    return {recipe: sum(shares) / len(shares) for recipe, shares in found.items()}


def seeds_of(taus: Taus, a: str, b: str) -> list[int]:
    """Seeds that both recipes have."""
    return sorted({seed for seed, _, recipe in taus if recipe == a} & {seed for seed, _, recipe in taus if recipe == b})


def mean_difference(taus: Taus, a: str, b: str, draw: random.Random | None) -> float:
    """Mean over sets of the mean over seeds and prompts of tau(a) - tau(b), prompts resampled if `draw` is given."""
    chosen = seeds = seeds_of(taus, a, b)
    tasks = sorted({task for _, task, _ in taus})
    means = []
    for task in tasks:
        prompts = range(len(taus[seeds[0], task, a]))
        picked = draw.choices(prompts, k=len(prompts)) if draw else list(prompts)
        pairs = [(taus[seed, task, a][at], taus[seed, task, b][at]) for seed in chosen for at in picked]
        kept = [x - y for x, y in pairs if x is not None and y is not None]
        means.append(sum(kept) / len(kept))
    return sum(means) / len(means)


def compare(taus: Taus, pairs: Sequence[tuple[str, str]] = PAIRS) -> dict[str, Any]:
    """Mean tau of each recipe (per prompt, over sets and seeds) and the paired differences."""
    by_recipe: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (_, task, recipe), values in taus.items():
        by_recipe[recipe][task] += [value for value in values if value is not None]
    means = {
        recipe: {task: sum(values) / len(values) for task, values in tasks.items()}
        for recipe, tasks in by_recipe.items()
    }
    differences = {}
    for a, b in pairs:
        if seeds_of(taus, a, b):
            draw = random.Random(SEED)
            samples = sorted(mean_difference(taus, a, b, draw) for _ in range(SAMPLES))
            common = seeds_of(taus, a, b)
            values = [
                [each for seed in common for each in taus[seed, task, b] if each is not None] for task in means[b]
            ]
            base = statistics.fmean(map(statistics.fmean, values))
            middle = mean_difference(taus, a, b, None)
            differences[f"{a} - {b}"] = {
                "mean": middle,
                "share": middle / base,
                "interval_95_prompts": [samples[SAMPLES // 40], samples[-SAMPLES // 40]],
                **over_seeds(taus, a, b),
            }
    return {"tau_prompts": means, "seeds": len({seed for seed, _, _ in taus}), "differences": differences}


def over_seeds(taus: Taus, a: str, b: str) -> dict[str, Any]:
    """The mean difference of every seed, and Student's 95 % interval of their mean where there are several."""
    seeds = seeds_of(taus, a, b)
    each = [
        mean_difference({key: value for key, value in taus.items() if key[0] == seed}, a, b, None) for seed in seeds
    ]
    return {"by_seed": each, "interval_95_seeds": student(each)}


def student(values: Sequence[float]) -> list[float] | None:
    """Student's 95 % interval of the mean; None for one value."""
    if len(values) < 2:
        return None
    middle = statistics.fmean(values)
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return [middle - half, middle + half]


def simulated(lines: Mapping[str, dict[str, Any]], family: str) -> dict[str, Any]:
    """Tokens per round on held-out answers, the same for all seeds, by recipe and seed; and their differences.

    Args:
        lines: of :func:`trainings`.
    """
    found: dict[str, dict[int, float]] = {}
    for recipe in ("eagle2", "hass", "csra", "weight1"):
        names = {seed: f"{family}-{recipe}-{seed}" for seed in range(10)}
        found[recipe] = {seed: lines[name]["tau_sim"] for seed, name in names.items() if name in lines}
    report: dict[str, Any] = {"tau": found}
    for a, b in PAIRS:
        each = [found[a][seed] - found[b][seed] for seed in sorted(set(found[a]) & set(found[b]))]
        if each:
            report[f"{a} - {b}"] = {"mean": statistics.fmean(each), "by_seed": each, "interval_95_seeds": student(each)}
    return report


def heads(results: Path, family: str) -> list[dict[str, Any]]:
    """Rows read, recall and tau of every head, means over the sets."""
    table = []
    for path in sorted([*results.glob(f"{family}-heads*.json"), *results.glob(f"{family}-active-groups.json")]):
        runs = json.loads(path.read_text())["runs"]
        for head in dict.fromkeys(run["head"] for run in runs):
            own = [run for run in runs if run["head"] == head]
            recalls = [run["router_recall"] for run in own if run["router_recall"] is not None]
            table.append(
                {
                    "file": path.name,
                    "head": head,
                    "rows_per_round": own[0]["rows_per_round"],
                    "router_recall": sum(recalls) / len(recalls) if recalls else None,
                    "tau": sum(run["tau"] for run in own) / len(own),
                }
            )
    return table


def head_differences(results: Path, family: str) -> dict[str, Any] | None:
    """A router against other heads of as many weights, and every head against the full one, paired."""
    path = results / f"{family}-heads.json"
    if not path.is_file():
        return None
    runs = json.loads(path.read_text())["runs"]
    for other in sorted(results.glob(f"{family}-heads-*.json")):  # of low rank, each a drafter's folder of its own
        runs += [{**run, "head": run["method"]} for run in json.loads(other.read_text())["runs"]]
    require_same_prompts(runs)
    taus = {(0, run["task"], run["head"]): [each["tau"] for each in run["prompt_records"]] for run in runs}
    rows = {run["head"]: run["rows_per_round"] for run in runs}
    routed = [head for head in rows if head.startswith("routed")]
    # ranks are whole numbers, so that weights are equal to a percent only
    pairs = [(a, b) for b in rows if b not in ("full", *routed) for a in routed if abs(rows[a] / rows[b] - 1) < 0.01]
    return compare(taus, [*pairs, *((head, "full") for head in rows if head != "full")])


def weights_on_equal_answers(results: Path, family: str) -> dict[str, Any] | None:
    """The alignment's weights, seed 0, where both learned from the answers written anew: on the heads' prompts.

    The heads are those of weight 3 trained again; the recipes' weight 3 and HASS learned from the earlier answers.
    """
    files = {
        "csra again": (f"{family}-heads", "csra+router"),
        "weight1": (f"{family}-weight1-seed0-t0", "weight1"),
        "csra": (f"{family}-recipes-seed0-t0", "csra"),
        "hass": (f"{family}-recipes-seed0-t0", "hass"),
    }
    if not all((results / f"{name}.json").is_file() for name, _ in files.values()):
        return None
    found: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for label, (name, method) in files.items():
        for run in json.loads((results / f"{name}.json").read_text())["runs"]:
            if (run["method"], run["head"]) == (method, "full"):
                found[label][run["task"]] = {each["prompt"]: each["tau"] for each in run["prompt_records"]}
    common = found["csra again"]
    taus = {(0, task, label): [found[label][task][each] for each in common[task]] for label in files for task in common}
    return compare(taus, [("weight1", "csra again"), ("csra again", "csra"), ("csra again", "hass")])


def sampled(results: Path, family: str) -> dict[str, Any] | None:
    """CORAL against EAGLE-2 at temperature 1, seed 0."""
    taus: Taus = {}
    runs: list[dict[str, Any]] = []
    for name in (f"{family}-eagle2-t1", f"{family}-recipes-seed0-t1", f"{family}-coral-t1"):
        path = results / f"{name}.json"
        for run in json.loads(path.read_text())["runs"] if path.is_file() else []:
            runs.append(run)
            taus[0, run["task"], run["method"]] = [each["tau"] for each in run["prompt_records"]]
    require_same_prompts(runs)
    return compare(taus, [("csra+router", "eagle2")]) if taus else None


def speeds(results: Path, family: str) -> list[dict[str, Any]]:
    """Tokens per second and speed-ups by set, method and head; with a tree that was asked for, a draft step's time.

    A step is a level of the tree, drafter and head, the prompt's share of the drafter's time included.
    """
    table = []
    names = [f"{family}-{each}-*" for each in ("speed", "long", "cpu", "tree-auto")]
    for path in sorted({each for name in names for each in results.glob(f"{name}.json")}):
        found = json.loads(path.read_text())
        tree = found["settings"]["tree"]
        for run in found["runs"]:
            line = {key: run[key] for key in ("task", "method", "tokens_per_second", "tau", "speedup", "time_split")}
            if re.fullmatch(r"\d+,\d+,\d+", str(tree)) and run["rounds"] and run["rows_per_round"]:
                steps = run["rounds"] * int(str(tree).split(",")[0])
                drafting = run["time_split"]["drafter"] + run["time_split"]["head"]
                line["draft_step_milliseconds"] = 1000 * drafting / steps
            table.append({"file": path.name, "head": found["settings"]["head"], "tree": tree, **line})
    return table


def trainings(results: Path) -> dict[str, dict[str, Any]]:
    """What every training came to, from which settings: the lines that chose the defaults."""
    found = {}
    for path in sorted((results / "training").rglob("result.json")):
        result = json.loads(path.read_text())
        keys = ("held_out_mass", "held_out_recall", "held_out_agreed", "rows", "steps", "tokens", "minutes", "seed")
        line = {key: result[key] for key in (*keys, "versions", "hardware") if key in result}
        scored = [each for each in read_metrics(path.with_name("metrics.jsonl")) if "tau_sim" in each]
        if scored:
            last = scored[-1]
            line["tau_sim"], line["rates"] = last["tau_sim"], [last[key] for key in sorted(last) if "rate_" in key]
            line["curve"] = [[each["tokens"], each["tau_sim"]] for each in scored]
        settings = tomllib.loads(path.with_name("config.toml").read_text())
        line |= {key: settings[key] for key in ("csra", "router") if key in settings}
        found[str(path.parent.relative_to(results / "training"))] = line
    return found


def save_curve(results: Path, path: Path) -> None:
    """Simulated tau against tokens through the target, one line for each full training, one picture for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4 * len(TERMS)), layout="constrained")
    pictures = dict(zip(TERMS, figure.subplots(len(TERMS)), strict=True))
    recipes = ("eagle2", "hass", "csra")
    for folder in sorted((results / "training").glob("*-[0-9]")):
        family, recipe, seed = folder.name.rsplit("-", 2)
        if recipe in recipes:
            lines = [line for line in read_metrics(folder / "metrics.jsonl") if "tau_sim" in line]
            tokens, taus = [line["tokens"] / 1e6 for line in lines], [line["tau_sim"] for line in lines]
            color, label = f"C{recipes.index(recipe)}", f"{recipe}, seed {seed}"
            pictures[family].plot(tokens, taus, ("-", "--", ":")[int(seed) % 3], color=color, label=label)
    for family, axes in pictures.items():
        axes.set(
            title=family, xlabel="million tokens through the target", ylabel="tokens per round (simulated, held out)"
        )
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--curve", type=Path)
    parser.add_argument("--before", type=Path, help="an earlier report")
    options = parser.parse_args()
    before: dict[str, Any] = json.loads(options.before.read_text()) if options.before else {}
    report: dict[str, Any] = {"trainings": {**before.get("trainings", {}), **trainings(options.results)}}
    for family in TERMS:
        taus = read_taus(options.results, family)
        report[family] = {
            "recipes": compare(taus) if taus else None,
            f"recipes_first_{SHORT}_tokens": compare(read_taus(options.results, family, SHORT)) if taus else None,
            "looped": looped(options.results, family),
            "sampled": sampled(options.results, family),
            "simulated": simulated(report["trainings"], family),
            "heads": heads(options.results, family),
            "head_differences": head_differences(options.results, family),
            "weights_on_equal_answers": weights_on_equal_answers(options.results, family),
            "speed": speeds(options.results, family),
        }
        for name, value in (report[family]["recipes"] or {}).items():
            print(family, name, json.dumps(value))
        for line in report[family]["heads"]:
            print(family, json.dumps(line))
    for name, line in report["trainings"].items():
        print(name, json.dumps({key: line[key] for key in ("tau_sim", "csra", "router") if key in line}))
    write_json(options.json, {**report, "bootstrap_samples": SAMPLES, **evidence(SEED)})
    if options.curve is not None:
        save_curve(options.results, options.curve)


if __name__ == "__main__":
    main()
