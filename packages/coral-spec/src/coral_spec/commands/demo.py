"""`coral-spec demo`: see a language model answer faster with the very same words."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coral_spec.commands import options

if TYPE_CHECKING:
    from coral_spec.bench.methods import Answer
    from coral_spec.bench.records import Record
    from coral_spec.bench.runner import Bench
    from coral_spec.bench.tasks import Prompt

BUDGET_SECONDS = 75.0  # no further prompt is begun when it would probably end later


def run(
    model: options.Model = "smollm2-135m",
    prompts: Annotated[int, typer.Option(help="How many of the sample prompts.")] = 3,
    max_new_tokens: options.MaxNewTokens = 64,
    device: options.Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="fp32, in which not even rounding can change a word; bf16, fp16 or auto.")
    ] = "fp32",
    plot: Annotated[Path, typer.Option(help="Where the bar chart (PNG) goes.")] = Path("coral-spec-demo.png"),
    json: options.Json = None,
) -> int:
    """Answer a few prompts plainly and with a draft, and show how the speeds compare; under two minutes."""
    import coral_spec
    from coral_spec.bench.runner import Bench, Settings
    from coral_spec.bench.tasks import load_task
    from coral_spec.bundled import bundled_drafter
    from expkit.errors import UsageError
    from expkit.rundir import evidence

    if prompts < 1:
        raise UsageError(f"prompts is {prompts}, needed at least 1")
    options.require_file_name("json", json, ".json")
    options.require_file_name("plot", plot, ".png")
    proof = evidence(0)
    samples = load_task("sample", limit=prompts)
    typer.echo(f"loading {model} (downloaded the first time) ...")
    loaded = coral_spec.load(model, draft="none", device=device, dtype=dtype)
    draft = "ngram" if bundled_drafter(loaded.target) is None else "coral"
    methods = {"hf": "", "ar": "", draft: ""}
    settings = Settings(model, methods, device=device, dtype=dtype, max_new_tokens=max_new_tokens, limit=prompts)
    bench = Bench.build(settings, loaded)
    bench.warm_up(bench.encode("sample", samples[0]))
    records = _show_prompts(bench, samples)
    return _conclude(bench, samples[: len(records) // len(methods)], records, plot, json, proof)


def _show_prompts(bench: Bench, samples: list[Prompt]) -> list[Record]:
    """Every method on every prompt, as far as time allows; the engine's answers are streamed."""
    from coral_spec.bench.runner import make_record

    records: list[Record] = []
    start = time.monotonic()
    for number, prompt in enumerate(samples, 1):
        begun = time.monotonic()
        ids = bench.encode("sample", prompt)
        typer.echo()
        typer.secho(f"[{number}/{len(samples)}] {prompt.text.splitlines()[0]}", bold=True)
        for method in bench.methods:
            answer = _show_answer(bench, method.name, ids)
            records.append(make_record("sample", prompt.id, method.name, len(ids), [answer]))
        now = time.monotonic()
        if number < len(samples) and now - start + (now - begun) > BUDGET_SECONDS:
            typer.echo(f"\nthis machine is slow: the demo ends after {number} of {len(samples)} prompts")
            break
    return records


def _show_answer(bench: Bench, name: str, ids: list[int]) -> Answer:
    from coral_spec.bench.methods import EngineMethod

    method = next(each for each in bench.methods if each.name == name)
    request = bench.settings.request
    if isinstance(method, EngineMethod):
        what = "plain decoding" if name == "ar" else f"the same model with draft {name!r}"
        typer.secho(f"\n--- {what}", fg="cyan")
        answer = method.answer(ids, request, on_text=_write)
        typer.echo()
    else:
        typer.secho("\n--- transformers' own generate (not streamed)", fg="cyan")
        answer = method.answer(ids, request)
    speed = f"{len(answer.ids)} tokens in {answer.seconds:.1f} s: {len(answer.ids) / answer.seconds:.1f} tokens/s"
    typer.secho(f"    {speed}", fg="green")
    return answer


def _conclude(
    bench: Bench,
    samples: list[Prompt],
    records: list[Record],
    plot: Path,
    json: Path | None,
    proof: dict[str, object],
) -> int:
    from rich.console import Console

    from coral_spec.bench.identity import judge_all
    from coral_spec.bench.plot import save_chart
    from coral_spec.bench.summary import DEFINITIONS, summarise_runs, table
    from expkit.checkpoint import write_json

    tasks = {"sample": samples}
    by_key = {record.key: record for record in records}
    runs = summarise_runs(bench.settings, tasks, by_key, judge_all(bench, tasks, by_key))
    target = bench.model.target
    precision = str(target.dtype).removeprefix("torch.")
    typer.echo()
    Console().print(table(runs))
    words = {"exact": "The words are the very same.", "ties": "The words are the same up to ties of rounding."}
    last = runs[-1]
    typer.echo(
        f"{last['method']}: {last['speedup']['hf']:.2f}x transformers' generate, {last['speedup']['ar']:.2f}x plain "
        f"decoding, {last['tau'] or 1:.2f} tokens per forward of the model. "
        f"{words.get(last['identical'], 'BUG: see check')}"
    )
    save_chart(runs, plot, title=f"{target.name}, greedy, {precision} on {target.device.type}")
    typer.echo(f"chart: {plot.resolve()}")
    if json is not None:
        about = {"device": str(target.device), "dtype": precision, "definitions": DEFINITIONS}
        write_json(json, {"runs": runs, "settings": {**vars(bench.settings), **about}, **proof})
        typer.echo(f"figures: {json}")
    return 1 if any(each["identical"] == "bug" for each in runs) else 0


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
