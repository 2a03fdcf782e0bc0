"""Fused layers against their torch reference: in Triton's interpreter on a CPU, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from coral_spec.backbone import Backbone
from coral_spec.cache import SlotStore
from coral_spec.layers import Layer, Nodes
from tiny import ARCHITECTURES, tiny_target

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAPACITY = 128


def layers_of(architecture: str, dtype: torch.dtype = torch.float32) -> list[Layer]:
    layers = Backbone(tiny_target(architecture, dtype=dtype, device=DEVICE)).layers
    assert layers, f"{architecture} is not recognised"
    for layer in layers:  # on a CPU kernels have no weights of their own to read
        for each in (layer.attention.qkv, layer.attention.out, layer.gate_up, layer.down):
            each.weight = torch.cat([part.weight for part in each._parts])
    return layers


def filled_store(layer: Layer, dtype: torch.dtype) -> SlotStore:
    store = SlotStore(CAPACITY)
    store.allocate(layer.attention.kv_heads, layer.attention.head_dim, torch.zeros(1, dtype=dtype, device=DEVICE))
    generator = torch.Generator().manual_seed(1)
    for states in (store.keys, store.values):
        states.copy_(torch.randn(states.shape, generator=generator))
    return store


def some_nodes(count: int, offset: int, length: int, dtype: torch.dtype) -> Nodes:
    """Random trees: what is needed of them is that a node sees itself, and none that comes later."""
    generator = torch.Generator().manual_seed(count + offset + length)
    ancestors = torch.rand(1, count, offset + count, generator=generator) < 0.5
    ancestors[0, :, offset:] &= torch.ones(count, count).tril().bool()
    ancestors[0, :, offset:] |= torch.eye(count).bool()
    depth = torch.randint(0, 4, (1, count), generator=generator).sort().values
    lengths = torch.tensor([length])
    parts = (part.to(DEVICE) for part in (lengths + depth, ancestors, lengths))
    return Nodes(*parts, offset, CAPACITY, dtype)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("count", "offset", "length"), [(1, 0, 0), (1, 0, 37), (7, 0, 37), (5, 3, 40), (17, 0, 70)])
def test_a_layer_computes_what_its_reference_does(architecture, count, offset, length):
    from coral_spec.kernels.layer import run_layers

    for layer in layers_of(architecture):
        if offset and layer.attention.window:
            continue  # a drafter's levels have no window
        nodes = some_nodes(count, offset, length, torch.float32)
        states = torch.randn(1, count, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        ours, theirs = filled_store(layer, torch.float32), filled_store(layer, torch.float32)
        found = run_layers([layer], None, states, nodes, [ours])
        expected = layer(states, nodes, theirs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values)
        assert not ours.counter.any(), "the counter must be ready for the next launch"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device; the interpreter has no bf16 products")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("count", [1, 7, 61])
def test_in_bf16_a_layer_is_as_near_to_fp32_as_its_reference(architecture, count):
    from coral_spec.kernels.layer import run_layers

    dtype = torch.bfloat16
    for layer, exact in zip(layers_of(architecture, dtype), layers_of(architecture), strict=True):
        states = torch.randn(1, count, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
        nodes = some_nodes(count, 0, 37, dtype)
        truth = exact(states.float(), some_nodes(count, 0, 37, torch.float32), filled_store(exact, torch.float32))
        found = run_layers([layer], None, states, nodes, [filled_store(layer, dtype)]).float()
        reference = layer(states, nodes, filled_store(layer, dtype)).float()
        assert (found - truth).norm() < 2 * (reference - truth).norm() + 1e-3 * truth.norm()


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("count", [1, 9])
def test_a_prefix_may_be_split_over_any_number_of_programs(count, window):
    from coral_spec.kernels.attention import Blocks, attend

    generator = torch.Generator().manual_seed(0)
    nodes, heads, kv_heads, size, capacity = some_nodes(count, 0, 300, torch.float32), 4, 2, 16, 512
    qkv = torch.randn(count, (heads + 2 * kv_heads) * size, generator=generator).to(DEVICE)
    angles = torch.rand(capacity, size, generator=generator).to(DEVICE)
    keys, values = (torch.randn(1, kv_heads, capacity, size, generator=generator).to(DEVICE) for _ in range(2))
    counter = torch.zeros(16, dtype=torch.int32, device=DEVICE)

    def run(splits: int, least: int, queries: int = 16, step: int = 32) -> torch.Tensor:
        return attend(
            qkv,
            angles.cos(),
            angles.sin(),
            nodes.positions[0],
            nodes.lengths,
            nodes.ancestors[0],
            keys,
            values,
            counter,
            offset=0,
            scaling=0.25,
            window=window,
            blocks=Blocks(queries, step, 4, 2, least, splits),
        )

    whole = run(1, 1)
    for splits, least in ((2, 1), (8, 1), (8, 2), (32, 1)):
        torch.testing.assert_close(run(splits, least), whole, rtol=1e-4, atol=1e-5)
        assert not counter.any()
    torch.testing.assert_close(run(2, 1, queries=32, step=64), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5])
def test_gate_and_up_have_their_own_biases(rows):
    from coral_spec.kernels.linear import linear

    generator = torch.Generator().manual_seed(0)
    states, weight, bias = (torch.randn(*size, generator=generator) for size in ((rows, 32), (80, 32), (80,)))
    gate, up = torch.nn.functional.linear(states, weight, bias).chunk(2, dim=-1)
    found = linear(states.to(DEVICE), weight.to(DEVICE), bias=bias.to(DEVICE), activation="silu", gated=True).states
    torch.testing.assert_close(found.cpu(), torch.nn.functional.silu(gate) * up, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_residual_comes_after_the_activation(rows):
    from coral_spec.kernels.linear import linear

    generator = torch.Generator().manual_seed(0)
    states, weight, bias = (torch.randn(*size, generator=generator) for size in ((rows, 32), (32, 32), (32,)))
    expected = torch.nn.functional.silu(torch.nn.functional.linear(states, weight, bias)) + states
    states = states.to(DEVICE)
    found = linear(states, weight.to(DEVICE), bias=bias.to(DEVICE), activation="silu", residual=states).states
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_tiles_shrink_until_they_fit_a_smaller_card():
    from coral_spec.kernels.linear import choose_tiles, fit_tiles

    tiles = choose_tiles(61, 576, 1536, False)
    assert fit_tiles(tiles, 61, False, 2, 227 * 1024) == tiles
    small = fit_tiles(tiles, 61, True, 2, 99 * 1024)
    assert small.stages * (64 + 2 * small.outputs) * small.width * 2 <= 99 * 1024


@pytest.mark.parametrize("depth", [None, 0, 3])
@pytest.mark.parametrize("scale", [1.0, 5.5])
def test_a_drafters_inputs_are_embeddings_beside_features(depth, scale):
    from coral_spec.kernels.inputs import gather_inputs

    generator = torch.Generator().manual_seed(0)
    table, features = (torch.randn(rows, 48, generator=generator).to(DEVICE) for rows in (30, 5))
    tokens, above = (torch.tensor(each, device=DEVICE) for each in ([29, 0, 7, 7], [4, 0, 0, 2]))
    lengths = torch.tensor([20], device=DEVICE)
    found, positions = gather_inputs(tokens, table, features, above, lengths, depth=depth, limit=23, scale=scale)
    torch.testing.assert_close(found, torch.cat([table[tokens] * scale, features[above]], dim=1))
    assert positions.tolist() == [min(20 + (row if depth is None else depth), 22) for row in range(4)]
    shared, _ = gather_inputs(tokens, table, features[:1], None, lengths, depth=depth, limit=23)
    torch.testing.assert_close(shared, torch.cat([table[tokens], features[:1].expand(4, -1)], dim=1))
    own, _ = gather_inputs(tokens, table, features[:4], None, lengths, depth=depth, limit=23)
    torch.testing.assert_close(own, torch.cat([table[tokens], features[:4]], dim=1))
