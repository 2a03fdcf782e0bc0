"""`coral-spec bench`: ways of decoding against each other on the same prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coral_spec.commands import options


def run(
    model: options.Model = "smollm2-135m",
    tasks: Annotated[
        str | None, typer.Option(help="Some of sample, mt_bench, humaneval, gsm8k, separated by commas.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSON lines (.jsonl, .jsonl.gz) with "prompt", "question" or "turns".')
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first prompts of every task.")] = None,
    methods: Annotated[
        str, typer.Option(help="Some of hf, hf-compiled, ar, prompt-lookup, ngram, coral, auto, and NAME=FOLDER.")
    ] = "hf,ar,auto",
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-text token.")] = False,
    repeats: Annotated[int, typer.Option(help="Answer every prompt this often; the median time counts.")] = 1,
    workers: Annotated[
        int, typer.Option(help="Processes on one device; above 1 acceptance is measured, but no speed.")
    ] = 1,
    tree: options.Tree = "auto",
    head: options.Head = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    data_dir: Annotated[Path | None, typer.Option(help="Where published sets are looked for first.")] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write all figures here; a killed run goes on from beside it.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a bar chart (PNG) here, and what drafting did beside it.")
    ] = None,
) -> int:
    """Measure speed and acceptance, and compare greedy answers with plain decoding; 1 when a bug is found."""
    from coral_spec.bench.methods import parse_methods
    from coral_spec.bench.runner import Bench, Settings, open_partial, read_questions

    settings = Settings(
        model=model,
        methods=parse_methods(methods),
        device=device,
        dtype=dtype,
        tree=tree,
        head=head,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        ignore_eos=ignore_eos,
        repeats=repeats,
        workers=workers,
        limit=limit,
    )
    questions = read_questions(tasks, prompts, limit, data_dir)  # wrong use is told before anything is loaded
    options.require_file_name("json", json, ".json")
    options.require_file_name("plot", plot, ".png")

    from rich.console import Console

    from coral_spec.bench.identity import judge_all
    from coral_spec.bench.plot import save_chart
    from coral_spec.bench.runner import run as measure
    from coral_spec.bench.summary import DEFINITIONS, summarise_runs, table
    from coral_spec.bench.telemetry import save_telemetry
    from coral_spec.bench.workers import run_workers
    from expkit.checkpoint import write_json
    from expkit.cli import console
    from expkit.rundir import evidence

    proof = evidence(seed)
    partial = open_partial(settings, questions, json)
    if partial.resumed:
        console().print(f"going on with {partial.resumed} answers of a run that was stopped")
    try:
        bench = Bench.load(settings)
        if workers > 1:
            run_workers(settings, questions, partial)
        else:
            measure(bench, questions, partial)
        judgements = judge_all(bench, questions, partial.records)
    except KeyboardInterrupt:
        if json is not None:
            console().print("stopped; the same command goes on from here")
        raise
    finally:
        partial.close()
    runs = summarise_runs(settings, questions, partial.records, judgements)
    target = bench.model.target
    precision = str(target.dtype).removeprefix("torch.")
    Console().print(table(runs))
    if json is not None:
        about = {"device": str(target.device), "dtype": precision, "definitions": DEFINITIONS}
        write_json(json, {"runs": runs, "settings": {**vars(settings), **about}, **proof})
        console().print(f"figures: {json}", soft_wrap=True)
    if plot is not None:
        how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        title = f"{target.name}, {how}, {precision} on {target.device.type}"
        telemetry = plot.with_stem(f"{plot.stem}-drafting")
        save_chart(runs, plot, title=title)
        save_telemetry(runs, telemetry, title=title)
        console().print(f"charts: {plot}, {telemetry}", soft_wrap=True)
    partial.remove()
    return 1 if any(each["identical"] == "bug" for each in runs) else 0
