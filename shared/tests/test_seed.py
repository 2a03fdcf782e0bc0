from __future__ import annotations

import io
import random

import numpy
import pytest
import torch

from expkit.errors import UsageError
from expkit.seed import capture_rng, restore_rng, seed_everything


def draw() -> tuple[float, float, float]:
    # Two normal numbers from numpy come as a pair, so one draw leaves half a pair in its state.
    return random.random(), float(numpy.random.standard_normal()), float(torch.rand(()))


def test_the_same_seed_gives_the_same_draws() -> None:
    seed_everything(3)
    first = draw()
    seed_everything(3)
    assert draw() == first
    seed_everything(4)
    assert draw() != first


def test_a_restored_state_continues_every_generator_where_it_was() -> None:
    seed_everything(0)
    draw()
    state = capture_rng()
    expected = [draw() for _ in range(3)]
    restore_rng(state)
    assert [draw() for _ in range(3)] == expected


def test_the_state_survives_a_file_read_with_weights_only() -> None:
    state = capture_rng()
    expected = draw()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    restore_rng(torch.load(file, weights_only=True))
    assert draw() == expected


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_wrong_use(seed: int) -> None:
    with pytest.raises(UsageError, match=str(seed)):
        seed_everything(seed)


@pytest.mark.gpu
def test_the_gpus_generator_is_seeded_and_restored() -> None:
    seed_everything(0)
    state = capture_rng()
    expected = torch.rand(3, device="cuda").tolist()
    restore_rng(state)
    assert torch.rand(3, device="cuda").tolist() == expected
