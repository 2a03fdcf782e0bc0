"""Answers on disk: shards of token ids with a manifest, written once each, read back as one flat tensor.

A shard is a safetensors file: `tokens` (all rows end to end, prompt then answer), `offsets` (rows + 1),
`prompt_lengths`, `ended` (1 where the answer has its end-of-text token) and `prompt_index` (row of the prompt file).
Token ids are uint16 where the vocabulary allows, else int32.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coral_spec.training.generation import Answer
from expkit.checkpoint import load_tensors, save_tensors, write_json
from expkit.errors import UsageError

if TYPE_CHECKING:
    from coral_spec.targets import Target

FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What determines the answers in a folder: two folders with equal manifests hold equal answers.

    Attributes:
        model: name of the target.
        tokenizer_hash: of the target's tokenizer.
        vocab_size: rows of the target's head.
        prompts: SHA-256 of the encoded prompts.
        rows: answers in total.
        temperature, top_p, max_new_tokens, seed: how they were drawn.
        batch_size, cache_gib, shard_size: how they were batched, which also decides the random numbers.
    """

    model: str
    tokenizer_hash: str
    vocab_size: int
    prompts: str
    rows: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    batch_size: int
    cache_gib: float
    shard_size: int
    format: int = FORMAT

    @property
    def shards(self) -> int:
        """Number of shard files."""
        return -(-self.rows // self.shard_size)

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, or check that the one there is the same.

        Raises:
            UsageError: the folder holds answers made otherwise; what differs is named.
        """
        path = folder / "manifest.json"
        if not path.exists():
            write_json(path, asdict(self))
            return
        before, now = asdict(Manifest.read(folder)), asdict(self)
        changed = [f"{key} ({before[key]!r} -> {now[key]!r})" for key in now if before[key] != now[key]]
        if changed:
            raise UsageError(f"{folder} holds answers made with other settings: {', '.join(changed)}; choose another")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read `manifest.json`; UsageError when the folder has none or it is damaged."""
        path = folder / "manifest.json"
        if not path.is_file():
            raise UsageError(f"{folder} holds no answers (no manifest.json); make them with `coral-spec data`")
        try:
            fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return cls(**fields)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} is no manifest of answers: {error}") from None


def shard_path(folder: Path, shard: int) -> Path:
    """File of one shard."""
    return folder / f"answers-{shard:05d}.safetensors"


def write_shard(
    path: Path, prompts: Sequence[Sequence[int]], answers: Sequence[Answer], index: Sequence[int], vocab_size: int
) -> None:
    """Write prompts and their answers, row by row."""
    rows = [[*prompt, *answer.tokens] for prompt, answer in zip(prompts, answers, strict=True)]
    lengths = torch.tensor([0, *map(len, rows)])
    dtype = torch.uint16 if vocab_size <= 2**16 else torch.int32
    tensors = {
        "tokens": torch.tensor([token for row in rows for token in row]).to(dtype),
        "offsets": lengths.cumsum(0),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32),
        "ended": torch.tensor([answer.ended for answer in answers], dtype=torch.uint8),
        "prompt_index": torch.tensor(index, dtype=torch.int32),
    }
    save_tensors(path, tensors)


@dataclass(frozen=True)
class Answers:
    """Rows of prompt and answer, end to end.

    Attributes:
        tokens: int32 ``(total,)``.
        offsets: int64 ``(rows + 1,)``: row r is ``tokens[offsets[r]:offsets[r + 1]]``.
        prompt_lengths: int64 ``(rows,)``.
        ended: bool ``(rows,)``.
        prompt_index: int64 ``(rows,)``: rows with the same number answer the same prompt.
    """

    tokens: Tensor
    offsets: Tensor
    prompt_lengths: Tensor
    ended: Tensor
    prompt_index: Tensor

    @classmethod
    def read(cls, folder: Path) -> Answers:
        """All shards of a folder, in order.

        Raises:
            UsageError: no manifest, a shard missing or damaged.
        """
        manifest = Manifest.read(folder)
        missing = [shard for shard in range(manifest.shards) if not shard_path(folder, shard).is_file()]
        if missing:
            raise UsageError(
                f"{folder} is incomplete: {len(missing)} of {manifest.shards} shards are missing; "
                "run `coral-spec data` again with the same settings"
            )
        shards = [load_tensors(shard_path(folder, shard)) for shard in range(manifest.shards)]
        lengths = torch.cat([shard["offsets"].diff() for shard in shards])
        return cls(
            tokens=torch.cat([shard["tokens"].to(torch.int32) for shard in shards]),
            offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            prompt_lengths=torch.cat([shard["prompt_lengths"].long() for shard in shards]),
            ended=torch.cat([shard["ended"].bool() for shard in shards]),
            prompt_index=torch.cat([shard["prompt_index"].long() for shard in shards]),
        )

    @classmethod
    def join(cls, parts: Sequence[Answers]) -> Answers:
        """Rows of several folders one after the other; equal prompt numbers count as the same prompt."""
        lengths = torch.cat([part.lengths for part in parts])
        return cls(
            tokens=torch.cat([part.tokens for part in parts]),
            offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            prompt_lengths=torch.cat([part.prompt_lengths for part in parts]),
            ended=torch.cat([part.ended for part in parts]),
            prompt_index=torch.cat([part.prompt_index for part in parts]),
        )

    @property
    def lengths(self) -> Tensor:
        """Tokens of every row ``(rows,)``."""
        return self.offsets.diff()

    @property
    def answer_tokens(self) -> int:
        """Tokens of all answers."""
        return int(self.lengths.sum() - self.prompt_lengths.sum())

    def frequency_ranking(self, rows: Tensor, vocab_size: int) -> Tensor:
        """Token ids by their count in the answers of `rows`, most frequent first, ties by id: int32 ``(vocab,)``."""
        index = torch.arange(len(self.tokens))
        row = torch.bucketize(index, self.offsets[1:], right=True)
        chosen = torch.zeros(len(self.prompt_lengths), dtype=torch.bool)
        chosen[rows] = True
        in_answer = index - self.offsets[row] >= self.prompt_lengths[row]
        counts = torch.bincount(self.tokens[in_answer & chosen[row]].long(), minlength=vocab_size)
        return counts.argsort(descending=True, stable=True).to(torch.int32)


def require_same_target(manifest: Manifest, target: Target, folder: Path) -> None:
    """UsageError naming both values when the answers were written by another model."""
    if manifest.tokenizer_hash != target.tokenizer_hash:
        raise UsageError(
            f"{folder} holds answers of {manifest.model}: tokenizer hash {manifest.tokenizer_hash[:12]}, "
            f"but {target.name} has {target.tokenizer_hash[:12]}"
        )
