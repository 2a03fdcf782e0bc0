"""Trees grown, reranked and followed by kernels, against the torch form."""

from __future__ import annotations

import pytest
import torch

from coral_spec.tree import Pool, Tree, TreeShape, accept

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def grow(shape: TreeShape, seed: int, by_kernel: bool) -> Pool:
    generator = torch.Generator().manual_seed(seed)
    pool = Pool(1, shape, DEVICE)

    def level(nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs = torch.rand(1, nodes, shape.width, generator=generator).log().to(DEVICE)
        tokens = torch.stack([torch.randperm(50, generator=generator)[: shape.width] for _ in range(nodes)])
        return log_probs, tokens[None].to(DEVICE)

    log_probs, tokens = level(1)
    frontier = pool.start(log_probs[:, 0], tokens[:, 0])
    for depth in range(1, shape.depth):
        last = depth == shape.depth - 1
        log_probs, tokens = level(shape.width)
        if by_kernel:
            first, pool.size = pool.size, pool.size + shape.width**2
            grown = pool._extend_by_kernel(frontier, log_probs, tokens, first, last)
        else:
            grown = Pool.extend(pool, frontier, log_probs, tokens, last=last)
        if grown:
            frontier = grown[0]
    return pool


@pytest.mark.parametrize("text", ["1,4,3", "2,2,3", "3,1,3", "4,3,10", "6,10,60"])
@pytest.mark.parametrize("seed", [0, 1])
def test_trees_are_the_same(text, seed, monkeypatch):
    from coral_spec.kernels import tree as kernel

    monkeypatch.setattr("coral_spec.kernels.serve", lambda states: False)
    shape = TreeShape.parse(text)
    theirs, ours = grow(shape, seed, False), grow(shape, seed, True)
    for name in ("tokens", "scores", "parents"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    root = torch.tensor([7], device=DEVICE)
    tree = theirs.rerank(root, shape.budget, shape.depth)
    found = kernel.rerank((ours.tokens, ours.scores, ours.parents), root, shape.budget, shape.depth)
    for ours_part, name in zip(found, ("tokens", "parents", "depths", "ancestors"), strict=True):
        assert torch.equal(ours_part, getattr(tree, name)), name
    draws = followed_draws(tree, seed)
    path, packed = kernel.accept(tree.tokens, tree.parents, tree.depths, tree.valid, draws, shape.depth)
    expected = accept(tree, draws, shape.depth)
    count = int(expected.count)
    assert int(packed[0, 0]) == count
    assert torch.equal(path[:, :count], expected.path[:, :count])
    assert torch.equal(packed[:, 1 : 1 + count], expected.emitted[:, :count])


def followed_draws(tree: Tree, seed: int) -> torch.Tensor:
    """Draws that agree with the tree now and then."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(0, 50, tree.tokens.shape, generator=generator)
    for slot in range(1, tree.tokens.shape[1]):
        if torch.rand(1, generator=generator) < 0.7:
            draws[0, tree.parents[0, slot]] = tree.tokens[0, slot]
    return draws.to(DEVICE)


def test_padding_is_never_followed():
    from coral_spec.kernels import tree as kernel

    tree = Tree.build(torch.tensor([[1, 2, 3]]), torch.tensor([[0, 0, 1]]), 2, torch.tensor([[True, False, True]]))
    parts = (
        part.to(DEVICE) for part in (tree.tokens, tree.parents, tree.depths, tree.valid, torch.tensor([[2, 3, 4]]))
    )
    assert int(kernel.accept(*parts, 2)[1][0, 0]) == 1


def test_a_path_is_moved_in_every_buffer_without_reading_what_it_wrote():
    from coral_spec.kernels.slots import move

    buffers = [torch.randn(1, 2, 40, 8, device=DEVICE) for _ in range(3)]
    before = [each.clone() for each in buffers]
    addresses = torch.tensor([each.data_ptr() for each in buffers], device=DEVICE)
    move(addresses, buffers[0], torch.tensor([10], device=DEVICE), torch.tensor([0, 2, 3, 7], device=DEVICE))
    for ours, old in zip(buffers, before, strict=True):
        old[:, :, [10, 11, 12, 13]] = old[:, :, [10, 12, 13, 17]]
        assert torch.equal(ours, old)
