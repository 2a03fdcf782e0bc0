"""Losslessness: whatever the draft, the text is the target's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coral_spec.model import load
from coral_spec.sampling import Sampling
from coral_spec.statistics import Stopwatch
from coral_spec.tree import TreeShape
from drafting import PROMPT, OracleDraft, clear_target, drafting_model
from tiny import ARCHITECTURES, tiny_target


def reference(target, ids, count):
    """Greedy ids by transformers' own cache and loop."""
    tokens = torch.tensor([ids], device=target.device)
    output = target.model.generate(tokens, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_decoding_equals_transformers_beyond_the_window(architecture):
    target = clear_target(architecture)
    ours = load(target, draft="none").generate(PROMPT, max_new_tokens=48, ignore_eos=True)
    assert ours.token_ids == reference(target, PROMPT, 48)


@pytest.mark.parametrize("draft", ["ngram", "drafter"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tree_equals_plain_decoding_beyond_the_window(architecture, draft, tmp_path):
    target = clear_target(architecture)
    plain = load(target, draft="none")
    model = (
        load(target, draft="ngram", tree=TreeShape(4, 3, 12)) if draft == "ngram" else drafting_model(target, tmp_path)
    )
    wanted = plain.generate(PROMPT, max_new_tokens=60, ignore_eos=True)
    found = model.generate(PROMPT, max_new_tokens=60, ignore_eos=True)
    assert found.token_ids == wanted.token_ids
    assert found.text == wanted.text


@pytest.mark.parametrize("shape", [TreeShape(1, 1, 1), TreeShape(5, 1, 5), TreeShape(1, 4, 4), TreeShape(3, 4, 24)])
def test_every_tree_shape_is_lossless(shape, tmp_path):
    target = clear_target("llama")
    wanted = load(target, draft="none").generate(PROMPT, max_new_tokens=40, ignore_eos=True)
    found = drafting_model(target, tmp_path, shape).generate(PROMPT, max_new_tokens=40, ignore_eos=True)
    assert found.token_ids == wanted.token_ids


@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 20}, {"temperature": 1.3, "top_p": 0.8}]
)
def test_same_seed_gives_plain_decodings_sample(options, tmp_path):
    target = tiny_target("qwen3")
    plain, model = load(target, draft="none"), drafting_model(target, tmp_path)
    for seed in range(3):
        wanted = plain.generate(PROMPT, max_new_tokens=30, ignore_eos=True, seed=seed, **options)
        found = model.generate(PROMPT, max_new_tokens=30, ignore_eos=True, seed=seed, **options)
        assert found.token_ids == wanted.token_ids


def test_a_few_head_rows_cost_acceptance_only(tmp_path):
    target = clear_target("llama")
    wanted = load(target, draft="none").generate(PROMPT, max_new_tokens=40, ignore_eos=True)
    found = drafting_model(target, tmp_path, head=64).generate(PROMPT, max_new_tokens=40, ignore_eos=True)
    assert found.token_ids == wanted.token_ids


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_accepted_branches_are_committed_in_order(architecture):
    """A draft that knows the answer, hides it among wrong siblings and sometimes errs, is followed exactly."""
    target = clear_target(architecture)
    plain = load(target, draft="none")
    wanted = plain.generate(PROMPT, max_new_tokens=60, ignore_eos=True, record_logits=True)
    model = load(target, draft="none")
    oracle = OracleDraft([*PROMPT, *wanted.token_ids], depth=5)
    model._make_draft = lambda _: oracle
    found = model.generate(PROMPT, max_new_tokens=60, ignore_eos=True, record_logits=True)
    assert found.token_ids == wanted.token_ids
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-3, rtol=1e-4)
    assert found.statistics.tau > 2.5
    assert found.statistics.rounds < 30


@settings(max_examples=15, deadline=None)
@given(ids=st.lists(st.integers(3, 200), min_size=1, max_size=70), seed=st.integers(0, 2**40))
def test_any_prompt_and_seed_is_lossless(ids, seed, tmp_path_factory):
    target = tiny_target("mistral-window")
    options = {"max_new_tokens": 12, "ignore_eos": True, "temperature": 0.9, "seed": seed}
    model = drafting_model(target, tmp_path_factory.mktemp("drafter"))
    assert model.generate(ids, **options).token_ids == load(target, draft="none").generate(ids, **options).token_ids


def test_recorded_logits_are_those_of_plain_decoding(tmp_path):
    target = clear_target("gemma3")
    options = {"max_new_tokens": 30, "ignore_eos": True, "record_logits": True}
    wanted = load(target, draft="none").generate(PROMPT, **options).logits
    found = drafting_model(target, tmp_path).generate(PROMPT, **options).logits
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)


def test_the_tree_fits_a_long_prompt_prefilled_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("coral_spec.engine.PREFILL_CHUNK", 7)
    monkeypatch.setattr("coral_spec.drafts.PREFILL_CHUNK", 5)
    target = clear_target("gemma3")
    ids = [3 + (7 * i) % 150 for i in range(60)]
    found = drafting_model(target, tmp_path).generate(ids, max_new_tokens=20, ignore_eos=True)
    assert found.token_ids == reference(target, ids, 20)


@torch.inference_mode()
def test_what_dropped_rounds_left_behind_survives_growing(tmp_path):
    model = drafting_model(clear_target("llama"), tmp_path)
    session, seeds = model.session(40), torch.zeros(1, dtype=torch.long)
    session.begin(*session.prefill(PROMPT), 0, Sampling(), seeds)
    session.launch(Sampling(), seeds)  # begun, and never collected
    session.settle()
    length = int(session.lengths)
    assert session.filled == length > len(PROMPT)
    before = session.cache.store(0).keys[:, :, :length].clone()
    session.reserve(500)
    assert torch.equal(session.cache.store(0).keys[:, :, :length], before)


def test_a_round_that_was_interrupted_while_it_was_read_is_kept_when_growing(tmp_path):
    model = drafting_model(clear_target("llama"), tmp_path)
    session = model.session(60)
    with torch.inference_mode():
        logits, features = session.prefill(PROMPT)
        seeds = torch.zeros(1, dtype=torch.long)
        session.begin(logits, features, 0, Sampling(), seeds)
        session.launch(Sampling(), seeds)
        session._ready.clear()  # as Ctrl-C leaves it when it comes between two lines of `collect`
        session.reserve(200)
        assert session.filled == int(session.lengths.max())
        assert all(bool(store.keys[:, :, session.filled - 1].any()) for store in session.cache.stores.values())


def test_room_doubles_when_it_grows(tmp_path):
    session = drafting_model(clear_target("llama"), tmp_path).session(60)
    room = session.room
    session.reserve(room + 1)
    assert 2 * room <= session.room < 2 * room + 64


@pytest.mark.parametrize("shape", [TreeShape(6, 1, 3), TreeShape(4, 3, 12), TreeShape(5, 4, 5)])
def test_ngram_trees_keep_to_their_budget(shape):
    draft = load(clear_target("llama"), draft="ngram", tree=shape)._make_draft(shape)
    tree = draft.propose(torch.tensor([[7, 8, 9, 10, 11] * 8]), torch.tensor([30]), 30, Stopwatch(torch.device("cpu")))
    assert draft.rows <= shape.budget + 1
    assert tree.tokens.shape[1] <= shape.budget + 1


def test_another_tree_goes_on_from_what_is_cached(tmp_path):
    target = clear_target("llama")
    model = drafting_model(target, tmp_path)
    plain = load(target, draft="none").generate(PROMPT, max_new_tokens=60, ignore_eos=True).token_ids
    session = model.session(100)
    with torch.inference_mode():
        seeds = torch.zeros(1, dtype=torch.long)
        tokens = session.begin(*session.prefill(PROMPT), 0, Sampling(), seeds)
        for shape in (TreeShape(2, 2, 4), TreeShape(4, 3, 12), TreeShape(1, 1, 1), TreeShape(2, 2, 4)):
            assert session.redraft(model._make_draft(shape))
            assert session.draft.shape == shape
            lengths = [len(session.round(Sampling(), seeds).tokens[0]) for _ in range(3)]
            assert max(lengths) <= shape.depth + 1
        tokens = session.history[0, len(PROMPT) : session.filled + 1].tolist()
        assert tokens == plain[: len(tokens)] and len(tokens) > 12


def test_a_drafter_cannot_take_over_what_it_has_not_seen(tmp_path):
    target = clear_target("llama")
    session = load(target, draft="none").session(60)
    assert not session.redraft(drafting_model(target, tmp_path)._make_draft(TreeShape(2, 2, 4)))
    assert session.draft.shape is None


@pytest.mark.parametrize("shape", [None, TreeShape(6, 10, 60), TreeShape(3, 4, 12)])
def test_slots_come_in_numbers_that_kernels_are_compiled_for_once(shape, tmp_path):
    """Whatever a tree needs behind the last token: 75 slots for 6,10,60, which 16 does not divide."""
    target = clear_target("llama")
    model = load(target, draft="none") if shape is None else drafting_model(target, tmp_path, shape)
    session = model.session(100)
    assert session.capacity % 64 == 0 and session.room >= 100
    room = session.room
    session.reserve(room + 1)
    assert session.capacity % 64 == 0 and session.room >= room + 1
