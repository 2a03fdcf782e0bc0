"""Made answers and small training settings for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from coral_spec.targets import Target
from coral_spec.training.config import BatchConfig, EvaluationConfig, LossConfig, OptimizerConfig, TrainConfig
from coral_spec.training.data import Answers, Manifest, shard_path, write_shard
from coral_spec.training.generation import Sampling, answer_batch


def write_answers(folder: Path, target: Target, rows: int = 24, length: int = 20, seed: int = 0) -> Answers:
    """Let `target` answer made prompts of 3 to 9 tokens greedily, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, 250, (3 + row % 7,), generator=generator).tolist() for row in range(rows)]
    answers = answer_batch(target, prompts, Sampling(temperature=0.5, max_new_tokens=length), seed=seed)
    vocab = target.model.get_output_embeddings().weight.shape[0]  # type: ignore[no-untyped-call]
    sampling: dict[str, Any] = {"temperature": 0.5, "top_p": 1.0, "max_new_tokens": length, "seed": seed}
    manifest = Manifest(
        model=target.name,
        tokenizer_hash=target.tokenizer_hash,
        vocab_size=vocab,
        prompts="made",
        rows=rows,
        batch_size=rows,
        cache_gib=1.0,
        shard_size=rows,
        **sampling,
    )
    manifest.write(folder)
    write_shard(shard_path(folder, 0), prompts, answers, list(range(rows)), vocab)
    return Answers.read(folder)


def made_rows(rows: list[tuple[int, int, bool]]) -> Answers:
    """Rows of (prompt length, answer length, ended); token ids count up from 1."""
    lengths = torch.tensor([prompt + answer for prompt, answer, _ in rows])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    tokens = torch.arange(1, int(offsets[-1]) + 1, dtype=torch.int32)
    ended = torch.tensor([ended for *_, ended in rows])
    return Answers(tokens, offsets, torch.tensor([prompt for prompt, *_ in rows]), ended, torch.arange(len(rows)))


def small_config(data: Path, **changes: Any) -> TrainConfig:
    """Settings for a few quick steps on the CPU in fp32."""
    fields: dict[str, Any] = {
        "name": "run",
        "target": "tiny-llama",
        "data": (data,),
        "align_steps": 2,
        "steps": 4,
        "device": "cpu",
        "dtype": "fp32",
        "log_every": 1,
        "loss": LossConfig(top_from=0.5, chunk=64),
        "optimizer": OptimizerConfig(lr=3e-3),
        "batch": BatchConfig(tokens=192, max_length=64),
        "evaluation": EvaluationConfig(every=2, prompts=4, rows=4, depth=3),
    }
    return TrainConfig(**{**fields, **changes})
