"""What generator and task model minimise, against sums that are written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pden.losses import (
    adversarial_contrast,
    barlow_twins,
    cycle_loss,
    instance_contrast,
    jensen_shannon,
    supervised_contrast,
)
from pden.models import TaskOutput
from pden.training.config import LossConfig
from pden.training.objectives import Expansion, contrast, generator_loss, task_loss
from tiny_domains import finish, tiny_trainer

OWN = LossConfig(safety=0.7, diversity=3.0, diversity_limit=0.001, cycle=5.0, adversarial=0.3, temperature=0.5)


def test_the_generators_loss_is_the_weighted_sum_of_its_four_parts():
    trainer = tiny_trainer()
    finish(trainer, 6)
    task = trainer.task.eval()
    expansion = Expansion("photometric", 3, 4, 3)
    images, labels = trainer.source.batch(torch.arange(12))
    noises = [torch.randn(12, 3), torch.randn(12, 3)]
    first, second = (expansion.generator(images, noise) for noise in noises)
    apart = float((first - second).abs().mean())
    safety = float(torch.nn.functional.cross_entropy(task(first), labels))
    cycle = float(cycle_loss(expansion.reverse(first, torch.zeros(12, 0)), images))
    seen, own = task.full(first).embeddings, task.full(images).embeddings
    for limit in (0.5, 0.001):  # of the diversity, in reach and not
        weights = replace(OWN, diversity_limit=limit)
        total, parts = generator_loss(task, expansion, images, labels, noises, weights)
        assert (apart < limit) == (limit == 0.5)
        wanted = 0.7 * safety - 3.0 * min(apart, limit) + 5.0 * cycle
        wanted += 0.3 * float(adversarial_contrast(seen, own, 0.5))
        assert float(total) == pytest.approx(wanted, rel=1e-4)
        found = {name: float(value) for name, value in parts.items()}
        assert found["diversity"] == pytest.approx(apart, rel=1e-4)
        assert found["cycle"] == pytest.approx(cycle, rel=1e-4)


def test_each_contrast_is_its_own_loss_with_the_settings_that_were_given():
    embeddings, labels = torch.nn.functional.normalize(torch.randn(3, 8, 5), dim=2), torch.arange(8) % 3
    weights = replace(OWN, off_diagonal=0.2)
    wanted = {
        "instance": instance_contrast(embeddings, 0.5),
        "supervised": supervised_contrast(embeddings, labels, 0.5),
        "barlow": barlow_twins(embeddings, 0.2),
    }
    found = {kind: contrast(embeddings, labels, replace(weights, contrast=kind)) for kind in wanted}
    assert {kind: float(value) for kind, value in found.items()} == {k: float(v) for k, v in wanted.items()}
    assert len({round(float(value), 4) for value in wanted.values()}) == 3


def test_the_tasks_loss_weighs_its_contrast():
    embeddings = torch.nn.functional.normalize(torch.randn(3, 8, 5), dim=2)
    output = TaskOutput(torch.randn(3, 8, 4), embeddings, torch.zeros(3, 8, 2))
    labels = torch.arange(8) % 4
    total, parts = task_loss(output, labels, replace(OWN, contrast_weight=0.25))
    assert float(total) == pytest.approx(float(parts["cross_entropy"] + 0.25 * parts["contrast"]), rel=1e-5)
    by_view = sum(float(torch.nn.functional.cross_entropy(each, labels)) for each in output.logits)
    assert float(parts["cross_entropy"]) == pytest.approx(by_view, rel=1e-5)


def test_the_views_predictions_are_held_together_where_that_has_a_weight():
    embeddings = torch.nn.functional.normalize(torch.randn(3, 8, 5), dim=2)
    output = TaskOutput(torch.randn(3, 8, 4), embeddings, torch.zeros(3, 8, 2))
    labels = torch.arange(8) % 4
    without, parts = task_loss(output, labels, OWN)
    assert "consistency" not in parts
    total, parts = task_loss(output, labels, replace(OWN, consistency=10.0))
    wanted = float(jensen_shannon(output.logits))
    assert float(total) == pytest.approx(float(without) + 10 * wanted, rel=1e-5) and wanted > 0.1


def test_pixels_that_have_no_label_have_no_part_in_consistency():
    logits, embeddings = torch.randn(3, 2, 4, 5, 6), torch.zeros(3, 2, 5, 6, 7)
    output = TaskOutput(logits, embeddings, torch.zeros(3, 2, 8))
    labels = torch.zeros(2, 5, 6, dtype=torch.long)
    labels[1, 2:] = 255
    weights = replace(OWN, consistency=1.0, contrast="none")
    _, parts = task_loss(output, labels, weights)
    pixels = logits.permute(0, 1, 3, 4, 2)[:, labels != 255]  # (views, pixels, classes), as images are
    assert float(parts["consistency"]) == pytest.approx(float(jensen_shannon(pixels)), rel=1e-5)
    _, none = task_loss(output, torch.full_like(labels, 255), weights)
    assert float(none["consistency"]) == 0
