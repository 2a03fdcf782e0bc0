"""Draws: keyed to seed and position, distributed as the warped logits say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from coral_spec.sampling import SHORTLIST, Sampling, gumbel_noise
from coral_spec.tree import Tree, accept
from expkit.errors import UsageError


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    temperature=st.floats(0.3, 2.0),
    top_k=st.sampled_from([0, 1, 5, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
)
def test_warping_is_transformers_own(seed, temperature, top_k, top_p):
    logits = 3 * torch.randn(4, 100, generator=torch.Generator().manual_seed(seed))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    wanted = warpers(torch.zeros(4, 1, dtype=torch.long), logits).softmax(-1)
    torch.testing.assert_close(Sampling(temperature, top_k, top_p).warp(logits).softmax(-1), wanted)


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])  # 0.1: more tokens than the shortlist has
def test_a_nucleus_of_a_large_vocabulary_is_transformers_own(spread):
    logits = spread * torch.randn(2, 3, 3 * SHORTLIST, generator=torch.Generator().manual_seed(0))
    found = Sampling(1.0, 0, 0.9).warp(logits)
    wanted = TopPLogitsWarper(0.9)(torch.zeros(6, 1, dtype=torch.long), logits.flatten(0, 1)).view_as(logits)
    assert torch.equal(found.isfinite(), wanted.isfinite())
    torch.testing.assert_close(found.softmax(-1), wanted.softmax(-1))


def test_noise_is_a_function_of_seed_position_and_token():
    seeds = torch.tensor([3, 3, 4])
    noise = gumbel_noise(seeds, torch.tensor([[10, 11], [11, 12], [10, 11]]), 1000)
    assert torch.equal(noise[0, 1], noise[1, 0])
    assert not torch.equal(noise[0, 0], noise[0, 1])
    assert not torch.equal(noise[0, 0], noise[2, 0])
    assert torch.equal(gumbel_noise(seeds[:1], torch.tensor([[10]]), 500)[0, 0], noise[0, 0, :500])


def test_noise_is_gumbel():
    noise = gumbel_noise(torch.arange(50), torch.arange(20).expand(50, -1), 500).flatten()
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.var()) - torch.pi**2 / 6) < 0.02
    assert noise.isfinite().all()


def test_neighbouring_seeds_and_positions_are_independent():
    noise = gumbel_noise(torch.arange(200), torch.arange(200).expand(200, -1), 8)
    for moved in (noise.roll(1, 0), noise.roll(1, 1), noise.roll(1, 2), noise.roll((1, 1), (0, 1))):
        correlation = torch.corrcoef(torch.stack([noise.flatten(), moved.flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.01


def test_draws_follow_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    count = 20_000
    sampling = Sampling(temperature=0.8)
    seeds, zeros = torch.arange(count), torch.zeros(count, 1, dtype=torch.long)
    draws = sampling.draw(logits.expand(count, 1, -1), zeros + 5, zeros, seeds)[:, 0]
    observed = torch.bincount(draws, minlength=5)[:4].double()
    expected = sampling.warp(logits).softmax(-1)[:4].double() * count
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert float(torch.special.gammaincc(torch.tensor(1.5).double(), statistic / 2)) > 1e-3


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), sampling=st.sampled_from([Sampling(1.0), Sampling(0.8, 3), Sampling(1.0, 0, 0.7)]))
def test_draws_along_the_path_accept_what_draws_everywhere_accept(seed, sampling):
    generator = torch.Generator().manual_seed(seed)
    batch, depth, vocab = 5, 3, 8
    parents = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 5]]).expand(batch, -1)
    # Siblings differ; with 8 tokens a draw is often among them, also the one at the root that equals the root.
    tokens = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(batch)])
    tree = Tree.build(tokens, parents, depth)
    valid = torch.rand(parents.shape, generator=generator) < 0.8
    valid[:, 0] = True
    tree = replace(tree, valid=valid)
    logits = torch.randn(batch, parents.shape[1], vocab, generator=generator).bfloat16()
    places, seeds = torch.arange(4) + 10 * torch.arange(batch)[:, None], torch.arange(batch) + seed
    everywhere = accept(tree, sampling.draw(logits, places, tree.depths, seeds), depth)
    found = accept(tree, sampling.draw_path(logits, places, tree, seeds), depth)
    assert torch.equal(found.count, everywhere.count)
    for row, count in enumerate(found.count.tolist()):
        assert torch.equal(found.emitted[row, :count], everywhere.emitted[row, :count])
        assert torch.equal(found.path[row, :count], everywhere.path[row, :count])


def test_greedy_is_the_arg_max():
    logits = torch.randn(2, 3, 50)
    zeros = torch.zeros(2, 3, dtype=torch.long)
    assert torch.equal(Sampling().draw(logits, zeros[:, :1], zeros, zeros[:, 0]), logits.argmax(-1))


@pytest.mark.parametrize(
    "fields", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(UsageError):
        Sampling(**fields)
