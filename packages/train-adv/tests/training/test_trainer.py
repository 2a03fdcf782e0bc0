"""Single steps against their formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_adv
from expkit.norms import kept_statistics
from tiny_models import tiny_batch, tiny_net
from train_adv.data.dataset import Augment, DataSet, Resident
from train_adv.training import run
from train_adv.training.trainer import Trainer


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """A function that trains a tiny network with these settings and gives its trainer."""
    kept: list[Trainer] = []

    class Watched(Trainer):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            kept.append(self)

    def train(**settings: Any) -> Trainer:
        images, labels = tiny_batch(80)
        split = Resident((images * 255).to(torch.uint8), labels)
        data = DataSet("mine", tuple("abcd"), split, split, Augment(0, False))
        checks = {"fraction": 0.2, "steps": 1, "test": False}
        common = {"batch_size": 16, "device": "cpu", "attack": {"steps": 1}, "validation": checks}
        train_adv.fit(tiny_net(), data, runs=tmp_path, **{"epochs": 1, **common, **settings})
        return kept[-1]

    monkeypatch.setattr(run, "Trainer", Watched)
    return train


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of AT's loss, by name; running statistics stay."""
    named = dict(model.named_parameters())
    with kept_statistics(model):
        loss = F.cross_entropy(model(images), labels)
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize(("gamma", "warmup", "clip"), [(0.05, 0, 0.0), (0.05, 9, 0.0), (0.0, 0, 0.1), (0.05, 0, 0.1)])
def test_a_step_is_awp_clipping_and_momentum_by_their_formulas(trained, gamma, warmup, clip):
    trainer = trained(awp={"gamma": gamma, "warmup": warmup}, optimizer={"clip_norm": clip, "momentum": 0.9})
    trainer.progress.epoch, trainer.progress.number = 0, 1
    images, labels = tiny_batch(16, seed=5)
    trainer.climber = lambda start, images, labels: images  # type: ignore[assignment]
    trainer.optimizer.state.clear()  # the first step of a momentum is the gradient
    trainer.model.train()
    expected = copy.deepcopy(trainer.model)
    moves = {name: torch.zeros_like(value) for name, value in expected.named_parameters()}
    if warmup == 0:
        for name, gradient in gradients(expected, images, labels).items():
            weight = dict(expected.named_parameters())[name]
            if weight.ndim > 1:
                moves[name] = gamma * weight.detach().norm() * gradient / gradient.norm()
    with torch.no_grad():
        for name, weight in expected.named_parameters():
            weight += moves[name]
    found = gradients(expected, images, labels)
    length = torch.cat([each.flatten() for each in found.values()]).norm()
    scale = min(1.0, clip / float(length)) if clip else 1.0
    assert not clip or scale < 0.9
    trainer._step(images, labels)
    rate, decay = trainer.optimizer.param_groups[0]["lr"], trainer.config.optimizer.weight_decay
    assert rate > 0
    for name, weight in expected.named_parameters():
        wanted = weight - rate * (scale * found[name] + decay * weight) - moves[name]
        assert torch.allclose(dict(trainer.model.named_parameters())[name], wanted, atol=2e-6), name


@pytest.mark.parametrize(("start", "updates"), [(0.0, 4), (0.5, 2), (0.74, 2), (0.76, 1)])
def test_swa_begins_where_it_is_told_to(trained, start, updates):
    trainer = trained(epochs=4, averaging={"kind": "swa", "start": start})
    assert trainer.average is not None and trainer.average.updates == updates


@pytest.mark.parametrize("statistics", ["shared", "dual", "frozen"])
@pytest.mark.parametrize(("host", "inputs"), [("at", "natural"), ("at", "both"), ("trades", "natural")])
def test_lambda_is_the_asked_ratio_of_the_gradients_of_the_loss_itself(trained, statistics, host, inputs):
    asked = {"ratio": 0.5, "reference_epochs": 1, "statistics": statistics, "inputs": inputs}
    trainer = trained(host=host, epochs=2, topology=asked)
    images, labels = tiny_batch(16, seed=5)
    adversarial = (images + 0.05).clamp(0, 1)
    trainer.model.train()
    trainer._measure_norms(images, adversarial, labels)
    parameters = list(trainer.model.parameters())

    def gradient(weight: float) -> Tensor:
        with kept_statistics(trainer.model):  # frozen statistics are read by the backward too
            loss = trainer._whole_loss(images, adversarial, labels, torch.tensor(weight)).total
            found = torch.autograd.grad(loss, parameters)
        return torch.cat([each.flatten() for each in found])

    host, both = gradient(0.0), gradient(trainer.topology.weight)
    assert float((both - host).norm() / host.norm()) == pytest.approx(0.5, rel=5e-3)
