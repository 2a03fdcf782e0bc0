"""How far rounding takes a model's own forward from fp32 on one of its answers, by how many rows it has at a time.

    python packages/coral-spec/benchmarks/rounding.py --model gemma3-270m --task gsm8k --prompt 8 --json FILE

transformers' own module in the working precision, over the prompt and then the answer in pieces, each with the cache of
those before. `check` and `bench` call logits too far from fp32 only where they are farther than this, too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import coral_spec
from coral_spec.bench.tasks import as_instruction, load_task
from coral_spec.check.noise import PIECES, forward_distances, reference_model
from expkit.checkpoint import write_json
from expkit.rundir import evidence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="sample")
    parser.add_argument("--prompt", default="", help="its name in the set; the first, if not given")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, nargs="+", default=[*PIECES, 33])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    proof = evidence(0)
    model = coral_spec.load(options.model, draft="none", dtype="bf16")
    prompts = load_task(options.task, limit=None, data_dir=options.data_dir)
    found = [each for each in prompts if options.prompt in ("", each.id)]
    if not found:
        parser.error(f"{options.task} has no prompt {options.prompt!r}")
    ids = model.encode(as_instruction(options.task, found[0].text))
    answer = model.generate(ids, max_new_tokens=options.max_new_tokens).token_ids
    reference, tables = reference_model(model.target.model), {}
    for rows in options.rows:
        distances = forward_distances(model.target.model, reference, ids, answer, [rows])
        largest = distances.topk(min(3, len(distances)))
        tables[rows] = [round(each, 4) for each in distances.tolist()]
        pairs = zip(largest.indices.tolist(), largest.values.tolist(), strict=True)
        print(f"{rows:3} rows: " + ", ".join(f"{value:.2f} at token {place + 1}" for place, value in pairs), flush=True)
    if options.json:
        about = {"settings": {key: str(value) for key, value in vars(options).items()}, "prompt": found[0].id}
        write_json(options.json, {**about, "distances_by_rows": tables, **proof})


if __name__ == "__main__":
    main()
