"""Which tree is chosen, and when it is chosen anew."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from coral_spec import load
from coral_spec.tree import TreeShape
from coral_spec.tuning.acceptance import Acceptance
from coral_spec.tuning.choose import LIKELY, Tuner, choose, expect
from coral_spec.tuning.costs import StepCosts
from drafting import PROMPT, clear_target, save_drafter

SMALL, LARGE = TreeShape(2, 2, 3), TreeShape(6, 10, 60)
ACCEPTANCE = Acceptance({SMALL: [0.7, 0.4], LARGE: [0.85, 0.7, 0.55, 0.4, 0.3, 0.2]})
ROWS_COST = StepCosts(plain=10.0, verify={4: 11.0, 61: 40.0}, level={1: 1.0, 10: 2.0})
ROWS_ARE_FREE = StepCosts(plain=10.0, verify={4: 11.0, 61: 11.5}, level={1: 0.5, 10: 0.5})
NOTHING_PAYS = StepCosts(plain=10.0, verify={4: 20.0, 61: 300.0}, level={1: 5.0, 10: 20.0})


@pytest.mark.parametrize(("costs", "wanted"), [(ROWS_COST, SMALL), (ROWS_ARE_FREE, LARGE), (NOTHING_PAYS, None)])
def test_the_shape_with_the_most_tokens_per_second_is_chosen(costs, wanted):
    assert choose(costs, ACCEPTANCE).shape == wanted


def test_text_that_differs_is_weighed_by_the_time_it_takes():
    costs = StepCosts(plain=10.0, verify={4: 11.0, 61: 13.0}, level={1: 1.0, 10: 1.5})
    one, both = (choose(costs, ACCEPTANCE, 1.0, spread=spread) for spread in ((1.0,), (1.0, 6.0)))
    assert (one.shape, both.shape) == (LARGE, SMALL)
    taus = [ACCEPTANCE.tau(SMALL, hardness) for hardness in (1.0, 6.0)]
    assert both.tau == pytest.approx(2 / sum(1 / tau for tau in taus))


def test_only_rows_that_were_timed_are_chosen():
    costs = StepCosts(plain=10.0, verify={4: 11.0, 60: 11.0}, level={1: 0.1, 10: 0.1})
    assert choose(costs, ACCEPTANCE).shape == SMALL


def test_drafting_can_be_insisted_on():
    assert choose(NOTHING_PAYS, ACCEPTANCE, plain=False).shape == SMALL


def test_tokens_per_second_are_tau_over_the_rounds_time():
    assert expect(None, ROWS_COST, ACCEPTANCE).tokens_per_second == pytest.approx(100.0)
    assert expect(SMALL, ROWS_ARE_FREE, ACCEPTANCE, 1.0).tokens_per_second == pytest.approx(2.1e3 / 11.5, rel=0.01)


def test_acceptance_as_expected_changes_nothing():
    tuner = Tuner(ROWS_COST, ACCEPTANCE)
    tuner.hardness = 1.0
    tuner.note(SMALL, [2] * 40 + [1] * 30 + [0] * 30)
    assert tuner.hardness == pytest.approx(1.0, abs=1e-3)
    assert tuner.shape == SMALL


def test_text_that_is_easy_gets_a_larger_tree_after_some_answers():
    tuner = Tuner(StepCosts(plain=10.0, verify={4: 11.0, 61: 18.0}, level={1: 1.0, 10: 1.5}), ACCEPTANCE)
    assert tuner.shape == SMALL
    tuner.note(SMALL, [2] * 20)
    assert tuner.shape == SMALL  # one short answer is no reason
    for _ in range(10):
        tuner.note(SMALL, [2] * 100)
    assert tuner.shape == LARGE


def test_a_change_that_costs_is_made_when_as_much_was_lost():
    costs = StepCosts(plain=10.0, verify={4: 11.0, 61: 18.0}, level={1: 1.0, 10: 1.5}, change=3000.0)
    free, dear = Tuner(replace(costs, change=0.0), ACCEPTANCE), Tuner(costs, ACCEPTANCE)
    free_at, dear_at = (
        next(answer for answer in range(100) if tuner.note(SMALL, [2] * 100) or tuner.shape == LARGE)
        for tuner in (free, dear)
    )
    best, now = (expect(shape, costs, ACCEPTANCE, dear.hardness) for shape in (LARGE, SMALL))
    share = 1 - now.tokens_per_second / best.tokens_per_second
    assert dear_at - free_at >= 3000.0 / (100 * now.milliseconds * share) - 2
    assert dear.lost == 0.0


def test_a_shape_that_is_captured_already_costs_nothing_to_change_to():
    costs = StepCosts(plain=10.0, verify={4: 11.0, 61: 18.0}, level={1: 1.0, 10: 1.5}, change=1e9)
    for ready, wanted in (((), SMALL), ((LARGE,), LARGE)):
        tuner = Tuner(costs, ACCEPTANCE)
        for _ in range(10):
            tuner.note(tuner.shape, [2] * 100, ready)
        assert tuner.shape == wanted


def test_of_captured_shapes_the_best_is_taken_while_a_better_one_is_not_captured():
    middle = TreeShape(4, 10, 60)
    acceptance = Acceptance({**ACCEPTANCE.survival, middle: [0.85, 0.7, 0.55, 0.4]})
    costs = StepCosts(plain=10.0, verify={4: 11.0, 61: 14.0}, level={1: 1.0, 10: 1.0}, change=1e9)
    tuner = Tuner(costs, acceptance)
    tuner.shape = SMALL
    for _ in range(10):
        tuner.note(SMALL, [2] * 100, (SMALL, middle))
    assert (tuner.shape, choose(costs, acceptance, tuner.hardness).shape) == (middle, LARGE)
    assert 0 < tuner.lost < 1e9


def test_likely_trees_are_those_of_easier_and_harder_text():
    costs = StepCosts(plain=1.0, verify={4: 2.0, 61: 5.0}, level={1: 0.1, 10: 0.25})
    tuner = Tuner(costs, ACCEPTANCE)
    others = {choose(costs, ACCEPTANCE, hardness).shape for hardness in LIKELY} - {tuner.shape, None}
    assert others and set(tuner.likely) == others and len(tuner.likely) == len(others)


def test_a_drafter_that_is_never_right_is_left_out():
    tuner = Tuner(ROWS_COST, ACCEPTANCE)
    for _ in range(10):
        tuner.note(tuner.shape, [0] * 100)
    assert tuner.shape is None


def test_a_drafter_without_profile_drafts_until_answers_have_shown_what_is_accepted():
    tuner = Tuner(NOTHING_PAYS, ACCEPTANCE, own=False)
    assert tuner.shape == SMALL
    tuner.note(SMALL, [0] * 100)
    assert tuner.shape is None


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CORAL_SPEC_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("coral_spec.tuning.costs.PREEMPTIONS", float("inf"))  # other tests may run beside this one
    return tmp_path / "home"


def test_load_chooses_a_tree_by_measurement_and_keeps_the_costs(home, tmp_path):
    folder = save_drafter(clear_target("llama"), tmp_path / "drafter")
    model = load(clear_target("llama"), draft=str(folder))
    (file,) = (home / "timings").iterdir()
    before = file.stat().st_mtime_ns
    assert json.loads(file.read_text())["key"]["target"][0] == "tiny-llama"
    assert model.tree is not None
    assert load(clear_target("llama"), draft=str(folder)).tree == model.tree
    assert file.stat().st_mtime_ns == before


def test_text_stays_that_of_plain_decoding_while_trees_change(home, tmp_path):
    target = clear_target("llama")
    model = load(target, draft=str(save_drafter(target, tmp_path / "drafter")))
    model.tuner = Tuner(ROWS_COST, ACCEPTANCE)  # steps timed on a busy machine may say that anything pays
    wanted = load(target, draft="none").generate(PROMPT, max_new_tokens=60, ignore_eos=True).token_ids
    trees = set()
    for _ in range(12):
        trees.add(model.tree)
        assert model.generate(PROMPT, max_new_tokens=60, ignore_eos=True).token_ids == wanted
    assert None in trees and len(trees) > 1  # a random drafter is given up


def test_an_answer_is_learnt_from_during_the_next_one(home, tmp_path):
    target = clear_target("llama")
    model = load(target, draft=str(save_drafter(target, tmp_path / "drafter")))
    found = [model.tuner.hardness]
    for _ in range(2):
        model.generate(PROMPT, max_new_tokens=30, ignore_eos=True)
        found.append(model.tuner.hardness)
    assert found[1] == found[0] < found[2]  # a random drafter accepts less than any profile says


def test_a_tree_that_was_asked_for_stays(tmp_path):
    target = clear_target("llama")
    model = load(target, draft=str(save_drafter(target, tmp_path)), tree=SMALL)
    for _ in range(6):
        model.generate(PROMPT, max_new_tokens=60, ignore_eos=True)
    assert model.tree == SMALL
