"""Measure what every tree shape of a drafter accepts, for `--tree auto`; CPU or GPU, whichever is there.

    python packages/coral-spec/benchmarks/acceptance_profile.py \
        --out packages/coral-spec/src/coral_spec/drafters/smollm2-135m/acceptance.json

The target answers this package's own sample prompts greedily, and every shape is replayed on those answers, for all
head rows and for the most frequent 8,192. Shapes that the file has already are not measured again. Any drafter:
`--model MODEL --draft FOLDER --out FOLDER/acceptance.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import coral_spec
from coral_spec.bench.tasks import load_task
from coral_spec.model import Model, bundled_drafter
from coral_spec.tree import TreeShape
from coral_spec.tuning.acceptance import replay, survival
from expkit.checkpoint import write_json
from expkit.rundir import evidence

# fmt: off
SHAPES = (
    "1,1,1", "2,1,2", "3,1,3", "4,1,4", "5,1,5", "6,1,6", "8,1,8",
    "1,2,2", "2,2,3", "2,2,5", "3,2,4", "3,2,5", "3,2,7", "4,2,6", "4,2,8", "5,2,8", "6,2,10",
    "2,3,5", "3,3,6", "3,3,8", "3,3,11", "4,3,8", "4,3,12", "5,3,12", "6,3,16",
    "3,4,12", "3,4,16", "4,4,12", "4,4,16", "5,4,16", "6,4,20", "4,6,24", "5,6,24", "6,6,24",
    "4,8,32", "5,8,32", "6,8,32", "5,10,40", "6,10,40",
    "3,10,60", "4,10,60", "5,10,60", "6,10,60", "7,10,60", "8,10,60", "10,10,60",
)
# fmt: on


@torch.inference_mode()
def replay_answers(model: Model, texts: list[tuple[list[int], int]], shapes: list[str]) -> dict[str, list[int]]:
    """Rounds' accepted lengths by shape, over all ``(text, tokens of the prompt)``."""
    accepted: dict[str, list[int]] = {shape: [] for shape in shapes}
    plain = model.with_draft("none")
    for number, (text, prompt) in enumerate(texts, 1):
        _, features = plain.session(len(text)).prefill(text)
        for name in shapes:
            draft = model._make_draft(TreeShape.parse(name))
            accepted[name] += replay(draft, features, text, prompt)
        print(f"rows {model.head_rows}: {number} of {len(texts)} answers", flush=True)
    return accepted


def answers(
    plain: Model, tokens: int, task: str, limit: int | None, data_dir: Path | None
) -> list[tuple[list[int], int]]:
    """Greedy answers to a task's prompts, each with the length of its prompt."""
    texts = []
    for prompt in load_task(task, limit=limit, data_dir=data_dir):
        ids = plain.encode(prompt.text)
        texts.append((ids + plain.generate(ids, max_new_tokens=tokens).token_ids, len(ids)))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--draft", default="auto")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--task", default="sample")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    proof = evidence(0)
    held = (
        json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {"profiles": [], "runs": []}
    )
    plain = coral_spec.load(options.model, draft="none")
    draft = str(bundled_drafter(plain.target)) if options.draft == "auto" else options.draft
    texts = answers(plain, options.max_new_tokens, options.task, options.limit, options.data_dir)
    profiles = []
    for head in ("full", "frequency"):
        model = plain.with_draft(draft, tree=TreeShape(1, 1, 1), head=head)
        old = next((each for each in held["profiles"] if each["rows"] == model.head_rows), {"survival": {}})
        missing = [name for name in SHAPES if name not in old["survival"]]
        found = replay_answers(model, texts, missing)
        shares = {name: survival(rounds, TreeShape.parse(name).depth) for name, rounds in found.items()}
        rounded = {name: [round(share, 4) for share in each] for name, each in shares.items()}
        counts = {"rounds": len(found["1,1,1"])} if "1,1,1" in found else {"rounds": old["rounds"]}
        profiles.append({"rows": model.head_rows, **counts, "survival": {**old["survival"], **rounded}})
    write_json(options.out, {"profiles": profiles, "runs": [*held["runs"], proof]})


if __name__ == "__main__":
    main()
