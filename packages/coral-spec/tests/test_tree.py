"""Draft trees: connected, best first, and followed only where the target agrees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coral_spec.tree import Pool, Tree, TreeShape, accept
from expkit.errors import UsageError


def grow(seed: int, shape: TreeShape, batch: int = 2, flat: bool = False) -> tuple[Pool, torch.Tensor]:
    """A pool as the drafter makes it, with random (or all equal) log-probabilities."""
    generator = torch.Generator().manual_seed(seed)

    def level(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.zeros(batch, count, shape.width)
        if not flat:
            scores = torch.rand(batch, count, shape.width, generator=generator).log()
        tokens = torch.stack([torch.randperm(50, generator=generator)[: shape.width] for _ in range(batch * count)])
        return scores, tokens.view(batch, count, shape.width)

    pool = Pool(batch, shape, torch.device("cpu"))
    scores, tokens = level(1)
    frontier = pool.start(scores[:, 0], tokens[:, 0])
    for depth in range(1, shape.depth):
        grown = pool.extend(frontier, *level(shape.width), last=depth == shape.depth - 1)
        frontier = grown[0] if grown else frontier
    return pool, torch.full((batch,), 7)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), depth=st.integers(1, 5), width=st.integers(1, 5), flat=st.booleans(), data=st.data()
)
def test_kept_nodes_have_their_parents(seed, depth, width, flat, data):
    shape = TreeShape(depth, width, 1)
    budget = data.draw(st.integers(1, shape.pool))
    pool, root = grow(seed, shape, flat=flat)
    tree = pool.rerank(root, budget, depth)
    tokens, scores, parents = pool.tokens, pool.scores, pool.parents
    assert pool.size == shape.pool
    for row in range(2):
        kept = sorted(range(pool.size), key=lambda node: (-float(scores[row, node]), node))[:budget]
        assert all(int(parents[row, node]) == -1 or int(parents[row, node]) in kept for node in kept)
        slots = [-1, *sorted(kept)]
        assert tree.tokens[row].tolist() == [7, *(int(tokens[row, node]) for node in sorted(kept))]
        found = [slots[slot] for slot in tree.parents[row, 1:].tolist()]
        assert found == [int(parents[row, node]) for node in sorted(kept)]


def test_ancestors_and_depths_follow_the_parents():
    tree = Tree.build(torch.arange(5)[None], torch.tensor([[0, 0, 0, 1, 3]]), 3)
    assert tree.depths.tolist() == [[0, 1, 1, 2, 3]]
    assert [row.nonzero()[:, 0].tolist() for row in tree.ancestors[0]] == [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 3, 4]]


def naive_accept(tree: Tree, draws: torch.Tensor, row: int) -> list[int]:
    """Walk from the root while the draw is a child."""
    slot, emitted = 0, []
    while True:
        draw = int(draws[row, slot])
        emitted.append(draw)
        children = [
            child
            for child in range(1, tree.tokens.shape[1])
            if int(tree.parents[row, child]) == slot and int(tree.tokens[row, child]) == draw and tree.valid[row, child]
        ]
        if not children:
            return emitted
        slot = children[0]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), agree=st.floats(0, 1))
def test_acceptance_is_the_walk_from_the_root(seed, agree):
    pool, root = grow(seed, TreeShape(4, 3, 9))
    tree = pool.rerank(root, 9, 4)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(0, 50, tree.tokens.shape, generator=generator)
    for row in range(2):
        for slot in range(1, 10):
            if torch.rand(1, generator=generator) < agree:
                draws[row, tree.parents[row, slot]] = tree.tokens[row, slot]
    found = accept(tree, draws, 4)
    for row in range(2):
        assert found.emitted[row, : found.count[row]].tolist() == naive_accept(tree, draws, row)


def test_padding_is_never_followed():
    tokens, parents = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 0, 1]])
    tree = Tree.build(tokens, parents, 2, torch.tensor([[True, False, True]]))
    assert int(accept(tree, torch.tensor([[2, 3, 4]]), 2).count) == 1


@pytest.mark.parametrize("text", ["", "4", "4,3", "a,b,c", "0,1,1", "2,2,99"])
def test_an_impossible_shape_is_refused(text):
    with pytest.raises(UsageError):
        TreeShape.parse(text)


def test_a_shape_is_written_as_it_is_read():
    assert TreeShape.parse(str(TreeShape(5, 4, 20))) == TreeShape(5, 4, 20)
