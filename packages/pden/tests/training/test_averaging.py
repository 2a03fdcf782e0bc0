"""Averaged weights against their definition, through a checkpoint, with buffers of whole numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pden.training.averaging import new_average
from pden.training.config import AveragingConfig


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize("kind", ["ema", "uniform"])
def test_averages_are_those_of_the_definition_through_a_checkpoint(kind):
    learner, settings = model(), AveragingConfig(kind=kind, decay=0.9)
    own = new_average(learner, settings)
    expected: dict[str, torch.Tensor] = {}
    for step in range(6):
        with torch.no_grad():
            for tensor in learner.parameters():
                tensor.add_(torch.randn(tensor.shape))
        learner(torch.randn(8, 4))
        own.update_parameters(learner)
        share = 1 / (step + 1) if kind == "uniform" else 0.1 if step else 1.0
        for name, tensor in learner.state_dict().items():
            old = expected.get(name, torch.zeros_like(tensor))
            whole = not tensor.is_floating_point()
            expected[name] = tensor.clone() if whole else (1 - share) * old + share * tensor
        if step == 2:
            again = new_average(model(), settings)
            again.load_state_dict(own.state_dict())
            own = again
    assert own.count == 6
    for name, tensor in own.module.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def test_none_is_kept_where_none_is_asked_for():
    assert new_average(model(), AveragingConfig(kind="none")) is None
