"""`coral-spec eval`: how much of their drafts drafters get accepted, with any number of heads; no speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coral_spec.commands import options


def run(
    model: options.Model = "smollm2-135m",
    drafters: Annotated[
        list[str] | None,
        typer.Option("--draft", help="Folder of a drafter or NAME=FOLDER; may be given several times."),
    ] = None,
    head: Annotated[
        list[str] | None, typer.Option(help="Head, as elsewhere; may be given several times, each is evaluated.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Some of sample, mt_bench, humaneval, gsm8k, separated by commas.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSON lines (.jsonl, .jsonl.gz) with "prompt", "question" or "turns".')
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first prompts of every task.")] = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    workers: Annotated[int, typer.Option(help="Processes on one device.")] = 1,
    tree: Annotated[str, typer.Option(help="DEPTH,WIDTH,BUDGET of the draft tree.")] = "6,10,60",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    data_dir: Annotated[Path | None, typer.Option(help="Where published sets are looked for first.")] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write all figures here; a killed run goes on from beside it.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write acceptance per depth and rows read (PNG) here.")] = None,
) -> None:
    """Acceptance only (tau, per depth, router recall, rows read), by several processes on one device."""
    from coral_spec.bench.methods import parse_methods
    from coral_spec.bench.runner import Settings, read_questions
    from coral_spec.heads.choose import HeadChoice
    from coral_spec.tree import TreeShape

    methods = parse_methods(",".join(_named(each) for each in drafters)) if drafters else {"coral": ""}
    heads = list(dict.fromkeys(head or ["auto"]))
    for each in heads:
        HeadChoice.parse(each)
    TreeShape.parse(tree)
    settings = {
        each: Settings(
            model=model,
            methods=methods,
            device=device,
            dtype=dtype,
            tree=tree,
            head=each,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            workers=workers,
            limit=limit,
        )
        for each in heads
    }
    questions = read_questions(tasks, prompts, limit, data_dir)
    options.require_file_name("json", json, ".json")
    options.require_file_name("plot", plot, ".png")

    from rich.console import Console

    from coral_spec.bench.acceptance import evaluate_heads, table
    from coral_spec.bench.summary import DEFINITIONS
    from coral_spec.bench.telemetry import save_telemetry
    from expkit.checkpoint import write_json
    from expkit.cli import console
    from expkit.rundir import evidence

    proof = evidence(seed)
    runs, partials = evaluate_heads(settings, questions, json)
    Console().print(table(runs))
    if json is not None:
        about = {**vars(next(iter(settings.values()))), "head": heads, "definitions": DEFINITIONS}
        write_json(json, {"runs": runs, "settings": about, **proof})
        console().print(f"figures: {json}", soft_wrap=True)
    if plot is not None:
        how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        save_telemetry(runs, plot, title=f"{model}, {how}, tree {tree}")
        console().print(f"chart: {plot}", soft_wrap=True)
    for partial in partials:
        partial.remove()


def _named(drafter: str) -> str:
    """`FOLDER` as `NAME=FOLDER`: a folder named `drafter` goes by that of its run, unless a method has that name."""
    from coral_spec.bench.methods import METHODS

    if "=" in drafter:
        return drafter
    folder = Path(drafter).resolve()
    name = folder.parent.name if folder.name == "drafter" else folder.name
    return f"{f'{name}-drafter' if name in METHODS else name}={drafter}"
