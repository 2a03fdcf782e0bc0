"""A target is taken apart where the parts give what the whole gives."""

from __future__ import annotations

import pytest
import torch

from coral_spec import backbone
from coral_spec.backbone import Backbone, distances, of_most
from expkit.errors import UsageError
from tiny import tiny_target


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
def test_known_architectures_are_taken_apart(architecture: str) -> None:
    assert Backbone(tiny_target(architecture)).layers


def test_a_model_that_does_more_than_its_layers_runs_as_it_is() -> None:
    target = tiny_target("llama")
    target.model.get_decoder().layers[0].register_forward_hook(lambda _, __, output: output * 1.2)
    found = Backbone(target)
    assert not found.layers
    assert float(found._differences().max()) < 1e-3


def test_single_positions_are_forgiven_parts_are_not() -> None:
    plain = torch.randn(1, 16, 50, generator=torch.Generator().manual_seed(0))
    ours = plain + 0.01 * torch.randn(1, 16, 50, generator=torch.Generator().manual_seed(1))
    ours[:, [0, 12]] += 3.0
    assert of_most(distances(plain, ours)) == pytest.approx(0.01, rel=0.2)
    for wrong in (slice(0, 5), slice(9, 13)):
        other = ours.clone()
        other[:, wrong] = torch.randn(1, other[:, wrong].shape[1], 50, generator=torch.Generator().manual_seed(2))
        assert of_most(distances(plain, other)) > 0.5
    for odd in (float("nan"), float("inf")):
        other = ours.clone()
        other[:, 3] = odd
        assert of_most(distances(plain, other)) == float("inf")


def test_an_unknown_model_is_refused_for_one_wrong_position(monkeypatch: pytest.MonkeyPatch) -> None:
    target, found = tiny_target("llama"), torch.zeros(16)
    monkeypatch.setattr(backbone, "HELD", frozenset())
    monkeypatch.setattr(Backbone, "_differences", lambda self: found)
    Backbone(target)
    found[9] = 0.5
    with pytest.raises(UsageError, match="cannot verify trees"):
        Backbone(target)
