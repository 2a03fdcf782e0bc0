"""A target is taken apart where the parts give what the whole gives."""

from __future__ import annotations

import pytest
import torch

from coral_spec.backbone import Backbone, apart
from tiny import tiny_target


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_known_architectures_are_taken_apart(architecture: str) -> None:
    assert Backbone(tiny_target(architecture)).layers


def test_a_model_that_does_more_than_its_layers_runs_as_it_is() -> None:
    target = tiny_target("llama")
    target.model.get_decoder().layers[0].register_forward_hook(lambda _, __, output: output * 1.2)
    backbone = Backbone(target)
    assert not backbone.layers
    assert backbone._difference() < 1e-3


def test_single_positions_are_forgiven_parts_are_not() -> None:
    plain = torch.randn(1, 16, 50, generator=torch.Generator().manual_seed(0))
    ours = plain + 0.01 * torch.randn(1, 16, 50, generator=torch.Generator().manual_seed(1))
    ours[:, [0, 12]] += 3.0
    assert apart(plain, ours, 9) == pytest.approx(0.01, rel=0.2)
    for wrong in (slice(0, 5), slice(9, 13)):
        other = ours.clone()
        other[:, wrong] = torch.randn(1, other[:, wrong].shape[1], 50, generator=torch.Generator().manual_seed(2))
        assert apart(plain, other, 9) > 0.5
    ours[:, 3] = float("nan")
    assert not apart(plain, ours, 9) < 1e9
