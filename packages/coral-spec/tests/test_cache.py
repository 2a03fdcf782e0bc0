"""The static cache: layers of the same sizes share one tensor, and behave as those that do not."""

from __future__ import annotations

import torch

from coral_spec.cache import StaticCache

LAYERS, HEADS, SIZE = 3, 2, 4


def filled(joint: bool) -> StaticCache:
    """A cache of 16 slots with random states; the same ones for both."""
    cache = StaticCache(16)
    like = torch.zeros(1, 1)
    if joint:
        cache.allocate(LAYERS, HEADS, SIZE, like)
    generator = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        store = cache.store(layer)
        store.allocate(HEADS, SIZE, like)
        for states in (store.keys, store.values):
            states.copy_(torch.randn(states.shape, generator=generator))
    return cache


def states_of(cache: StaticCache) -> torch.Tensor:
    return torch.stack([torch.stack([store.keys, store.values]) for store in cache.stores.values()])


def test_a_path_is_committed_alike():
    joint, single = filled(True), filled(False)
    for cache in (joint, single):
        cache.commit(torch.tensor([5]), torch.tensor([[0, 2, 7]]))
    assert torch.equal(states_of(joint), states_of(single))
    assert torch.equal(states_of(joint)[:, :, :, :, 6], states_of(filled(True))[:, :, :, :, 7])


def test_a_cache_grows_and_repeats_alike():
    joint, single = filled(True), filled(False)
    for batch, capacity in ((1, 24), (1, 20), (3, 20)):
        for cache in (joint, single):
            cache.resize(batch, capacity, 9)
        assert torch.equal(states_of(joint), states_of(single))
        assert joint.nbytes() == single.nbytes() and joint.capacity == capacity
        for cache in (joint, single):
            cache.commit(torch.full((batch,), 4), torch.tensor([[0, 3]]).expand(batch, -1))
        assert torch.equal(states_of(joint), states_of(single))
