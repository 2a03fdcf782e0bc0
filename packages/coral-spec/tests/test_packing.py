"""Packed layers: the same numbers from the same parameters, and the user's model untouched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coral_spec.packing import PackedLinear, multiplies_bf16, packed
from tiny import tiny_target


def frozen(bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 40, bias=bias).requires_grad_(False)


def test_a_packed_layer_computes_what_the_layer_does():
    for bias in (True, False):
        layer = frozen(bias)
        twin = packed(layer)
        for shape in ((24,), (1, 24), (2, 5, 24)):
            states = torch.randn(*shape)
            torch.testing.assert_close(twin(states), layer(states))
        assert type(twin) is PackedLinear


@pytest.mark.skipif(not multiplies_bf16(), reason="the processor has no bf16 products")
def test_a_packed_bf16_layer_rounds_as_the_layer_does():
    layer = frozen(True).bfloat16()
    states = torch.randn(1, 5, 24).bfloat16()
    torch.testing.assert_close(packed(layer)(states), layer(states))


def test_the_original_stays_as_it_is_and_shares_its_parameters():
    model = tiny_target("qwen2").model
    before = [type(module) for module in model.modules()]
    twin = packed(model)
    assert twin is not model
    assert [type(module) for module in model.modules()] == before
    assert {id(parameter) for parameter in twin.parameters()} == {id(parameter) for parameter in model.parameters()}
    assert not any(type(module) is nn.Linear for module in twin.modules())


def test_what_cannot_be_packed_is_returned_as_it_is(monkeypatch):
    trained, half = frozen(True).requires_grad_(True), frozen(True).half()
    assert packed(trained) is trained
    assert packed(half) is half
    monkeypatch.setattr("coral_spec.packing.multiplies_bf16", lambda: False)
    emulated = frozen(True).bfloat16()
    assert packed(emulated) is emulated
    monkeypatch.setattr("coral_spec.packing._free_memory", lambda: 1000.0)
    layer = frozen(False)
    assert packed(layer) is layer
