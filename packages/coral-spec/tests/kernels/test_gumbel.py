"""Sampled draws by the kernel are those of torch."""

from __future__ import annotations

import pytest
import torch

from coral_spec import kernels
from coral_spec.sampling import Sampling, gumbel_noise

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def of_torch(logits, depths, positions, seed, temperature):
    noise = gumbel_noise(seed, positions[None], logits.shape[1])[0]
    return (Sampling(temperature).warp(logits) + noise[depths]).argmax(dim=-1)


@pytest.mark.parametrize(("rows", "vocab"), [(1, 259), (1, 5000), (7, 1024), (5, 3001)])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 40.0])
def test_draws_are_those_of_torch(rows, vocab, temperature):
    from coral_spec.kernels.gumbel import draw

    generator = torch.Generator().manual_seed(rows * vocab)
    logits = (torch.randn(rows, vocab, generator=generator) * 4).to(DEVICE, torch.bfloat16)
    depths = torch.randint(0, 3, (rows,), generator=generator).to(DEVICE)
    positions = torch.tensor([11, 12, 13], device=DEVICE)
    for seed in range(12):
        seeds = torch.tensor([seed * 1_000_003], device=DEVICE)
        found = draw(logits, depths, positions, seeds, temperature)
        assert torch.equal(found, of_torch(logits, depths, positions, seeds, temperature))


def test_tokens_that_were_dropped_are_never_drawn():
    from coral_spec.kernels.gumbel import draw

    logits = torch.full((1, 2500), float("-inf"), device=DEVICE)
    logits[0, [7, 2400]] = torch.tensor([0.0, 1.0], device=DEVICE)
    depths, positions = torch.zeros(1, dtype=torch.long, device=DEVICE), torch.tensor([3], device=DEVICE)
    found = {int(draw(logits, depths, positions, torch.tensor([seed], device=DEVICE), 1.0)) for seed in range(40)}
    assert found == {7, 2400}


@pytest.mark.parametrize("temperature", [1e-30, 3e38])
def test_no_temperature_overflows(temperature):
    from coral_spec.kernels.gumbel import draw

    logits = torch.linspace(-60, 60, 2000, device=DEVICE)[None].contiguous()
    depths, positions = torch.zeros(1, dtype=torch.long, device=DEVICE), torch.tensor([3], device=DEVICE)
    found = {
        int(draw(logits, depths, positions, torch.tensor([seed], device=DEVICE), temperature)) for seed in range(8)
    }
    assert found == {1999} if temperature < 1 else len(found) == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU all tests run on kernels")
@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(1.3, top_k=5), Sampling(1.0, top_p=0.6)])
def test_sampling_draws_by_the_kernel_what_it_draws_without(sampling, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 6, 700, generator=generator) * 3
    places, depths = torch.tensor([[40, 41, 42]]), torch.tensor([[0, 1, 1, 2, 2, 2]])
    expected = [sampling.draw(logits, places, depths, torch.tensor([seed])) for seed in range(10)]
    monkeypatch.setattr(kernels, "serve", lambda states: True)
    for seed, wanted in enumerate(expected):
        assert torch.equal(sampling.draw(logits, places, depths, torch.tensor([seed])), wanted)
