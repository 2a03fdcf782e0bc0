"""Groupings hold every row once in equal slabs, are the same for the same seed, and find the groups that there are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coral_spec.grouping import EMPTY, Grouping, _give_out, balanced_kmeans, context_profiles, make_grouping
from coral_spec.training.data import Answers
from expkit.errors import UsageError

VOCAB, WIDTH = 101, 8


def head(seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return torch.randn(vocab, WIDTH, generator=torch.Generator().manual_seed(seed))


def ranked(vocab: int = VOCAB) -> Tensor:
    return torch.randperm(vocab, generator=torch.Generator().manual_seed(7))


def answers_of(rows: list[list[int]]) -> Answers:
    lengths = torch.tensor([len(row) for row in rows])
    return Answers(
        torch.tensor([token for row in rows for token in row], dtype=torch.int32),
        torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
        torch.ones(len(rows), dtype=torch.long),
        torch.zeros(len(rows), dtype=torch.bool),
        torch.arange(len(rows)),
    )


@given(
    vocab=st.integers(2, 60),
    groups=st.integers(2, 60),
    always=st.integers(0, 5),
    kind=st.sampled_from(["contiguous", "kmeans"]),
    seed=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_every_row_is_in_one_slab_and_padding_is_spread(vocab, groups, always, kind, seed) -> None:
    rows = -(-vocab // groups)
    if groups > vocab or always >= groups or always * rows + groups - always > vocab:
        with pytest.raises(UsageError):
            make_grouping(kind, groups, always, ranked(vocab), weight=head(seed, vocab), seed=seed)
        return
    found = make_grouping(kind, groups, always, ranked(vocab), weight=head(seed, vocab), seed=seed)
    assert found.slots.shape == (groups, rows) and found.vocab_size == vocab
    sizes = (found.slots != EMPTY).sum(1)
    assert (sizes[:always] == rows).all() and sizes.min() >= 1
    assert sizes[always:].max() - sizes[always:].min() <= 1
    for group in range(groups):
        members = found.slots[group][found.slots[group] != EMPTY]
        assert (found.group_of[members] == group).all()


def test_contiguous_groups_follow_the_ranking() -> None:
    found = make_grouping("contiguous", 10, 1, ranked(100))
    assert torch.equal(found.slots.flatten(), ranked(100))


def test_the_always_read_group_has_the_given_tokens_and_the_most_frequent() -> None:
    ranking = ranked(100)
    rare = int(ranking[-1])
    found = make_grouping("contiguous", 10, 1, ranking, first=(rare,))
    assert set(found.slots[0].tolist()) == {rare, *ranking[:9].tolist()}


def test_slabs_are_the_permuted_rows_and_padding_is_zero() -> None:
    weight = head()
    found = make_grouping("kmeans", 8, 1, ranked(), weight=weight)
    slabs = found.slabs(weight)
    for group, row in (found.slots != EMPTY).nonzero().tolist():
        assert torch.equal(slabs[group, row], weight[found.slots[group, row]])
    assert (slabs[found.slots == EMPTY] == 0).all() and (found.slots == EMPTY).sum() == 8 * 13 - VOCAB


def test_kmeans_finds_clusters_whatever_all_rows_share() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 5 * torch.randn(4, WIDTH, generator=generator)
    truth = torch.arange(80) % 4
    points = centres[truth] + 0.1 * torch.randn(80, WIDTH, generator=generator) + 100.0
    best = max(
        (balanced_kmeans(points, torch.full((4,), 20), seed=seed) for seed in range(4)),
        key=lambda labels: sum(labels[truth == each].bincount().max().item() for each in range(4)),
    )
    for each in range(4):
        assert len(best[truth == each].unique()) == 1


def test_kmeans_is_the_same_for_the_same_seed_and_needs_no_fp32_copy() -> None:
    points, sizes = head().bfloat16(), torch.tensor([30, 30, 41])
    first, again = (balanced_kmeans(points, sizes, seed=3) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(first.bincount(), sizes)
    assert not torch.equal(first, balanced_kmeans(points, sizes, seed=4))


@given(seed=st.integers(0, 200))
@settings(max_examples=40, deadline=None)
def test_a_place_is_given_to_those_who_would_lose_most(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(12, 2, generator=generator)
    labels = _give_out(scores, torch.tensor([5, 7]))
    assert labels.bincount().tolist() == [5, 7]
    wanted = (scores[:, 0] - scores[:, 1]).topk(5).indices  # for two clusters this is optimal
    assert set(labels.eq(0).nonzero().squeeze(1).tolist()) == set(wanted.tolist())


def test_tokens_that_follow_the_same_tokens_are_grouped() -> None:
    # 1..4 follow 0; 5..8 follow 9; all equally often
    rows = [[0, 0, token, 0, token] for token in (1, 2, 3, 4)] + [[9, 9, token, 9, token] for token in (5, 6, 7, 8)]
    made = answers_of(rows * 3)
    profiles = torch.nn.functional.normalize(context_profiles(made, 10, seed=0), dim=-1)
    alike = profiles @ profiles.T
    assert alike[1, 2:5].min() > alike[1, 5:9].max()
    found = make_grouping("cooccurrence", 2, 0, torch.tensor([1, 5, 2, 6, 3, 7, 4, 8, 0, 9]), answers=made)
    groups = [set(group.tolist()) - {0, 9} for group in found.slots]
    assert all(not (group & {1, 2, 3, 4} and group & {5, 6, 7, 8}) for group in groups)


def test_a_token_before_the_first_of_a_row_is_none_of_its_context() -> None:
    profiles = context_profiles(answers_of([[3, 1], [4, 2]]), 5, seed=0)
    apart = torch.stack([context_profiles(answers_of([row]), 5, seed=0) for row in ([3, 1], [4, 2])])
    assert torch.allclose(profiles, apart.sum(0))


def test_saved_groupings_load_and_damaged_or_foreign_ones_are_refused(tmp_path: Path) -> None:
    found = make_grouping("kmeans", 8, 1, ranked(), weight=head())
    found.save(tmp_path)
    again = Grouping.load(tmp_path, VOCAB)
    assert torch.equal(again.slots, found.slots)
    assert (again.always, again.kind, again.digest) == (1, "kmeans", found.digest)
    with pytest.raises(UsageError, match=r"vocabulary of 101, but the head has 102"):
        Grouping.load(tmp_path, 102)
    path = tmp_path / "grouping.safetensors"
    content = bytearray(path.read_bytes())
    content[-4:], content[-8:-4] = content[-8:-4], content[-4:]  # two tokens change places
    path.write_bytes(bytes(content))
    with pytest.raises(UsageError):
        Grouping.load(tmp_path, VOCAB)
    with pytest.raises(UsageError, match=r"does not exist|No such|missing"):
        Grouping.load(tmp_path / "none", VOCAB)
