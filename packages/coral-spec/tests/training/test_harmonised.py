"""Harmonised steps compute, for all indices at once, what a drafter computes node by node while drafting."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coral_spec.drafter import Drafter
from coral_spec.training.harmonised import draft_step, harmonised_mask, shift
from coral_spec.training.initialise import new_drafter
from tiny import tiny_target

WIDTH, LENGTH, STEPS = 32, 11, 4


class GrowingStore:
    """A key-value cache for one chain, as plain as can be."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.key = key if self.key is None else torch.cat([self.key, key], dim=2)
        self.value = value if self.value is None else torch.cat([self.value, value], dim=2)
        return self.key, self.value


@pytest.fixture(scope="module")
def drafter() -> Drafter:
    drafter = new_drafter(tiny_target(width=WIDTH), "random", 0)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)  # attention far from uniform
    return drafter


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, LENGTH, WIDTH, generator=generator) for _ in range(2))  # type: ignore[return-value]


def harmonised(drafter: Drafter, embeddings: Tensor, features: Tensor, steps: int) -> list[Tensor]:
    """Predictions of every step."""
    fed, out = [features], []
    for step in range(1, steps + 1):
        mask = harmonised_mask(LENGTH, step, torch.float32, features.device)
        out.append(draft_step(drafter, embeddings, fed, mask))
        fed.append(shift(out[-1], features))
    return out


def drafted_chain(drafter: Drafter, embeddings: Tensor, features: Tensor, start: int, steps: int) -> list[Tensor]:
    """Draft node by node with a cache: prefix from target features, then one node after another."""
    store, index = GrowingStore(), torch.arange(LENGTH).expand(2, -1)
    prefix = slice(0, start + 1)
    causal = torch.full((start + 1, start + 1), -torch.inf).triu(1)[None, None]
    feature = drafter(embeddings[:, prefix], features[:, prefix], index[:, prefix], causal, store)[:, -1:]
    chain = [feature]
    for node in range(start + 1, start + steps):
        at = slice(node, node + 1)
        seen = torch.zeros(1, 1, 1, node + 1)
        feature = drafter(embeddings[:, at], feature, index[:, at], seen, store)
        chain.append(feature)
    return chain


@torch.no_grad()
def test_steps_equal_drafting_node_by_node(drafter: Drafter) -> None:
    embeddings, features = inputs()
    steps = harmonised(drafter, embeddings, features, STEPS)
    for start in range(LENGTH - STEPS + 1):
        chain = drafted_chain(drafter, embeddings, features, start, STEPS)
        for step in range(STEPS):
            assert torch.allclose(steps[step][:, start + step], chain[step][:, 0], atol=1e-5), (start, step)


@given(length=st.integers(1, 9), step=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_mask_shows_the_prefix_and_one_diagonal_key_per_drafted_step(length: int, step: int) -> None:
    mask = harmonised_mask(length, step, torch.float32, torch.device("cpu"))[0, 0]
    assert set(mask.unique().tolist()) <= {0.0, -math.inf}
    visible = (mask == 0).view(length, step, length)
    for i in range(length):
        assert visible[i, 0].nonzero().flatten().tolist() == list(range(max(0, i - (step - 1) + 1)))
        for s in range(2, step + 1):
            there = i - (step - s)
            assert visible[i, s - 1].nonzero().flatten().tolist() == ([there] if there >= 0 else [])
        assert visible[i].any()


@torch.no_grad()
def test_a_masked_key_has_no_effect(drafter: Drafter) -> None:
    embeddings, features = inputs()
    step = 3
    fed = [features]
    for earlier in range(1, step):
        mask = harmonised_mask(LENGTH, earlier, torch.float32, features.device)
        fed.append(shift(draft_step(drafter, embeddings, fed, mask), features))
    mask = harmonised_mask(LENGTH, step, torch.float32, features.device)
    before = draft_step(drafter, embeddings, fed, mask)
    for block, entry in ((0, 5), (0, 6), (1, 5), (2, 5)):
        changed = [each.clone() for each in fed]
        changed[block][:, entry] += 100.0
        after = draft_step(drafter, embeddings, changed, mask)
        blind = mask[0, 0, :, block * LENGTH + entry] == -torch.inf
        moved = (after - before).abs().amax(dim=(0, 2)) > 0
        if block == step - 1:  # the step's own inputs are also the queries and the residual stream
            assert moved.nonzero().flatten().tolist() == [entry]
        else:
            assert torch.equal(moved, ~blind), (block, entry)


@torch.no_grad()
def test_one_mask_equals_causal_part_and_diagonals_merged_by_log_sum_exp(drafter: Drafter) -> None:
    embeddings, features = inputs(1)
    fed, step = [features, *(torch.randn_like(features) for _ in range(2))], 3
    attention = drafter.layer.self_attn
    positions = torch.arange(LENGTH).expand(2, -1)
    states = [drafter.fuse(embeddings, each) for each in fed]
    projected = [attention.project(each, positions) for each in states]
    query = projected[-1][0] / math.sqrt(attention.head_dim)
    keys = [attention.repeat(key) for _, key, _ in projected]
    values = [attention.repeat(value) for _, _, value in projected]
    scores = query @ keys[0].transpose(2, 3)
    hidden = torch.arange(LENGTH)[None, :] > torch.arange(LENGTH)[:, None] - (step - 1)
    scores = scores.masked_fill(hidden, -torch.inf)
    total, parts = [torch.logsumexp(scores, -1)], [torch.softmax(scores, -1).nan_to_num() @ values[0]]
    for s in range(2, step + 1):
        back = step - s
        rolled = [torch.roll(each[s - 1], back, dims=2) for each in (keys, values)]
        logit = (query * rolled[0]).sum(-1)
        logit[..., :back] = -torch.inf
        total.append(logit)
        parts.append(rolled[1])
    share = torch.softmax(torch.stack(total), dim=0)[..., None]
    merged = drafter.layer.finish(states[-1], (share * torch.stack(parts)).sum(0))
    mask = harmonised_mask(LENGTH, step, torch.float32, features.device)
    assert torch.allclose(draft_step(drafter, embeddings, fed, mask), merged, atol=1e-5)


def test_inputs_move_right_keep_the_first_and_carry_no_gradient() -> None:
    predicted = torch.randn(1, 4, 2, requires_grad=True)
    first = torch.randn(1, 4, 2)
    moved = shift(predicted, first)
    assert torch.equal(moved[:, 0], first[:, 0])
    assert torch.equal(moved[:, 1:], predicted[:, :-1])
    assert not moved.requires_grad


def test_later_steps_teach_the_projections_through_earlier_keys(drafter: Drafter) -> None:
    embeddings, features = inputs()
    fed = [features, torch.randn_like(features)]
    mask = harmonised_mask(LENGTH, 2, torch.float32, features.device)
    drafter.zero_grad()
    draft_step(drafter, embeddings, fed, mask).sum().backward()
    whole = drafter.layer.self_attn.k_proj.weight.grad
    assert whole is not None and whole.abs().sum() > 0
    drafter.zero_grad()
