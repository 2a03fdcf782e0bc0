"""Two methods of one `coral-spec bench` file, compared prompt by prompt.

    python packages/coral-spec/benchmarks/compare_drafters.py FILE.json --a hass --b eagle2 --json OUT.json

Per task: the mean difference of the prompts' tau with a 95 % bootstrap interval over prompts, and tau over the first
64 tokens of every answer, since greedy answers of small models repeat themselves later and are then easy to draft.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from expkit.checkpoint import write_json
from expkit.rundir import evidence

SAMPLES, SEED, BEGINNING = 10_000, 0, 64


def interval(differences: list[float]) -> tuple[float, float]:
    """Bootstrap percentiles 2.5 and 97.5 of the mean."""
    generator = random.Random(SEED)
    count = len(differences)
    means = sorted(sum(generator.choices(differences, k=count)) / count for _ in range(SAMPLES))
    return means[SAMPLES // 40], means[-SAMPLES // 40]


def beginning_tau(run: dict[str, Any]) -> float:
    """tau over the rounds that make the first tokens of every answer."""
    rounds = tokens = 0
    for record in run["prompt_records"]:
        made = 1
        for accepted in record["accept_lengths"]:
            if made >= BEGINNING:
                break
            made += accepted + 1
            rounds += 1
        tokens += made - 1
    return tokens / rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--a", required=True)
    parser.add_argument("--b", required=True)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    runs = {(run["task"], run["method"]): run for run in json.loads(options.file.read_text())["runs"]}
    tasks: dict[str, Any] = {}
    for task in dict.fromkeys(task for task, _ in runs):
        a, b = runs[task, options.a], runs[task, options.b]
        pairs = zip(a["prompt_records"], b["prompt_records"], strict=True)
        differences = [x["tau"] - y["tau"] for x, y in pairs if x["tau"] is not None and y["tau"] is not None]
        low, high = interval(differences)
        tasks[task] = {
            "tau": {options.a: a["tau"], options.b: b["tau"]},
            f"tau_first_{BEGINNING}_tokens": {options.a: beginning_tau(a), options.b: beginning_tau(b)},
            "difference_per_prompt": sum(differences) / len(differences),
            "interval_95": [low, high],
            "prompts": len(differences),
        }
        print(task, json.dumps(tasks[task]))
    write_json(options.json, {"tasks": tasks, "bootstrap_samples": SAMPLES, **evidence(SEED)})


if __name__ == "__main__":
    main()
