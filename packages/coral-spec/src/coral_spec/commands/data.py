"""`coral-spec data`: the target answers prompts, which is what a drafter is trained on."""

from __future__ import annotations

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
    from coral_spec.sampling import Sampling
    from coral_spec.training.config import AnswersConfig
    from expkit.errors import UsageError

    try:
        settings = AnswersConfig(
            prompts=prompts,
            self_prompts=self_prompts,
            limit=limit,
            samples_per_prompt=samples_per_prompt,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            max_prompt_tokens=max_prompt_tokens,
            batch_size=batch_size,
            cache_gib=cache_gib,
            shard_size=shard_size,
            seed=seed,
        )
        settings.require_prompts()
    except ValueError as error:
        raise UsageError(str(error)) from None
    Sampling(temperature, 0, top_p)  # its own checks

    from coral_spec.targets import load_target
    from coral_spec.training.answering import write_answers
    from coral_spec.training.prompts import read_prompts
    from expkit.distributed import join, leave

    if prompts is not None:
        read_prompts(prompts, limit)  # a wrong file fails before a model loads
    world = join()
    try:
        write_answers(settings, load_target(model, device=device, dtype=dtype), out, world)
    finally:
        leave()
