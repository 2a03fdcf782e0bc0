"""`coral-spec data`: the target answers prompts, which is what a drafter is trained on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer


def run(
    out: Annotated[Path, typer.Option(help="Folder for the answers; a job that was killed goes on there.")],
    model: Annotated[str, typer.Option(help="Alias, hub id or folder of the target.")] = "smollm2-135m",
    prompts: Annotated[
        Path | None, typer.Option(help='JSON lines (.jsonl, .jsonl.gz): {"prompt": ...} or {"messages": [...]}.')
    ] = None,
    self_prompts: Annotated[int, typer.Option(help="Have an instruct model write this many prompts itself.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Use only the first prompts of the file.")] = None,
    samples_per_prompt: Annotated[int, typer.Option(help="Answers to each prompt.")] = 1,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1 is off.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
    max_prompt_tokens: Annotated[int, typer.Option(help="Leave out longer prompts.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Most answers written at once.")] = 256,
    cache_gib: Annotated[float, typer.Option(help="Most GiB of keys and values at once.")] = 4.0,
    shard_size: Annotated[int, typer.Option(help="Answers per file.")] = 4096,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the answers.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32.")] = "auto",
) -> None:
    """Have the target answer prompts; under torchrun, all processes share the work."""
    _require(prompts, self_prompts, temperature, top_p)
    for name, value in (
        ("limit", limit),
        ("samples-per-prompt", samples_per_prompt),
        ("max-new-tokens", max_new_tokens),
        ("max-prompt-tokens", max_prompt_tokens),
        ("batch-size", batch_size),
        ("shard-size", shard_size),
        ("cache-gib", cache_gib),
    ):
        _positive(name, value)

    from coral_spec.targets import load_target
    from coral_spec.training.answering import answer_prompts, own_prompts
    from coral_spec.training.data import Answers
    from coral_spec.training.generation import Sampling
    from coral_spec.training.prompts import encode_prompts, read_prompts
    from expkit.cli import console, progress
    from expkit.distributed import join, leave

    rows = read_prompts(prompts, limit) if prompts is not None else []  # a wrong file fails before a model loads
    world = join()
    try:
        target = load_target(model, device=device, dtype=dtype)
        if prompts is None:
            rows = own_prompts(target, self_prompts, out, world, batch=min(batch_size, self_prompts), seed=seed)
        longest = min(max_prompt_tokens, target.context_length - max_new_tokens)
        _positive("context left for the prompt", longest)
        encoded = encode_prompts(target, rows, longest, samples_per_prompt)
        sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
        with progress() as bar:
            task = bar.add_task("answers", total=len(encoded.ids) // world.size or 1)
            started, made = time.perf_counter(), 0

            def show(done: int, tokens: int) -> None:
                nonlocal made
                made += tokens
                speed = made / (time.perf_counter() - started)
                bar.update(task, advance=done, description=f"answers ({made:,} tokens, {speed:,.0f}/s)")

            answer_prompts(
                target,
                encoded,
                sampling,
                out,
                world,
                seed=seed,
                batch_size=batch_size,
                cache_gib=cache_gib,
                shard_size=shard_size,
                on_rows=show,
            )
        if world.is_main:
            answers = Answers.read(out)
            left_out = f", {encoded.too_long} prompts left out as too long" if encoded.too_long else ""
            console().print(
                f"{len(encoded.ids)} answers, {answers.answer_tokens:,} tokens, "
                f"{100 * float(answers.ended.float().mean()):.0f} % ended by themselves{left_out}: {out}"
            )
    finally:
        leave()


def _require(prompts: Path | None, self_prompts: int, temperature: float, top_p: float) -> None:
    from expkit.errors import UsageError

    if (prompts is None) == (self_prompts == 0):
        raise UsageError("give either --prompts FILE or --self-prompts N (the model writes its own prompts)")
    if self_prompts < 0:
        raise UsageError(f"--self-prompts is {self_prompts}; it must be positive")
    from coral_spec.sampling import Sampling

    Sampling(temperature, 0, top_p)  # its own checks


def _positive(name: str, value: float | None) -> None:
    from expkit.errors import UsageError

    if value is not None and not 0 < value < float("inf"):
        raise UsageError(f"{name} is {value}; it must be positive")
