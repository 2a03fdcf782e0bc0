"""Batched answering equals one prompt at a time, for every architecture, beyond windows and through compaction."""

from __future__ import annotations

import pytest
import torch

from coral_spec.training import generation
from coral_spec.training.generation import Sampling, answer_batch, sample_tokens
from tiny import ARCHITECTURES, tiny_target

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19], [20], [30, 31, 32, 33, 34, 35] * 4]


def reference(target, prompt, limit):  # type: ignore[no-untyped-def]
    ids = torch.tensor([prompt])
    output = target.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_batch_equals_generate_one_by_one(architecture: str) -> None:
    target = tiny_target(architecture, width=32)
    answers = answer_batch(target, PROMPTS, Sampling(temperature=0, max_new_tokens=40), seed=0)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.tokens == reference(target, prompt, 40)
        assert answer.ended == (answer.tokens[-1] in target.eos_token_ids)


def test_answers_survive_dropping_finished_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target()
    plain = answer_batch(target, PROMPTS, Sampling(temperature=0, max_new_tokens=48), seed=0, stop_ids=())
    stops = [plain[0].tokens[3], plain[3].tokens[5], plain[1].tokens[30]]
    monkeypatch.setattr(generation, "CHECK_EVERY", 2)
    stopped = answer_batch(target, PROMPTS, Sampling(temperature=0, max_new_tokens=48), seed=0, stop_ids=stops)
    for long, short in zip(plain, stopped, strict=True):
        ends = [index for index, token in enumerate(long.tokens) if token in stops]
        assert short.tokens == long.tokens[: ends[0] + 1 if ends else None]
        assert short.ended == bool(ends)


def test_prompts_read_in_several_forwards_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target()
    sampling = Sampling(temperature=1.0, max_new_tokens=20)
    whole = answer_batch(target, PROMPTS, sampling, seed=3)
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 30)
    assert answer_batch(target, PROMPTS, sampling, seed=3) == whole


def test_same_seed_same_answers_and_another_seed_others() -> None:
    target = tiny_target()
    sampling = Sampling(temperature=1.0, max_new_tokens=20)
    first = answer_batch(target, PROMPTS, sampling, seed=3)
    assert answer_batch(target, PROMPTS, sampling, seed=3) == first
    assert answer_batch(target, PROMPTS, sampling, seed=4) != first


def test_the_model_keeps_its_own_attention_afterwards() -> None:
    target = tiny_target()
    answer_batch(target, PROMPTS, Sampling(max_new_tokens=2), seed=0)
    assert target.model.config._attn_implementation == "sdpa"


def test_sampled_frequencies_follow_temperature_and_top_p() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    rows = logits.expand(40_000, -1)
    for top_p, kept in ((1.0, 4), (0.9, 3), (0.5, 1)):
        drawn = sample_tokens(rows, Sampling(temperature=1.0, top_p=top_p), generator)
        found = torch.bincount(drawn, minlength=4) / len(drawn)
        expected = torch.softmax(logits, 0)
        expected[kept:] = 0
        assert torch.allclose(found, expected / expected.sum(), atol=0.01)
