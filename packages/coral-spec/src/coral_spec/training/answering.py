"""The job behind `coral-spec data`: answer prompts shard by shard, on any number of processes, and go on after a kill.

Every shard draws from a seed of its own and is written whole or not at all, so a job that was killed ends with the
same files as one that was not (on the same kind of machine).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coral_spec.training.config import AnswersConfig
from coral_spec.training.data import Answers, Manifest, shard_path, write_shard
from coral_spec.training.generation import Answer, Sampling, answer_batch, cache_bytes_per_token
from coral_spec.training.prompts import EncodedPrompts, Prompt, encode_prompts, read_prompts, write_own_prompts
from expkit.checkpoint import write_text
from expkit.cli import console, progress
from expkit.distributed import World, barrier
from expkit.errors import UsageError

if TYPE_CHECKING:
    from coral_spec.targets import Target

_SEED_STRIDE = 1_000_003  # between the seeds of two shards; batches within a shard count on from it


def plan_batches(lengths: list[int], batch_size: int, slots: int, new_tokens: int) -> list[slice]:
    """Cut prompts (sorted by length) into batches of at most `batch_size` rows whose cache fits `slots` tokens."""
    batches, first = [], 0
    while first < len(lengths):
        last = first
        while last < len(lengths) and last - first < batch_size:
            if last > first and (last - first + 1) * (lengths[last] + new_tokens) > slots:
                break
            last += 1
        batches.append(slice(first, last))
        first = last
    return batches


def write_answers(settings: AnswersConfig, target: Target, folder: Path, world: World) -> None:
    """The whole job, with a progress bar; all processes share the work.

    Args:
        settings: where prompts come from and how they are answered.

    Raises:
        UsageError: no prompts, `folder` holds other answers, no room for a prompt, or too little memory.
    """
    if settings.prompts is not None:
        rows = read_prompts(settings.prompts, settings.limit)
    else:
        count = settings.self_prompts
        rows = own_prompts(target, count, folder, world, batch=min(settings.batch_size, count), seed=settings.seed)
    longest = min(settings.max_prompt_tokens, target.context_length - settings.max_new_tokens)
    if longest < 1:
        raise UsageError(f"context left for the prompt is {longest}; it must be positive")
    encoded = encode_prompts(target, rows, longest, settings.samples_per_prompt)
    sampling = Sampling(temperature=settings.temperature, top_p=settings.top_p, max_new_tokens=settings.max_new_tokens)
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
            folder,
            world,
            seed=settings.seed,
            batch_size=settings.batch_size,
            cache_gib=settings.cache_gib,
            shard_size=settings.shard_size,
            on_rows=show,
        )
    if world.is_main:
        answers = Answers.read(folder)
        left_out = f", {encoded.too_long} prompts left out as too long" if encoded.too_long else ""
        console().print(
            f"{len(encoded.ids)} answers, {answers.answer_tokens:,} tokens, "
            f"{100 * float(answers.ended.float().mean()):.0f} % ended by themselves{left_out}: {folder}"
        )


def own_prompts(target: Target, count: int, folder: Path, world: World, *, batch: int, seed: int) -> list[Prompt]:
    """Prompts written by the target, kept in `folder/self_prompts-COUNT-SEED.jsonl` read there the next time."""
    import json

    path = folder / f"self_prompts-{count}-{seed}.jsonl"
    if world.is_main and not path.exists():
        texts = write_own_prompts(target, count, batch=batch, seed=seed)
        if not texts:
            raise UsageError(f"{target.name} wrote no usable prompt of its own; give --prompts FILE")
        write_text(path, "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts))
    barrier()
    return read_prompts(path)


def answer_prompts(
    target: Target,
    prompts: EncodedPrompts,
    sampling: Sampling,
    folder: Path,
    world: World,
    *,
    seed: int = 0,
    batch_size: int = 256,
    cache_gib: float = 4.0,
    shard_size: int = 4096,
    on_rows: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Answer all prompts into `folder`; shards that are there already stay.

    Args:
        world: this process takes every `world.size`-th shard.
        batch_size: most rows at once.
        cache_gib: most GiB of keys and values at once; long prompts get smaller batches.
        on_rows: called with (rows finished, answer tokens made) since the last call.

    Raises:
        UsageError: `folder` holds answers made with other settings, or the device's memory is too small.
    """
    manifest = Manifest(
        model=target.name,
        tokenizer_hash=target.tokenizer_hash,
        vocab_size=_vocab_size(target),
        prompts=prompts.digest(),
        rows=len(prompts.ids),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_new_tokens=sampling.max_new_tokens,
        seed=seed,
        batch_size=batch_size,
        cache_gib=cache_gib,
        shard_size=shard_size,
    )
    if world.is_main:
        manifest.write(folder)
    barrier()
    for shard in range(world.rank, manifest.shards, world.size):
        rows = slice(shard * shard_size, min((shard + 1) * shard_size, manifest.rows))
        path = shard_path(folder, shard)
        if path.exists():
            if on_rows is not None:
                on_rows(rows.stop - rows.start, 0)
            continue
        ids = prompts.ids[rows]
        answers = _answer_shard(target, ids, sampling, manifest, seed * 7_919 + shard * _SEED_STRIDE, on_rows)
        write_shard(path, ids, answers, prompts.index[rows], manifest.vocab_size)
    barrier()
    return manifest


def _answer_shard(
    target: Target,
    prompts: list[list[int]],
    sampling: Sampling,
    manifest: Manifest,
    seed: int,
    on_rows: Callable[[int, int], None] | None,
) -> list[Answer]:
    slots = int(manifest.cache_gib * 2**30) // cache_bytes_per_token(target)
    answers: list[Answer] = []

    def on_tokens(tokens: int) -> None:
        if on_rows is not None:
            on_rows(0, tokens)

    batches = plan_batches([len(ids) for ids in prompts], manifest.batch_size, slots, sampling.max_new_tokens)
    for number, batch in enumerate(batches):
        try:
            answers += answer_batch(target, prompts[batch], sampling, seed=seed + number, on_tokens=on_tokens)
        except torch.OutOfMemoryError:
            raise UsageError(
                f"{batch.stop - batch.start} answers at once do not fit the memory of {target.device}; "
                f"lower --batch-size ({manifest.batch_size}) or --cache-gib ({manifest.cache_gib})"
            ) from None
        if on_rows is not None:
            on_rows(batch.stop - batch.start, 0)
    return answers


def _vocab_size(target: Target) -> int:
    model: Any = target.model
    return int(model.get_output_embeddings().weight.shape[0])
