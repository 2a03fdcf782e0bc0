"""Losses against naive references: loops over images, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pden.losses import (
    adversarial_contrast,
    barlow_twins,
    cycle_loss,
    diversity,
    diversity_loss,
    instance_contrast,
    safety_loss,
    supervised_contrast,
)

SEEDS = st.integers(0, 10_000)
FEW = settings(max_examples=20, deadline=None)


def embeddings(seed: int, views: int, batch: int, size: int = 5) -> torch.Tensor:
    return F.normalize(torch.randn(views, batch, size, generator=torch.Generator().manual_seed(seed)), dim=2)


def naive_contrast(views: list[list[list[float]]], labels: list[int], temperature: float) -> float:
    """Khosla's L_out with loops."""
    flat = [(vector, label) for view in views for vector, label in zip(view, labels, strict=True)]
    total, counted = 0.0, 0
    for i, (anchor, label) in enumerate(flat):
        score = {
            j: math.exp(sum(a * b for a, b in zip(anchor, other, strict=True)) / temperature)
            for j, (other, _) in enumerate(flat)
            if j != i
        }
        positives = [j for j in score if flat[j][1] == label]
        if positives:
            total += -sum(math.log(score[j] / sum(score.values())) for j in positives) / len(positives)
            counted += 1
    return total / max(1, counted)


@FEW
@given(SEEDS, st.integers(1, 4), st.integers(2, 6))
def test_supervised_contrast_is_the_naive_one(seed, views, batch):
    vectors = embeddings(seed, views, batch)
    labels = torch.randint(0, 3, (batch,), generator=torch.Generator().manual_seed(seed))
    expected = naive_contrast(vectors.tolist(), labels.tolist(), 0.2)
    assert float(supervised_contrast(vectors, labels, 0.2)) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@FEW
@given(SEEDS, st.integers(2, 4), st.integers(2, 6))
def test_instance_contrast_takes_views_of_one_image_as_positives(seed, views, batch):
    vectors = embeddings(seed, views, batch)
    expected = naive_contrast(vectors.tolist(), list(range(batch)), 0.2)
    assert float(instance_contrast(vectors, 0.2)) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@FEW
@given(SEEDS)
def test_contrast_does_not_depend_on_the_order_of_images_or_views(seed):
    vectors, labels = embeddings(seed, 3, 6), torch.tensor([0, 1, 0, 2, 1, 0])
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    whole = supervised_contrast(vectors, labels)
    assert torch.allclose(whole, supervised_contrast(vectors[:, order], labels[order]), atol=1e-4)
    assert torch.allclose(whole, supervised_contrast(vectors.flip(0), labels), atol=1e-4)


def test_supervised_contrast_without_positives_is_zero_and_has_a_gradient():
    vectors = embeddings(0, 1, 3).requires_grad_()
    loss = supervised_contrast(vectors, torch.arange(3))
    loss.backward()
    assert loss == 0 and torch.isfinite(vectors.grad).all()


@FEW
@given(SEEDS, st.integers(2, 6))
def test_adversarial_contrast_is_minus_log_of_one_minus_p(seed, batch):
    made, source = embeddings(seed, 2, batch).double()
    total = 0.0
    for i in range(batch):
        scores = [math.exp(float(made[i] @ source[j]) / 0.5) for j in range(batch)]
        total += -math.log(1 - scores[i] / sum(scores))
    assert float(adversarial_contrast(made, source, 0.5)) == pytest.approx(total / batch, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adversarial_contrast_stays_finite_where_p_is_one(dtype):
    source = torch.eye(4, dtype=dtype)
    made = source.clone().requires_grad_()
    loss = adversarial_contrast(made, source, 0.001)  # p rounds to 1: log(1 - p) would be minus infinity
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(made.grad).all()
    assert loss > 900


def test_adversarial_contrast_pushes_an_image_from_its_own_source():
    source = embeddings(1, 1, 5)[0]
    made = source.clone().requires_grad_()
    adversarial_contrast(made, source).backward()
    moved = F.normalize(made.detach() - 0.01 * made.grad, dim=1)
    assert ((moved * source).sum(1) < 1 - 1e-6).all()


def test_adversarial_contrast_needs_something_else_to_be_taken_for():
    with pytest.raises(ValueError, match="two images"):
        adversarial_contrast(torch.ones(1, 3), torch.ones(1, 3))


@FEW
@given(SEEDS, st.integers(2, 3))
def test_barlow_twins_is_the_naive_one(seed, views):
    vectors = torch.randn(views, 8, 4, generator=torch.Generator().manual_seed(seed)).double()
    total = 0.0
    for view in range(1, views):
        for i in range(4):
            for j in range(4):
                a, b = vectors[0, :, i], vectors[view, :, j]
                spread = ((a.var(unbiased=False) + 1e-5) * (b.var(unbiased=False) + 1e-5)).sqrt()
                correlation = float(((a - a.mean()) * (b - b.mean())).mean() / spread)
                total += (1 - correlation) ** 2 if i == j else 0.005 * correlation**2
    assert float(barlow_twins(vectors)) == pytest.approx(total / (views - 1), rel=1e-4)


def test_barlow_twins_survives_a_feature_that_does_not_vary():
    vectors = torch.ones(2, 4, 3, requires_grad=True)
    loss = barlow_twins(vectors)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(vectors.grad).all()


def test_barlow_twins_needs_two_views():
    with pytest.raises(ValueError, match="two views"):
        barlow_twins(torch.ones(1, 4, 3))


@FEW
@given(SEEDS, st.floats(0, 1))
def test_diversity_loss_is_clamped_and_has_no_gradient_beyond_the_limit(seed, limit):
    first, second = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(seed))
    first.requires_grad_()
    expected = min(
        sum(abs(a - b) for a, b in zip(first.flatten().tolist(), second.flatten().tolist(), strict=True)) / 12, limit
    )
    loss = diversity_loss(diversity(first, second), limit)
    assert float(loss.detach()) == pytest.approx(-expected, abs=1e-5)
    loss.backward()
    if float(diversity(first, second).detach()) > limit:
        assert first.grad.abs().sum() == 0


def test_cycle_loss_is_the_mean_square():
    first, second = torch.rand(2, 2, 3)
    expected = sum((a - b) ** 2 for a, b in zip(first.flatten().tolist(), second.flatten().tolist(), strict=True)) / 6
    assert float(cycle_loss(first, second)) == pytest.approx(expected, rel=1e-5)


def test_images_of_class_255_count():
    logits, labels = torch.randn(4, 300), torch.tensor([255, 255, 3, 299])
    expected = -logits.log_softmax(1)[torch.arange(4), labels].mean()
    assert torch.allclose(safety_loss(logits, labels), expected)


def test_safety_loss_leaves_uncounted_pixels_out():
    logits = torch.randn(1, 2, 1, 3)
    labels = torch.tensor([[[0, 1, 255]]])
    expected = -(logits.log_softmax(1)[0, 0, 0, 0] + logits.log_softmax(1)[0, 1, 0, 1]) / 2
    assert torch.allclose(safety_loss(logits, labels), expected)
