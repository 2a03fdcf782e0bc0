"""The rule that tells ties from bugs."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from coral_spec.check.noise import (
    Mismatch,
    Rounding,
    find_mismatch,
    first_difference,
    forward_distances,
    is_tie,
    judge,
    logit_distance,
    margin_noise,
    position_distances,
    reference_logits,
    reference_model,
    summarise,
)
from tiny import tiny_target


@pytest.mark.parametrize(
    ("a", "b", "place"), [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [], None)]
)
def test_the_first_difference_is_where_two_answers_part(a: list[int], b: list[int], place: int | None) -> None:
    assert first_difference(a, b) == place


def tie(gap: float, noise: float, dtype: torch.dtype, size: float = 20.0) -> bool:
    return is_tie(Mismatch(3, (1, 2), gap, size), noise, dtype)


def test_in_bf16_a_gap_within_the_runs_noise_is_a_tie_and_one_above_is_not() -> None:
    assert tie(0.2, 0.25, torch.bfloat16)
    assert not tie(0.3, 0.25, torch.bfloat16)


def test_no_noise_excuses_a_gap_above_four_steps_of_the_precision_there() -> None:
    assert tie(0.5, 10.0, torch.bfloat16)
    assert not tie(0.6, 10.0, torch.bfloat16)
    assert tie(1.0, 10.0, torch.bfloat16, size=39.5)
    assert not tie(1.1, 10.0, torch.bfloat16, size=39.5)
    assert tie(0.5, 10.0, torch.bfloat16, size=0.5)
    assert not tie(0.1, 10.0, torch.float16)


@pytest.mark.parametrize("size", [math.inf, math.nan])
def test_what_is_no_number_is_never_a_tie(size: float) -> None:
    assert not tie(size, 10.0, torch.bfloat16, size)
    assert not tie(size, 10.0, torch.float32, size)


def test_in_fp32_only_a_gap_under_a_thousandth_is_a_tie_whatever_the_noise() -> None:
    assert tie(9e-4, 0.0, torch.float32)
    assert not tie(2e-3, 10.0, torch.float32)


def test_logits_twice_as_far_from_fp32_as_the_baselines_are_a_bug_even_with_the_same_tokens() -> None:
    assert judge(None, torch.bfloat16, noise=0.3, distance=0.09, baseline_distance=0.05).verdict == "exact"
    assert judge(None, torch.bfloat16, noise=0.3, distance=0.11, baseline_distance=0.05).verdict == "bug"


def test_a_close_gap_is_no_excuse_for_logits_that_are_too_far() -> None:
    mismatch = Mismatch(3, (1, 2), gap=0.01, size=20.0)
    assert judge(mismatch, torch.bfloat16, noise=0.3, distance=0.05, baseline_distance=0.05).verdict == "tie"
    assert judge(mismatch, torch.bfloat16, noise=0.3, distance=0.5, baseline_distance=0.05).verdict == "bug"


def test_noise_of_the_judged_run_counts_where_its_logits_are_as_near_to_fp32_as_the_baselines() -> None:
    mismatch = Mismatch(3, (1, 2), gap=0.4, size=20.0)

    def verdict(own_noise: float, distance: float) -> str:
        return judge(
            mismatch, torch.bfloat16, noise=0.3, own_noise=own_noise, distance=distance, baseline_distance=0.05
        ).verdict

    assert verdict(0.45, 0.05) == "tie"
    assert verdict(0.35, 0.05) == "bug"  # neither run errs by so much
    assert verdict(0.45, 0.06) == "bug"  # the logits that err may be wrong


def test_one_bug_makes_the_whole_run_a_bug() -> None:
    assert summarise(["exact", "tie", "exact"]) == "ties"
    assert summarise(["tie", "bug"]) == "bug"
    assert summarise(["exact"]) == "exact"


def test_reference_logits_are_those_that_each_token_is_drawn_from() -> None:
    target = tiny_target()
    logits = reference_logits(target.model, [5, 6, 7], [8, 9])
    alone = target.model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1]
    after = target.model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, -1]
    torch.testing.assert_close(logits, torch.stack([alone, after]))


def test_the_gap_is_that_of_the_two_tokens_after_the_common_beginning() -> None:
    model = tiny_target().model
    mismatch = find_mismatch(model, [5, 6], [7, 8, 9], [7, 10, 11])
    logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1]
    assert mismatch is not None and mismatch.position == 1 and mismatch.tokens == (8, 10)
    assert mismatch.gap == pytest.approx(abs(float(logits[8] - logits[10])), abs=1e-5)
    assert mismatch.size == pytest.approx(float(logits[[8, 10]].abs().max()), abs=1e-5)


def test_an_answer_that_ends_too_early_is_never_a_tie() -> None:
    mismatch = find_mismatch(tiny_target().model, [5], [7, 8], [7])
    assert mismatch is not None
    assert judge(mismatch, torch.bfloat16, noise=0.5).verdict == "bug"


def test_margin_noise_compares_the_same_two_tokens_in_both_precisions() -> None:
    working = torch.tensor([[3.0, 2.5, 0.0], [1.0, 0.0, 0.9]])
    exact = torch.tensor([[2.9, 2.6, 9.0], [1.0, 0.0, 0.95]])
    assert margin_noise(working, exact) == pytest.approx(0.2)


def test_distance_is_the_largest_root_mean_square_of_any_position_but_the_prefills() -> None:
    exact = torch.zeros(3, 4)
    working = torch.tensor([[9.0] * 4, [0.1] * 4, [0.2, -0.2, 0.2, -0.2]])
    assert logit_distance(working, exact) == pytest.approx(0.2)
    assert logit_distance(working[:1], exact[:1]) == 0.0


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_forward_in_pieces_is_the_model_and_differs_from_fp32_by_rounding_alone(architecture: str) -> None:
    prompt, ids = list(range(20, 40)), [(7 * place) % 250 + 3 for place in range(40)]
    exact = tiny_target(architecture).model
    half = copy.deepcopy(exact).bfloat16()
    assert float(forward_distances(exact, exact, prompt, ids).max()) < 1e-4
    reference = reference_model(half)
    whole = position_distances(reference_logits(half, prompt, ids), reference_logits(reference, prompt, ids))
    rounding = forward_distances(half, reference, prompt, ids)
    assert rounding.shape == (39,) and 0.8 * float(whole.mean()) < float(rounding.mean()) < 4 * float(whole.mean())
    one = forward_distances(half, reference, prompt, ids, [7])
    assert (one <= rounding).all() and not torch.equal(one, rounding)


def test_rounding_at_one_position_excuses_no_other() -> None:
    forward = torch.tensor([0.1, 1.5, 0.1])
    assert not Rounding.of(torch.tensor([0.3, 2.9, 0.5]), 0.27, forward).exceeded
    assert Rounding.of(torch.tensor([0.3, 3.1, 0.5]), 0.27, forward).exceeded
    found = Rounding.of(torch.tensor([0.6, 1.0, 0.5]), 0.27, forward)
    assert found.exceeded and found.distance == 1.5
    mismatch, bf16 = Mismatch(2, (1, 2), 0.3, 20.0), torch.bfloat16
    fine = Rounding(exceeded=False, distance=1.5)
    # the text's rounding is no excuse for a gap that the baseline's noise does not explain
    given = {"noise": 0.15, "own_noise": 0.9, "distance": 1.5, "baseline_distance": 0.27, "rounding": fine}
    assert judge(mismatch, bf16, **given).verdict == "bug"
    assert judge(mismatch, bf16, **{**given, "noise": 0.31}).verdict == "tie"
    assert judge(mismatch, bf16, **{**given, "noise": 0.31, "rounding": found}).verdict == "bug"


def test_the_reference_of_an_fp32_model_is_itself_and_of_another_an_upcast_copy() -> None:
    target = tiny_target()
    assert reference_model(target.model) is target.model
    half = copy.deepcopy(target.model).bfloat16()
    upcast = reference_model(half)
    assert upcast is not half
    assert {parameter.dtype for parameter in upcast.parameters()} == {torch.float32}
    assert next(half.parameters()).dtype == torch.bfloat16
