"""The sampled check: its statistics, and that it tells a right engine from planted errors."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coral_spec import engine, tree
from coral_spec.check.sampled import (
    Level,
    SampledReport,
    chain_probabilities,
    check_sampled,
    chi_square_tail,
    examine_level,
)
from coral_spec.model import Model
from coral_spec.sampling import Sampling
from coral_spec.tree import Acceptance, Tree, TreeShape
from drafting import drafting_model
from tiny import tiny_target

PROMPT = list(range(5, 20))
TREE = TreeShape(2, 8, 24)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """Few tokens and many candidates, so that a random drafter is often right."""
    return drafting_model(tiny_target(vocab=24), tmp_path / "drafter", tree=TREE)


def check(model: Model, seed: int = 0) -> SampledReport:
    return check_sampled(model, model.target.model, PROMPT, draws=2000, seed=seed)


# chi-square tails from published tables
@pytest.mark.parametrize(
    ("statistic", "degrees", "p"), [(3.841, 1, 0.05), (18.307, 10, 0.05), (29.588, 10, 0.001), (0.0, 4, 1.0)]
)
def test_the_tail_is_that_of_the_tables(statistic: float, degrees: int, p: float) -> None:
    assert chi_square_tail(statistic, degrees) == pytest.approx(p, rel=2e-3)


def test_small_cells_are_pooled() -> None:
    cells = {(1, 1): 0.5, (1, 2): 0.496, (1, 3): 0.002, (2, 1): 0.002}
    counts = Counter({(1, 1): 500, (1, 2): 496, (1, 3): 2, (2, 1): 2})
    level = examine_level(counts, Level(cells, {}), 2)
    assert (level.cells, level.degrees) == (2, 1)  # the pool of 4 expected joins the smaller cell
    assert not level.pooled and level.p_value == pytest.approx(1.0)
    cells |= {(3, token): 0.001 for token in range(2)}
    assert examine_level(counts, Level(cells, {}), 2).cells == 2


def test_a_draw_that_the_target_never_makes_fails_by_itself() -> None:
    level = Level({(1, 1): 0.5, (1, 2): 0.5}, {(1,): frozenset({1, 2})})
    counts = Counter({(1, 1): 1000, (1, 2): 999, (1, 3): 1})
    result = examine_level(counts, level, 2)
    assert result.impossible == 1 and not result.passed


def test_chain_probabilities_multiply_along_the_text() -> None:
    target = tiny_target(vocab=24)
    levels = chain_probabilities(target.model, PROMPT, temperature=0.7, top_k=4)
    assert [len(level.cells) for level in levels] == [4, 16, 64]
    for level in levels:
        assert sum(level.cells.values()) == pytest.approx(1.0, abs=1e-6)
    first, second = next(iter(levels[1].cells))
    logits = target.model(input_ids=torch.tensor([[*PROMPT, first]])).logits[0, -1]
    chance = Sampling(0.7, 4).warp(logits).softmax(dim=-1)[second]
    assert levels[1].cells[first, second] == pytest.approx(levels[0].cells[(first,)] * float(chance), rel=1e-4)


def test_a_right_engine_passes_with_any_seed(model: Model) -> None:
    for seed in range(2):
        report = check(model, seed)
        assert report.passed
        assert all(level.degrees > 5 for level in report.levels)


def test_the_check_is_a_pure_function_of_the_seed(model: Model) -> None:
    short = [check_sampled(model, model.target.model, PROMPT, draws=100, seed=seed) for seed in (3, 3, 4)]
    assert short[0] == short[1] != short[2]


def test_always_keeping_the_best_child_one_time_in_ten_fails(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)

    def careless(candidates: Tree, draws: Tensor, depth: int) -> Acceptance:
        if candidates.tokens.shape[1] > 1:
            chosen = torch.rand(draws.shape[0], generator=generator) < 0.1
            draws = draws.clone()
            draws[chosen, 0] = candidates.tokens[chosen, 1]
        return tree.accept(candidates, draws, depth)

    monkeypatch.setattr(engine, "accept", careless)
    assert not check(model).passed


def test_verifying_at_a_slightly_wrong_temperature_fails(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    right = engine.Session.round

    def warmer(
        self: engine.Session, sampling: Sampling, seeds: Tensor, keep_logits: bool = False
    ) -> engine.RoundResult:
        return right(self, replace(sampling, temperature=1.15 * sampling.temperature), seeds, keep_logits)

    monkeypatch.setattr(engine.Session, "round", warmer)
    assert not check(model).passed
