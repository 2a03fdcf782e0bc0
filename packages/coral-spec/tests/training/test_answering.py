"""Answers on disk: shards are resumable and exact, prompts are read strictly."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from coral_spec.training import answering
from coral_spec.training.answering import answer_prompts, plan_batches
from coral_spec.training.data import Answers, shard_path
from coral_spec.training.generation import Answer, Sampling
from coral_spec.training.prompts import encode_prompts, read_prompts, user_prefix, write_own_prompts
from expkit.distributed import World
from expkit.errors import UsageError
from tiny import tiny_target

ALONE = World(rank=0, size=1, local_rank=0)
SAMPLING = Sampling(temperature=1.0, max_new_tokens=12)
TEXTS = ["one", "a second prompt", "third", "the fourth of the prompts", "5"]


def make(target, folder: Path, **options) -> Answers:  # type: ignore[no-untyped-def]
    prompts = encode_prompts(target, TEXTS, 100)
    answer_prompts(target, prompts, SAMPLING, folder, ALONE, batch_size=2, shard_size=2, **options)
    return Answers.read(folder)


def test_rows_hold_the_prompt_and_the_answer(tmp_path: Path) -> None:
    target = tiny_target()
    answers = make(target, tmp_path)
    prompts = encode_prompts(target, TEXTS, 100)
    assert answers.prompt_index.tolist() == prompts.index
    for row, ids in enumerate(prompts.ids):
        start, end = answers.offsets[row], answers.offsets[row + 1]
        assert answers.tokens[start : start + len(ids)].tolist() == ids
        assert answers.prompt_lengths[row] == len(ids)
        assert 0 < end - start - len(ids) <= 12
        assert bool(answers.ended[row]) == (int(answers.tokens[end - 1]) in target.eos_token_ids)


def test_a_killed_job_ends_with_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target()
    make(target, tmp_path / "whole")
    original, calls = answering.answer_batch, []

    def killed_on_second(*args, **kwargs):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(answering, "answer_batch", killed_on_second)
    with pytest.raises(KeyboardInterrupt):
        make(target, tmp_path / "killed")
    with pytest.raises(UsageError, match="2 of 3 shards are missing"):
        Answers.read(tmp_path / "killed")
    make(target, tmp_path / "killed")
    for shard in range(3):
        whole, resumed = (shard_path(tmp_path / name, shard).read_bytes() for name in ("whole", "killed"))
        assert whole == resumed


def test_two_processes_share_the_shards(tmp_path: Path) -> None:
    target = tiny_target()
    prompts = encode_prompts(target, TEXTS, 100)
    for rank in (1, 0):
        world = World(rank=rank, size=2, local_rank=rank)
        if rank == 1:
            answer_prompts(target, prompts, SAMPLING, tmp_path / "two", world, batch_size=2, shard_size=2)
            assert not shard_path(tmp_path / "two", 0).exists()
        else:
            answer_prompts(target, prompts, SAMPLING, tmp_path / "two", world, batch_size=2, shard_size=2)
    assert torch.equal(Answers.read(tmp_path / "two").tokens, make(target, tmp_path / "one").tokens)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    target = tiny_target()
    make(target, tmp_path)
    with pytest.raises(UsageError, match=r"seed \(0 -> 1\)"):
        make(target, tmp_path, seed=1)


def test_batches_respect_rows_and_cache() -> None:
    lengths = [1, 1, 1, 5, 5, 20]
    batches = plan_batches(lengths, batch_size=2, slots=1000, new_tokens=4)
    assert [(b.start, b.stop) for b in batches] == [(0, 2), (2, 4), (4, 6)]
    batches = plan_batches(lengths, batch_size=4, slots=20, new_tokens=4)
    assert [(b.start, b.stop) for b in batches] == [(0, 3), (3, 5), (5, 6)]  # a row too long goes alone


def test_token_ids_above_16_bit_survive(tmp_path: Path) -> None:
    from coral_spec.training.data import Manifest, write_shard

    manifest = Manifest("m", "h", 262_144, "p", 1, 1.0, 1.0, 4, 0, 1, 1.0, 8)
    manifest.write(tmp_path)
    write_shard(shard_path(tmp_path, 0), [[1, 262_143]], [Answer([70_000], False)], [0], 262_144)
    assert Answers.read(tmp_path).tokens.tolist() == [1, 262_143, 70_000]


def test_ranking_counts_answers_only(tmp_path: Path) -> None:
    from coral_spec.training.data import Manifest, write_shard

    Manifest("m", "h", 8, "p", 2, 1.0, 1.0, 4, 0, 1, 1.0, 8).write(tmp_path)
    write_shard(shard_path(tmp_path, 0), [[7, 7], [6]], [Answer([5, 5, 3], True), Answer([2, 2, 2], True)], [0, 1], 8)
    answers = Answers.read(tmp_path)
    assert answers.answer_tokens == 6
    assert answers.frequency_ranking(torch.tensor([0, 1]), 8).tolist() == [2, 5, 3, 0, 1, 4, 6, 7]
    assert answers.frequency_ranking(torch.tensor([0]), 8).tolist() == [5, 3, 0, 1, 2, 4, 6, 7]


def test_prompts_are_read_plain_or_packed_as_text_or_messages(tmp_path: Path) -> None:
    conversation = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "left out"},
    ]
    lines = [json.dumps({"prompt": "hello", "source": "x"}), "", json.dumps({"messages": conversation})]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    for name in ("p.jsonl", "p.jsonl.gz"):
        assert read_prompts(tmp_path / name) == ["hello", conversation[:3]]
    assert read_prompts(tmp_path / "p.jsonl", limit=1) == ["hello"]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"prompt": 3}', '{"messages": []}', '{"prompt": ""}'])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(UsageError, match="line 2"):
        read_prompts(tmp_path / "p.jsonl")


def test_a_missing_or_damaged_prompt_file_is_wrong_use(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl.gz").write_bytes(b"not gzip")
    for name in ("absent.jsonl", "p.jsonl.gz"):
        with pytest.raises(UsageError, match=name):
            read_prompts(tmp_path / name)


def test_own_prompts_start_where_the_user_speaks() -> None:
    target = tiny_target()
    assert target.tokenizer.decode(user_prefix(target)) == "<|im_start|>user\n"
    prompts = write_own_prompts(target, 3, batch=16, seed=0)
    assert len(set(prompts)) == len(prompts) == 3
    assert write_own_prompts(target, 3, batch=16, seed=0) == prompts
    with pytest.raises(UsageError, match="no chat template"):
        user_prefix(tiny_target(chat=False))
