"""One module learns from a loss that runs through others."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from pden.training.averaging import new_average
from pden.training.config import AveragingConfig, OptimizerConfig
from pden.training.learner import Learner
from pden.training.trainer import ALONE


def test_only_the_learners_own_module_gets_gradients():
    own, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = [each.clone() for each in other.parameters()]
    Learner(own, OptimizerConfig(lr=0.1), ALONE).update(other(own(torch.ones(1, 2))).sum())
    assert all(each.grad is None for each in other.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_parameters_without_a_part_in_the_loss_stay():
    module = torch.nn.ModuleDict({"used": torch.nn.Linear(1, 1), "unused": torch.nn.Linear(1, 1)})
    before = module["unused"].weight.clone()
    Learner(module, OptimizerConfig(lr=0.1), ALONE).update(module["used"](torch.ones(1, 1)).sum())
    assert torch.equal(module["unused"].weight, before)


@pytest.mark.parametrize("layouts", list(permutations((torch.contiguous_format, torch.channels_last))))
def test_adam_steps_as_its_paper_says_whatever_layout_a_gradient_has(layouts):
    torch.manual_seed(0)
    module = torch.nn.Conv2d(3, 4, 3).to(memory_format=layouts[0])
    learner = Learner(module, OptimizerConfig(lr=0.1), ALONE)
    weight, first, second = module.weight.detach().clone(), 0.0, 0.0
    for step in range(1, 4):
        gradient = torch.randn(4, 3, 3, 3).contiguous(memory_format=layouts[1])
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
        weight -= 0.1 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        learner.update((module.weight * gradient).sum())
        torch.testing.assert_close(module.weight.detach(), weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 1.0])
def test_cosine_follows_progress(progress):
    learner = Learner(torch.nn.Linear(1, 1), OptimizerConfig(kind="sgd", lr=0.1, schedule="cosine"), ALONE)
    learner.update(learner.module(torch.ones(1, 1)).sum(), progress)
    expected = 0.05 * (1 + math.cos(math.pi * progress))
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_averages_are_what_they_say():
    module = torch.nn.Linear(1, 1, bias=False)
    ema, uniform = (new_average(module, AveragingConfig(kind=kind, decay=0.5)) for kind in ("ema", "uniform"))
    assert new_average(module, AveragingConfig(kind="none")) is None
    for value in (1.0, 2.0, 4.0):
        torch.nn.init.constant_(module.weight, value)
        ema.update_parameters(module)
        uniform.update_parameters(module)
    assert uniform.module.weight.item() == pytest.approx(7 / 3)
    assert ema.module.weight.item() == pytest.approx(((1 + 2) / 2 + 4) / 2)
