"""The grouped head's kernel against plain torch, in Triton's interpreter on a CPU, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from coral_spec.kernels.grouped import Tiles, choose_tiles, grouped_top

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(nodes: int, groups: int, rows: int, width: int, empty: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(nodes + groups + rows)
    features = torch.randn(nodes, width, generator=generator)
    slabs = torch.randn(groups, rows, width, generator=generator)
    ids = torch.randperm(groups * rows, generator=generator).view(groups, rows)
    ids.view(-1)[torch.randperm(groups * rows, generator=generator)[:empty]] = -1
    log_mass = torch.randn(nodes, groups, generator=generator).log_softmax(-1)
    return features.to(DEVICE, dtype), slabs.to(DEVICE, dtype), ids.to(DEVICE), log_mass.to(DEVICE)


def expected(features, slabs, ids, active, count, log_mass):
    """All log-probabilities of the active slabs' tokens, the slow way."""
    logits = torch.einsum("nw,krw->nkr", features.double(), slabs[active].double())
    logits = logits.masked_fill(ids[active] < 0, float("-inf"))
    if log_mass is None:
        log_probs = logits.flatten(1).log_softmax(-1)
    else:
        log_probs = (logits.log_softmax(-1) + log_mass.double()[:, :, None]).flatten(1)
    best = log_probs.topk(count, dim=-1)
    return best.values.float(), ids[active].flatten()[best.indices]


def assert_same(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1], wanted[1])


CASES = [
    (1, 4, 70, 24, [2], 3, 0),  # one group
    (3, 4, 70, 24, [0, 1, 2, 3], 10, 9),  # all groups
    (10, 6, 130, 40, [1, 4], 10, 100),  # odd sizes, many empty places
    (17, 3, 64, 16, [0, 2], 1, 0),
    (5, 40, 65, 16, list(range(0, 40, 2)), 16, 30),  # many groups, the most rounds
    (2, 5, 90, 16, [4, 0, 2], 33, 20),  # sorted
    (2, 3, 100, 16, [1, 2], 64, 9),
]


@pytest.mark.parametrize(("nodes", "groups", "rows", "width", "active", "count", "empty"), CASES)
@pytest.mark.parametrize("hierarchical", [False, True])
def test_the_best_are_those_of_all_logits(nodes, groups, rows, width, active, count, empty, hierarchical):
    features, slabs, ids, log_mass = problem(nodes, groups, rows, width, empty)
    active = torch.tensor(active, device=DEVICE)
    mass = log_mass[:, active].contiguous() if hierarchical else None
    found = grouped_top(features, slabs, active, count, ids=ids, log_mass=mass, cast=DEVICE == "cpu")
    assert_same(found, expected(features, slabs, ids, active, count, mass))


def test_a_group_of_empty_places_gives_nothing():
    features, slabs, ids, log_mass = problem(4, 3, 70, 16, 0)
    ids[1] = -1
    active = torch.tensor([1, 2], device=DEVICE)
    for mass in (None, log_mass[:, active].contiguous()):
        log_probs, tokens = grouped_top(features, slabs, active, 8, ids=ids, log_mass=mass, cast=DEVICE == "cpu")
        assert torch.isfinite(log_probs).all()
        assert torch.isin(tokens, ids[2]).all()


def test_without_ids_places_are_tokens():
    features, slabs, _, _ = problem(2, 4, 33, 16, 0)
    active = torch.tensor([1, 3], device=DEVICE)
    _, tokens = grouped_top(features, slabs, active, 5, cast=DEVICE == "cpu")
    places = torch.arange(4 * 33, device=DEVICE).view(4, 33)
    assert torch.equal(tokens, expected(features, slabs, places, active, 5, None)[1])


SMALL = Tiles(16, 16, 4, 2)


@pytest.mark.parametrize("count", [7, 40])
@pytest.mark.parametrize("hierarchical", [False, True])
def test_among_equal_ones_the_smaller_place_comes_first(count, hierarchical):
    """Every second row is the same and the best, in slabs whose last tile is not full; the groups are not in order."""
    features, slabs, ids, _ = problem(3, 4, 41, 16, 0)
    slabs[:] = -features.sum(0)
    slabs[:, ::2] = features.sum(0)
    features[:] = features.sum(0)
    active = torch.tensor([3, 0, 2], device=DEVICE)
    mass = torch.full((3, 3), 0.25, device=DEVICE).log() if hierarchical else None
    _, tokens = grouped_top(features, slabs, active, count, ids=ids, log_mass=mass, tiles=SMALL, cast=DEVICE == "cpu")
    assert torch.equal(tokens, ids[active][:, ::2].flatten()[:count].expand(3, count))


@pytest.mark.parametrize("count", [10, 20])
def test_the_best_may_all_lie_in_one_tile(count):
    features, slabs, ids, _ = problem(4, 3, 96, 16, 0)
    slabs[1, 32:64] += 9 * features[2]
    active, tiles = torch.tensor([0, 1, 2], device=DEVICE), Tiles(32, 16, 4, 2)
    found = grouped_top(features, slabs, active, count, ids=ids, tiles=tiles, cast=DEVICE == "cpu")
    assert_same(found, expected(features, slabs, ids, active, count, None))
    assert torch.isin(found[1][2], ids[1, 32:64]).all()


def test_a_group_with_little_mass_comes_last_whatever_its_logits():
    features, slabs, ids, _ = problem(2, 2, 50, 16, 0)
    slabs[0] = slabs[1] * 1.5  # larger logits, and less mass
    active = torch.tensor([0, 1], device=DEVICE)
    mass = torch.tensor([[1e-9, 0.9]] * 2, device=DEVICE).log()
    options = {"ids": ids, "tiles": SMALL, "cast": DEVICE == "cpu"}
    assert torch.isin(grouped_top(features, slabs, active, 5, **options)[1], ids[0]).any()
    found = grouped_top(features, slabs, active, 5, log_mass=mass, **options)
    assert_same(found, expected(features, slabs, ids, active, 5, mass))
    assert torch.isin(found[1], ids[1]).all()


@pytest.mark.parametrize("hierarchical", [False, True])
def test_more_than_a_thousand_tiles(hierarchical):
    features, slabs, ids, log_mass = problem(2, 3, 16 * 350 + 3, 16, 100)
    active = torch.tensor([0, 1, 2], device=DEVICE)
    mass = log_mass if hierarchical else None
    found = grouped_top(features, slabs, active, 10, ids=ids, log_mass=mass, tiles=SMALL, cast=DEVICE == "cpu")
    assert_same(found, expected(features, slabs, ids, active, 10, mass))


@pytest.mark.parametrize("nodes", [1, 16, 32, 64])
@pytest.mark.parametrize("width", [64, 576, 4096])
def test_two_programs_fit_a_multiprocessor_and_one_looks_at_every_tile(nodes, width):
    for places in (1000, 2048 * 64, 262144):
        tiles = choose_tiles(nodes, width, places, False)
        assert tiles.stages * (max(16, nodes) + tiles.rows) * tiles.depth * 2 <= 100 * 1024
        assert places / tiles.rows <= 2048


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device; the interpreter has no bf16 products")
@pytest.mark.parametrize("nodes", [1, 10, 16, 61, 64])
@pytest.mark.parametrize("active", [[0, 3, 7], [5], list(range(8))], ids=["three groups", "one group", "all groups"])
def test_in_bf16_the_best_are_as_good_as_fp32_says(nodes, active):
    features, slabs, ids, _ = problem(nodes, 8, 515, 576, 77, torch.bfloat16)
    active = torch.tensor(active, device=DEVICE)
    log_probs, tokens = grouped_top(features, slabs, active, 10, ids=ids)
    wanted = expected(features, slabs, ids, active, 10, None)[0]
    torch.testing.assert_close(log_probs, wanted, rtol=2e-2, atol=2e-2)
    assert (tokens >= 0).all()


@pytest.mark.parametrize(
    ("nodes", "groups", "always", "active"), [(1, 8, 0, 2), (10, 33, 1, 5), (3, 7, 2, 5), (16, 64, 1, 1)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_groups_with_the_most_mass_are_chosen(nodes, groups, always, active, weighted):
    from coral_spec.kernels.routing import choose

    generator = torch.Generator().manual_seed(nodes + groups)
    logits = torch.randn(nodes, groups, generator=generator).to(DEVICE)
    paths = torch.rand(nodes, generator=generator).log().to(DEVICE) if weighted else None
    chosen, mass = choose(logits, paths, always, active)
    log_probs = logits.double().log_softmax(-1)
    shares = (log_probs.exp() * (1.0 if paths is None else paths.double().exp()[:, None])).sum(0)
    best = shares[always:].topk(active).indices.sort().values + always
    assert chosen.tolist() == [*range(always), *best.tolist()]
    torch.testing.assert_close(mass, log_probs[:, chosen].float(), rtol=1e-5, atol=1e-5)
