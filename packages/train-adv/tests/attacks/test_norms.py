"""Every point an attack may visit lies in the ball and in the box, and projections are the nearest points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expkit.errors import UsageError
from train_adv.attacks.norms import L1, L2, Linf, check_epsilon, check_images, make_norm, project_l1_box

ORDER = {"Linf": torch.inf, "L2": 2, "L1": 1}


def size(delta: torch.Tensor, name: str) -> torch.Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), ORDER[name], dim=1)


@pytest.mark.parametrize("name", ["Linf", "L2", "L1"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), epsilon=st.floats(0.01, 6), reach=st.floats(0.01, 5))
def test_projection_and_start_stay_in_ball_and_box(name, seed, epsilon, reach):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(3, 2, 4, 4, generator=generator)
    points = images + reach * torch.randn(images.shape, generator=generator)
    norm = make_norm(name)
    for found in (norm.project(points, images, epsilon), norm.start(images, epsilon, generator)):
        assert (size(found - images, name) <= epsilon * (1 + 1e-4) + 1e-5).all()
        assert found.min() >= 0 and found.max() <= 1 + 1e-6


@pytest.mark.parametrize("name", ["Linf", "L2", "L1"])
def test_points_inside_stay_where_they_are(name):
    images = torch.full((2, 1, 3, 3), 0.5)
    points = images + 0.001 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(make_norm(name).project(points, images, 1.0), points, atol=1e-7)


def test_the_l1_projection_is_the_nearest_point_of_ball_and_box():
    """Against bisection on the multiplier, in double precision."""
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(6, 20, generator=generator, dtype=torch.float64)
    delta = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    found = project_l1_box(delta, images, 2.0)
    room = torch.where(delta >= 0, 1 - images, images)
    for row in range(6):
        low, high = 0.0, float(delta[row].abs().max())
        for _ in range(100):
            middle = (low + high) / 2
            total = torch.minimum((delta[row].abs() - middle).clamp_min(0), room[row]).sum()
            low, high = (middle, high) if total > 2.0 else (low, middle)
        expected = delta[row].sign() * torch.minimum((delta[row].abs() - high).clamp_min(0), room[row])
        assert torch.allclose(found[row], expected, atol=1e-9)


def test_an_l2_start_is_uniform_in_the_ball():
    images = torch.full((4000, 1, 1, 2), 0.5)
    start = L2().start(images, 0.3, torch.Generator().manual_seed(0))
    inside = (size(start - images, "L2") < 0.15).float().mean()
    assert abs(float(inside) - 0.25) < 0.03  # half the radius of a disc holds a quarter of it


def test_steps_have_unit_size():
    gradient = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for norm in (Linf(), L2(), L1()):
        assert torch.allclose(size(norm.step(gradient), norm.name), torch.ones(4), atol=1e-4)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: check_epsilon(8, "Linf"), "8/255"),
        (lambda: check_epsilon(-0.1, "L2"), "0 or more"),
        (lambda: check_images(torch.full((1, 1, 2, 2), 1.5)), r"range from 1.5 to 1.5; expected \[0, 1\]"),
        (lambda: check_images(torch.zeros(1, dtype=torch.uint8)), "divide by 255"),
        (lambda: make_norm("L3"), "L3"),
    ],
)
def test_wrong_use_is_said(call, said):
    with pytest.raises(UsageError, match=said):
        call()
