"""Cross-step alignment equals the plain InfoNCE, in value and gradient, and is blind to what it should be blind to."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from coral_spec.training import csra
from coral_spec.training.csra import CsraConfig, csra_loss

POSITIONS, WIDTH = 14, 6
ROWS = torch.tensor([0] * 5 + [1] + [4] * 8)
CONFIG = CsraConfig(weight=1.0, temperature=0.3, pool="batch", negatives=100, chunk=4)


def tensors(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    predicted, anchors = (torch.randn(POSITIONS, WIDTH, generator=generator) for _ in range(2))
    return predicted.requires_grad_(), anchors.requires_grad_()


def naive(predicted: Tensor, anchors: Tensor, temperature: float, pool: str) -> Tensor:
    """One position after another, as the formula is written."""
    total = predicted.new_zeros(())
    for i in range(len(predicted)):
        alike = functional.cosine_similarity(predicted[i][None], anchors, dim=-1) / temperature
        members = [k for k in range(len(predicted)) if pool == "batch" or ROWS[k] == ROWS[i]]
        total = total - torch.log(alike[i].exp() / alike[members].exp().sum())
    return total


@pytest.mark.parametrize("pool", ["batch", "sequence"])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_value_and_gradients_equal_the_plain_formula(pool: str, chunk: int) -> None:
    predicted, anchors = tensors()
    config = replace(CONFIG, pool=pool, chunk=chunk)
    wanted = torch.autograd.grad(0.5 * naive(predicted, anchors, 0.3, pool), (predicted, anchors))
    loss, cosine = csra_loss(predicted, anchors, ROWS, config, scale=0.5)
    found = torch.autograd.grad(loss, (predicted, anchors))
    assert torch.allclose(loss, 0.5 * naive(predicted, anchors, 0.3, pool), rtol=1e-5)
    assert torch.allclose(cosine, 0.5 * functional.cosine_similarity(predicted, anchors).sum(), atol=1e-5)
    for mine, plain in zip(found, wanted, strict=True):
        assert torch.allclose(mine, plain, atol=1e-5)


def test_the_hand_written_gradient_is_that_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    predicted, anchors = (each.detach().double().requires_grad_() for each in tensors())
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # the same arithmetic in a precision that can be differenced
    assert torch.autograd.gradcheck(lambda *both: csra_loss(*both, ROWS, CONFIG)[0], (predicted, anchors))


def test_a_constant_anchor_gets_no_gradient() -> None:
    predicted, anchors = tensors()
    loss, _ = csra_loss(predicted, anchors.detach(), ROWS, CONFIG)
    loss.backward()  # type: ignore[no-untyped-call]
    assert predicted.grad is not None and anchors.grad is None


@given(
    scales=st.lists(st.floats(0.01, 100), min_size=2 * POSITIONS, max_size=2 * POSITIONS),
    seed=st.integers(0, 100),
    pool=st.sampled_from(["batch", "sequence"]),
)
@settings(max_examples=25, deadline=None)
def test_lengths_of_features_do_not_matter(scales: list[float], seed: int, pool: str) -> None:
    predicted, anchors = (each.detach() for each in tensors(seed))
    factors = torch.tensor(scales)[:, None]
    config = replace(CONFIG, pool=pool)
    before, _ = csra_loss(predicted, anchors, ROWS, config)
    after, _ = csra_loss(predicted * factors[:POSITIONS], anchors * factors[POSITIONS:], ROWS, config)
    assert torch.allclose(before, after, rtol=1e-4)


@given(seed=st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_a_rotation_of_all_features_does_not_matter(seed: int) -> None:
    predicted, anchors = (each.detach() for each in tensors(seed))
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))).Q
    before, _ = csra_loss(predicted, anchors, ROWS, CONFIG)
    assert torch.allclose(before, csra_loss(predicted @ turn, anchors @ turn, ROWS, CONFIG)[0], rtol=1e-4)


@given(order=st.permutations(range(POSITIONS)))
@settings(max_examples=25, deadline=None)
def test_the_order_of_positions_does_not_matter(order: list[int]) -> None:
    predicted, anchors = (each.detach() for each in tensors())
    before, _ = csra_loss(predicted, anchors, ROWS, CONFIG)
    assert torch.allclose(before, csra_loss(predicted[order], anchors[order], ROWS, CONFIG)[0], rtol=1e-5)


def test_sequences_are_pools_of_their_own() -> None:
    predicted, anchors = (each.detach() for each in tensors())
    config = replace(CONFIG, pool="sequence")
    whole, _ = csra_loss(predicted, anchors, ROWS, config)
    parts = [csra_loss(predicted[ROWS == row], anchors[ROWS == row], ROWS[ROWS == row], config)[0] for row in (0, 1, 4)]
    assert torch.allclose(whole, sum(parts), rtol=1e-5)
    assert parts[1] == 0  # alone: nothing to be told apart from


def test_the_cap_leaves_that_many_negatives_and_the_positive() -> None:
    same = torch.ones(POSITIONS, WIDTH)
    capped = replace(CONFIG, negatives=3)
    loss, _ = csra_loss(same, same, ROWS, capped)
    # all similarities are equal: a query is one of 3 negatives itself, or is not among them
    assert float(loss) == pytest.approx(3 * math.log(3) + (POSITIONS - 3) * math.log(4), rel=1e-5)
    predicted, anchors = (each.detach() for each in tensors())
    losses = {float(csra_loss(predicted, anchors, ROWS, capped, seed=seed)[0]) for seed in (0, 0, 1)}
    assert len(losses) == 2


def test_similarities_exist_for_a_chunk_of_queries_only(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    original = torch.logaddexp
    monkeypatch.setattr(csra.torch, "logaddexp", lambda a, b: (sizes.append(tuple(a.shape)), original(a, b))[1])
    predicted, anchors = tensors()
    csra_loss(predicted, anchors, ROWS, CONFIG)
    assert sizes == [(4,), (4,), (4,), (2,)]


@pytest.mark.parametrize(
    ("anchor", "expected"),
    [("first", [None, 1, 1]), ("previous", [None, 1, 2]), ("target", [0, 0, 0])],
)
def test_anchors_by_step(anchor: str, expected: list[int | None]) -> None:
    config = replace(CONFIG, anchor=anchor)
    assert [config.anchor_of(step) for step in (1, 2, 3)] == expected
    assert replace(config, weight=0.0).anchor_of(3) is None
    assert config.still_needed(2, 3) == {expected[2]}


@pytest.mark.parametrize(
    "wrong", [{"weight": -1.0}, {"temperature": 0.0}, {"negatives": 0}, {"anchor": "target", "stop_gradient": False}]
)
def test_settings_that_cannot_be_meant_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"csra\.{list(wrong)[-1]}"):
        CsraConfig(**wrong)  # type: ignore[arg-type]
