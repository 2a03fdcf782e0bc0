"""Measure what every tree shape of a drafter accepts, for `--tree auto`.

    python packages/coral-spec/benchmarks/acceptance_profile.py \
        --out packages/coral-spec/src/coral_spec/drafters/smollm2-135m/acceptance.json

The target answers this package's own sample prompts greedily, and every shape is replayed on those answers, for all
head rows and for the most frequent ones that are the default on this device. On a GPU it is the shapes of 60 nodes,
which are decoded with, as that is faster there than a replay. Shapes that the file has already are not measured again.
Any prompts: `--tasks mt_bench gsm8k humaneval --skip 40 --limit 20`; any drafter: `--model MODEL --draft FOLDER --out
FOLDER/acceptance.json`. `--quick`: one prompt, a short answer, few shapes, into a file that is not there yet.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import coral_spec
from coral_spec.bench.tasks import as_instruction, load_task
from coral_spec.bundled import bundled_drafter
from coral_spec.model import Model
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


def decode_answers(
    model: Model, head: str, prompts: list[list[int]], tokens: int, shapes: list[str]
) -> dict[str, list[int]]:
    """Rounds' accepted lengths by shape, of greedy answers."""
    accepted: dict[str, list[int]] = {}
    for name in shapes:
        drafting = model.with_draft(model.draft_name, tree=TreeShape.parse(name), head=head)
        found = [drafting.generate(ids, max_new_tokens=tokens).statistics.accept_lengths for ids in prompts]
        accepted[name] = [length for each in found for length in each]
        print(f"rows {model.head_rows}: {name}", flush=True)
    return accepted


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


def answers(plain: Model, prompts: list[list[int]], tokens: int) -> list[tuple[list[int], int]]:
    """Greedy answers, prompts in front, each with the length of its prompt."""
    return [(ids + plain.generate(ids, max_new_tokens=tokens).token_ids, len(ids)) for ids in prompts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--draft", default="auto")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--tasks", nargs="+", default=["sample"])
    parser.add_argument("--skip", type=int, default=0, help="first prompts of every task that are left out")
    parser.add_argument("--limit", type=int, help="prompts of every task")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--heads", nargs="+", default=["full", "frequency"], help="these, or numbers of rows")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        if options.out.exists():
            parser.error(f"{options.out} exists; --quick writes a file that nobody should use")
        options.limit, options.max_new_tokens, options.shapes = 1, 24, ["1,1,1", "2,2,3", "6,10,60"]
    proof = evidence(0)
    held = (
        json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {"profiles": [], "runs": []}
    )
    plain = coral_spec.load(options.model, draft="none")
    draft = str(bundled_drafter(plain.target)) if options.draft == "auto" else options.draft
    end = None if options.limit is None else options.skip + options.limit
    ids = [
        plain.encode(as_instruction(task, prompt.text))
        for task in options.tasks
        for prompt in load_task(task, limit=end, data_dir=options.data_dir)[options.skip :]
    ]
    cuda = plain.target.device.type == "cuda"
    texts = [] if cuda else answers(plain, ids, options.max_new_tokens)
    shapes = options.shapes or [name for name in SHAPES if not cuda or TreeShape.parse(name).budget == 60]
    profiles = []
    for head in options.heads:
        model = plain.with_draft(draft, tree=TreeShape(1, 1, 1), head=head)
        old = next((each for each in held["profiles"] if each["rows"] == model.head_rows), {"survival": {}})
        missing = [name for name in shapes if name not in old["survival"]]
        if cuda:
            found = decode_answers(model, head, ids, options.max_new_tokens, missing)
        else:
            found = replay_answers(model, texts, missing)
        shares = {name: survival(rounds, TreeShape.parse(name).depth) for name, rounds in found.items()}
        rounded = {name: [round(share, 4) for share in each] for name, each in shares.items()}
        rounds = {"rounds": max(old.get("rounds", 0), *map(len, found.values())) if found else old["rounds"]}
        profiles.append({"rows": model.head_rows, **rounds, "survival": {**old["survival"], **rounded}})
    others = [each for each in held["profiles"] if each["rows"] not in {profile["rows"] for profile in profiles}]
    profiles = sorted([*others, *profiles], key=lambda each: -each["rows"])
    write_json(options.out, {"profiles": profiles, "runs": [*held["runs"], proof]})


if __name__ == "__main__":
    main()
