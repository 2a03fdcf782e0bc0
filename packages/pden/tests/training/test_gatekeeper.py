"""What the gate costs: the judge sees a batch once, and the source is measured once in a run."""

from __future__ import annotations

import torch

from pden.training.gatekeeper import invert_some
from pden.training.trainer import Trainer
from tiny_domains import finish, tiny_config, tiny_domain, tiny_trainer


def test_a_step_of_the_judge_costs_one_batch_half_of_it_in_disguise():
    trainer = tiny_trainer()
    finish(trainer, 6)
    seen = []
    trainer.gatekeeper.judge.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    drawn = []
    batch = trainer._batch
    trainer._batch = lambda *given: drawn.append(batch(*given)) or drawn[-1]
    finish(trainer, 1)
    images = drawn[0][0]
    assert seen[0].shape == images.shape
    assert torch.equal(seen[0][:6], images[:6]) and not torch.equal(seen[0][6:], images[6:])


def test_the_source_is_measured_once_in_a_run():
    trainer = tiny_trainer(rounds=3)
    keeper, measured = trainer.gatekeeper, []
    measure = keeper._measure
    keeper._measure = lambda task, generator, *rest: measured.append(generator) or measure(task, generator, *rest)
    finish(trainer)
    assert measured.count(None) == 1 and len(measured) == 4


def test_half_of_the_images_become_negatives():
    images = torch.rand(400, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    made = invert_some(images, torch.Generator().manual_seed(1))
    turned = (made == 1 - images).flatten(1).all(dim=1)
    assert 150 < int(turned.sum()) < 250 and torch.equal(made[~turned], images[~turned])


def test_the_gate_measures_all_classes_of_a_sorted_domain():
    held = tiny_domain(60, seed=1)
    held = held.take(held.labels.sort(stable=True).indices)  # as a folder of class folders is read
    trainer = Trainer(tiny_config(), tiny_domain(), held)
    assert len(trainer.gatekeeper.labels) == 12 and trainer.gatekeeper.labels.unique().tolist() == [0, 1, 2]
