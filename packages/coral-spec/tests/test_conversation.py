"""A conversation runs only what is new, and says what a fresh one would say."""

from __future__ import annotations

import pytest
import torch

from coral_spec.model import load
from coral_spec.sampling import Sampling
from coral_spec.tree import TreeShape
from drafting import drafting_model
from expkit.errors import UsageError
from tiny import tiny_target


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_kept_cache_answers_like_a_fresh_one(architecture, tmp_path):
    model = drafting_model(tiny_target(architecture, context=2048), tmp_path)
    conversation = model.chat(system="short")
    for text in ("tell me a tale", "and then", "why so"):
        before = [*conversation.messages, {"role": "user", "content": text}]
        answer = conversation.send(text, max_new_tokens=24)
        assert answer.token_ids == model.generate(before, max_new_tokens=24).token_ids
        assert conversation.messages[-1] == {"role": "assistant", "content": answer.text}


def test_a_later_turn_takes_a_better_tree(tmp_path):
    model = drafting_model(tiny_target("llama", context=2048), tmp_path)
    conversation = model.chat()
    for shape in (TreeShape(2, 2, 4), TreeShape(4, 3, 12)):
        model._tree = shape
        messages = [*conversation.messages, {"role": "user", "content": "go on"}]
        answer = conversation.send("go on", max_new_tokens=24)
        assert answer.statistics.tree == str(shape)
        assert answer.token_ids == model.generate(messages, max_new_tokens=24).token_ids


def test_statistics_of_a_turn_stay_those_of_that_turn(tmp_path):
    model = drafting_model(tiny_target("llama", context=2048), tmp_path)
    conversation = model.chat()
    model._tree = TreeShape(2, 2, 4)
    first = conversation.stream("tell me a tale", max_new_tokens=8)
    list(first)
    before = first.result().statistics
    model._tree = TreeShape(4, 3, 12)
    conversation.send("go on", max_new_tokens=200, ignore_eos=True)
    after = first.result().statistics
    assert (after.tree, after.depth, after.cache_bytes) == (before.tree, before.depth, before.cache_bytes)
    assert after.tree == "2,2,4"


def test_a_later_turn_prefills_only_what_is_new(tmp_path, monkeypatch):
    model = drafting_model(tiny_target("llama", context=2048), tmp_path)
    conversation = model.chat()
    conversation.send("a long first message " * 8, max_new_tokens=8)
    kept = []
    session = conversation._session
    prefill = session.prefill
    monkeypatch.setattr(session, "prefill", lambda ids, keep=0: kept.append((keep, len(ids))) or prefill(ids, keep))
    conversation.send("next", max_new_tokens=8)
    (keep, length) = kept[0]
    assert keep > 150
    assert length - keep < 60


def test_a_base_model_cannot_converse():
    model = load(tiny_target("llama", chat=False), draft="none")
    with pytest.raises(UsageError, match="chat template"):
        model.chat().send("hello")


@pytest.mark.parametrize("where", ["cache", "draft"])
def test_without_memory_to_grow_a_turn_is_refused_and_nothing_is_lost(where, tmp_path, monkeypatch):
    model = drafting_model(tiny_target("llama", context=2048), tmp_path)
    conversation, whole = model.chat(), model.chat()
    for each in (conversation, whole):
        each.send("hello", max_new_tokens=8)
    session = conversation._session
    grown = []

    def refuse(*sizes):
        grown.append(sizes)
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        if where == "draft":
            patch.setattr(session.draft, "resize", refuse)
        else:  # the last of all buffers of the cache
            patch.setattr("coral_spec.cache._grown", refuse)
            patch.setattr("coral_spec.cache.StaticCache.allocate", refuse)
        with pytest.raises(UsageError, match=r"no memory to grow the cache from \d+ to \d+ tokens"):
            conversation.send("a longer turn " * 20, max_new_tokens=60)
    assert grown
    wanted = whole.send("a longer turn " * 20, max_new_tokens=60)
    assert conversation.send("a longer turn " * 20, max_new_tokens=60).token_ids == wanted.token_ids


@pytest.mark.parametrize("draft", ["none", "drafter"])
def test_rows_of_a_prefix_are_the_answers_to_their_seeds(draft, tmp_path):
    target = tiny_target("mistral-window")
    model = load(target, draft="none") if draft == "none" else drafting_model(target, tmp_path)
    ids = [5, 9, 40, 7, 5, 9, 40, 8] * 4
    prefix = model.prefix(ids)
    for seeds in ([4, 9], [1, 2, 3, 4], [7]):  # a prefix is used again and again
        rows = prefix.generate(seeds, max_new_tokens=12, sampling=Sampling(temperature=1.1))
        for seed, row in zip(seeds, rows, strict=True):
            alone = model.generate(ids, max_new_tokens=12, temperature=1.1, seed=seed, ignore_eos=True)
            assert row == alone.token_ids


def test_a_prefix_grows_when_asked_for_more():
    model = load(tiny_target("llama"), draft="ngram")
    prefix = model.prefix([3, 4, 5, 3, 4, 5], capacity=4)
    rows = prefix.generate([0, 1], max_new_tokens=30, sampling=Sampling(temperature=0.5))
    alone = model.generate([3, 4, 5, 3, 4, 5], max_new_tokens=30, temperature=0.5, seed=1, ignore_eos=True)
    assert rows[1] == alone.token_ids
    assert torch.equal(prefix.logits, model.prefix([3, 4, 5, 3, 4, 5]).logits)


def test_a_turn_that_broke_off_in_the_prefill_leaves_nothing_stale(tmp_path, monkeypatch):
    model = drafting_model(tiny_target("llama", context=2048), tmp_path)
    conversation = model.chat()
    conversation.send("tell me a tale", max_new_tokens=8)
    forward = model._backbone.forward

    def broken(*arguments, **named):
        monkeypatch.setattr(model._backbone, "forward", forward)
        raise KeyboardInterrupt

    monkeypatch.setattr(model._backbone, "forward", broken)
    with pytest.raises(KeyboardInterrupt):
        conversation.send("a long story about something else", max_new_tokens=8)
    messages = [*conversation.messages, {"role": "user", "content": "a long story about something else"}]
    again = conversation.send("a long story about something else", max_new_tokens=20)
    assert again.token_ids == model.generate(messages, max_new_tokens=20).token_ids


def test_a_prefix_beyond_the_context_is_refused():
    prefix = load(tiny_target("llama", context=16), draft="none").prefix([3, 4, 5, 6])
    with pytest.raises(UsageError, match="context of 16"):
        prefix.generate([0], max_new_tokens=13, sampling=Sampling(temperature=1.0))


def test_one_answer_at_a_time_and_one_given_up_is_no_hindrance(tmp_path):
    conversation = drafting_model(tiny_target("llama", context=2048), tmp_path).chat()
    first = iter(conversation.stream("tell me a tale", max_new_tokens=24, ignore_eos=True))
    next(first)
    with pytest.raises(UsageError, match="one at a time"):
        conversation.send("and then", max_new_tokens=8)
    first.close()
    assert conversation.send("and then", max_new_tokens=8).token_ids
