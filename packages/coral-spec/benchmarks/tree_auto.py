"""Fixed draft trees against `--tree auto`: measured and predicted tokens per second.

    python packages/coral-spec/benchmarks/tree_auto.py --json packages/coral-spec/results/tree-auto-cpu.json

Every tree answers every prompt greedily, prompt by prompt in an order drawn anew, since a machine's speed drifts and
what ran before leaves its marks. Times are those of decoding, prefill not counted (it is the same for all), nor what
the first answer of all takes to capture trees. Predictions were there before: the step costs of this machine and the
drafter's profile. `--quick` takes less than a minute on two cores.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import coral_spec
from coral_spec.bench.tasks import load_task
from coral_spec.bundled import bundled_drafter
from coral_spec.model import Model
from coral_spec.statistics import Statistics
from coral_spec.tree import TreeShape
from coral_spec.tuning.choose import TYPICAL, Tuner, expect
from expkit.checkpoint import write_json
from expkit.rundir import evidence

# fmt: off
TREES = {
    "cpu": ("1,1,1", "2,1,2", "2,2,3", "3,1,3", "3,2,5", "3,3,8", "3,4,12", "4,3,12", "4,4,12", "5,4,16", "6,10,60"),
    "cuda": (
        "3,3,8", "4,4,16", "5,6,24", "5,8,32", "6,10,40",
        "3,10,60", "4,10,60", "5,10,60", "6,10,60", "7,10,60", "8,10,60", "10,10,60",
    ),
}
# fmt: on
QUICK = ("2,2,3", "3,2,5", "3,4,12", "4,4,12")
TASKS = {"cpu": ("sample", "mt_bench"), "cuda": ("mt_bench", "gsm8k", "humaneval")}


def measure(models: dict[str, Model], prompts: list[list[int]], tokens: int) -> dict[str, list[Statistics]]:
    """Statistics of every answer by tree."""
    names = list(models)
    found: dict[str, list[Statistics]] = {name: [] for name in names}
    for model in models.values():
        model.generate(prompts[0], max_new_tokens=40, ignore_eos=True)
    order = random.Random(0)
    for number, ids in enumerate(prompts):
        for name in order.sample(names, len(names)):
            found[name].append(models[name].generate(ids, max_new_tokens=tokens).statistics)
        print(f"{number + 1} of {len(prompts)} prompts", flush=True)
    return found


def summarise(answers: list[Statistics]) -> dict[str, Any]:
    """Over all answers together."""
    rounds = [length for each in answers for length in each.accept_lengths]
    seconds = sum(each.seconds - each.prefill_seconds - each.capture_seconds for each in answers)
    return {
        "tokens_per_second": sum(each.new_tokens - 1 for each in answers) / seconds,
        "milliseconds_per_round": 1e3 * seconds / len(rounds),
        "tau": 1 + sum(rounds) / len(rounds),
        "rounds": len(rounds),
    }


def predict(name: str, tuner: Tuner, hardness: float = TYPICAL) -> dict[str, Any] | None:
    """What the step costs and the profile say of a tree, if they know it; "plain" is none."""
    shape = None if name == "plain" else TreeShape.parse(name)
    if shape is not None and shape not in tuner.acceptance.survival:
        return None
    choice = expect(shape, tuner.costs, tuner.acceptance, hardness)
    return {
        "tokens_per_second": choice.tokens_per_second,
        "milliseconds_per_round": choice.milliseconds,
        "tau": choice.tau,
    }


def table(trees: dict[str, dict[str, Any]]) -> Table:
    """Measured, and predicted in brackets."""
    out = Table()
    for heading in ("tree", "tokens/s", "over plain", "ms per round", "tau"):
        out.add_column(heading, justify="left" if heading == "tree" else "right", no_wrap=True)
    plain = trees["plain"]["measured"]["tokens_per_second"]
    for name, row in trees.items():
        found, said = row["measured"], row["predicted"]

        def cell(key: str, digits: int, found: dict[str, Any] = found, said: dict[str, Any] | None = said) -> str:
            return f"{found[key]:.{digits}f}" + (f" ({said[key]:.{digits}f})" if said else "")

        speedup = f"{found['tokens_per_second'] / plain:.2f}x"
        out.add_row(name, cell("tokens_per_second", 1), speedup, cell("milliseconds_per_round", 1), cell("tau", 2))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--limit", type=int, default=8, help="prompts of every task")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--trees", nargs="+", default=TREES[kind])
    parser.add_argument("--tasks", nargs="+", default=TASKS[kind])
    parser.add_argument("--head", default="auto")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--quick", action="store_true", help="few trees, own prompts, short answers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.trees, options.tasks, options.limit, options.max_new_tokens = QUICK, ["sample"], 4, 48
    proof = evidence(0)
    plain = coral_spec.load(options.model, draft="none")
    draft = str(bundled_drafter(plain.target))
    started = time.perf_counter()
    auto = plain.with_draft(draft, head=options.head)
    calibration = time.perf_counter() - started
    tuner = auto.tuner
    assert tuner is not None
    fixed = {name: plain.with_draft(draft, tree=TreeShape.parse(name), head=options.head) for name in options.trees}
    chosen = str(auto.tree or "plain")
    prompts = [
        plain.encode(prompt.text)
        for task in options.tasks
        for prompt in load_task(task, limit=options.limit, data_dir=options.data_dir)
    ]
    answers = measure({"plain": plain, **fixed, "auto": auto}, prompts, options.max_new_tokens)
    trees = {
        name: {
            "measured": summarise(each),
            "predicted": None if name == "auto" else predict(name, tuner),
            "predicted_at_the_end": None if name == "auto" else predict(name, tuner, tuner.hardness),
        }
        for name, each in answers.items()
    }
    Console().print(table(trees))
    best = max(trees[name]["measured"]["tokens_per_second"] for name in ("plain", *fixed))
    ratio = trees["auto"]["measured"]["tokens_per_second"] / best
    ended = str(auto.tree or "plain")
    print(f"calibrated in {calibration:.1f} s (from a cache if there was one)")
    print(f"auto began with {chosen}, ended with {ended} (hardness {tuner.hardness:.2f}): {ratio:.3f} of the best")
    if options.json is not None:
        about = {"head_rows": auto.head_rows, "device": str(plain.target.device), "dtype": str(plain.target.dtype)}
        settings = {key: value for key, value in vars(options).items() if key not in ("json", "data_dir")}
        result = {"trees": trees, "began": chosen, "ended": ended, "hardness": tuner.hardness, "of_best": ratio}
        result |= {"calibration_seconds": calibration, "costs": asdict(tuner.costs)}
        write_json(options.json, {**result, "settings": {**settings, **about}, **proof})


if __name__ == "__main__":
    main()
