"""Averages of weights, with statistics of their own."""

from __future__ import annotations

import copy

import torch

from tiny_models import tiny_batch, tiny_net
from train_adv.averaging import WeightAverage
from train_adv.models.classifier import Classifier, ModelSpec

SPEC = ModelSpec("custom", ("a", "b", "c", "d"), (3, 8, 8), (0.5,) * 3, (0.25,) * 3)


def test_swa_is_the_plain_mean():
    models = [Classifier(tiny_net(seed=seed), SPEC) for seed in range(3)]
    average = WeightAverage(models[0], "swa")
    for model in models:
        average.update(model)
    expected = torch.stack([model.backbone[0].weight for model in models]).mean(0)
    assert torch.allclose(average.model.backbone[0].weight, expected, atol=1e-6)


def test_an_ema_forgets_its_start_and_then_moves_slowly():
    start, goal = Classifier(tiny_net(seed=0), SPEC), Classifier(tiny_net(seed=1), SPEC)
    average = WeightAverage(start, "ema", decay=0.99)
    distances = []
    for _ in range(300):
        average.update(goal)
        distances.append(float((average.model.backbone[0].weight - goal.backbone[0].weight).norm()))
    assert distances[5] < 0.02 * float((start.backbone[0].weight - goal.backbone[0].weight).norm())
    assert distances[-1] < 1e-3


def test_the_average_never_touches_the_model():
    model = Classifier(tiny_net(), SPEC)
    before = copy.deepcopy(model.state_dict())
    average = WeightAverage(model, "ema")
    average.update(Classifier(tiny_net(seed=4), SPEC))
    average.refresh([tiny_batch(8)[0]])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_refreshed_statistics_are_those_of_the_averaged_weights():
    model = Classifier(tiny_net(), SPEC)
    average = WeightAverage(model, "swa")
    average.update(Classifier(tiny_net(seed=4), SPEC))
    images = [tiny_batch(64, seed=seed)[0] for seed in range(3)]
    average.refresh(images)
    first = average.model.backbone[0]
    outputs = [first((batch - 0.5) / 0.25) for batch in images]
    expected = torch.stack([output.mean((0, 2, 3)) for output in outputs]).mean(0)
    assert torch.allclose(average.model.backbone[1].running_mean, expected, atol=1e-4)
    assert average.model.backbone[1].momentum == 0.1 and not average.model.backbone[1].training
