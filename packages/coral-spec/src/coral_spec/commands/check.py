"""`coral-spec check`: is decoding with a draft lossless on this model and this machine?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coral_spec.commands import options


def run(
    model: options.Model = "smollm2-135m",
    draft: options.Draft = "auto",
    prompts: Annotated[
        Path | None, typer.Option(help='JSON lines with "prompt", "question" or "turns"; else our own samples.')
    ] = None,
    limit: Annotated[int, typer.Option(help="Prompts that are decoded greedily.")] = 4,
    max_new_tokens: options.MaxNewTokens = 64,
    draws: Annotated[int, typer.Option(help="Sampled answers, at least 2000.")] = 2000,
    temperature: Annotated[float, typer.Option(help="Temperature of the sampled answers.")] = 1.0,
    top_k: options.TopK = 8,
    seed: Annotated[int, typer.Option(help="Seed of the sampled answers.")] = 0,
    tree: options.Tree = "auto",
    head: options.Head = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.Json = None,
) -> int:
    """Compare greedy answers with plain decoding and sampled ones with exact probabilities; 1 when a bug is found."""
    from coral_spec.bench.tasks import load_task, read_prompts
    from expkit.errors import UsageError

    for name, value, least in (("limit", limit, 1), ("max-new-tokens", max_new_tokens, 1), ("top-k", top_k, 0)):
        if value < least:
            raise UsageError(f"{name} is {value}, needed at least {least}")
    if draws < 2000:
        raise UsageError(f"draws is {draws}, needed at least 2000: fewer would let small errors pass")
    if not 0 < temperature < float("inf"):
        raise UsageError(f"temperature is {temperature}, needed above 0 (greedy decoding is always checked too)")
    if draft == "none":
        raise UsageError("draft is 'none', which is the baseline itself; needed auto, ngram or a folder")
    options.require_file_name("json", json, ".json")
    questions = (read_prompts(prompts) if prompts is not None else load_task("sample"))[:limit]

    from rich.console import Console

    import coral_spec
    from coral_spec.check.report import check, table
    from coral_spec.tree import TreeShape
    from expkit.checkpoint import write_json
    from expkit.cli import console, progress
    from expkit.rundir import evidence

    proof = evidence(seed)
    shape, rows = options.parse_tree(tree), options.parse_head(head)
    loaded = coral_spec.load(model, draft=draft, device=device, dtype=dtype, tree=shape, head=rows)
    # What was chosen is held fixed; where drafting does not pay it is checked all the same.
    shape = shape or loaded.tree or TreeShape()
    loaded = loaded.with_draft(draft, tree=shape, head=rows)
    with progress() as bar:
        tasks: dict[str, object] = {}

        def show(part: str, done: int, total: int) -> None:
            if part not in tasks:
                tasks[part] = bar.add_task(part, total=total)
            bar.advance(tasks[part], done)  # type: ignore[arg-type]

        report = check(
            loaded,
            [loaded.encode(question.text) for question in questions],
            tree=shape,
            head=rows,
            max_new_tokens=max_new_tokens,
            draws=draws,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            on_progress=show,
        )
    Console().print(table(report))
    if json is not None:
        write_json(json, {**report.to_dict(), **proof})
        console().print(f"figures: {json}", soft_wrap=True)
    return 0 if report.passed else 1
