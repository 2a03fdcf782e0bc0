"""BatchNorm policies: what normalises a view, and what the running statistics remember."""

from __future__ import annotations

import pytest
import torch

from pden.models import build_model
from pden.training.views import forward_views


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model("wrn-10-1", classes=3, embedding=4).train()


def views() -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.rand(6, 3, 16, 16, generator=rng), torch.rand(6, 3, 16, 16, generator=rng) * 0.2]


def running(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten() for key, value in module.state_dict().items() if "running" in key])


def test_joint_normalises_all_views_together():
    first, second = model(), model()
    output = forward_views(first, views(), "joint")
    assert output.logits.shape == (2, 6, 3)
    assert torch.allclose(output.logits.flatten(0, 1), second.full(torch.cat(views())).logits)


def test_split_normalises_each_view_by_itself():
    output, other = forward_views(model(), views(), "split"), model()
    for place, view in enumerate(views()):
        assert torch.allclose(output.logits[place], other.full(view).logits, atol=1e-5)


def test_source_remembers_the_source_alone():
    first, second = model(), model()
    output = forward_views(first, views(), "source")
    second.full(views()[0])
    assert torch.equal(running(first), running(second))
    assert torch.allclose(output.logits, forward_views(model(), views(), "split").logits)
    assert all(each.momentum == 0.1 for each in first.modules() if isinstance(each, torch.nn.BatchNorm2d))


def test_frozen_uses_and_keeps_the_running_statistics():
    first = model()
    before = running(first)
    output = forward_views(first, views(), "frozen")
    assert torch.equal(running(first), before) and first.training
    assert torch.allclose(output.logits[0], model().eval()(views()[0]), atol=1e-5)


@pytest.mark.parametrize("policy", ["joint", "split", "source", "frozen"])
def test_without_batch_norm_all_policies_are_the_same(policy):
    torch.manual_seed(0)
    plain = build_model("digits", classes=3, size=16, width=0.1)
    expected = plain.full(torch.cat(views())).logits
    assert torch.allclose(forward_views(plain, views(), policy).logits.flatten(0, 1), expected)
