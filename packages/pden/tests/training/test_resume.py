"""A killed run goes on to the same bits, wherever it was killed."""

from __future__ import annotations

import pytest
import torch

from expkit.checkpoint import CheckpointStore
from pden.training.state import capture, restore
from tiny_domains import finish, tiny_trainer, weights

# Steps of the tiny run: 6 of pre-training, 4 of the judge, then rounds of 6, whose generator learns for 3.
PLACES = {"pretraining": 3, "judge": 8, "learning": 12, "frozen": 14, "second round": 17, "between rounds": 16}


def through_a_checkpoint(make, at: int, folder):
    killed = make()
    finish(killed, at)
    CheckpointStore(folder).save(killed.clock.total, killed.task.state_dict(), capture(killed))
    checkpoint = CheckpointStore(folder).latest()
    assert checkpoint is not None
    again = make()
    restore(again, checkpoint)
    finish(again)
    return again


@pytest.mark.parametrize("place", PLACES)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(place, tmp_path):
    whole = tiny_trainer()
    finish(whole)
    again = through_a_checkpoint(tiny_trainer, PLACES[place], tmp_path)
    assert torch.equal(weights(again), weights(whole))
    assert [each.plain() for each in again.reports] == [each.plain() for each in whole.reports]
    assert again.best.round == whole.best.round


def test_generators_on_a_grid_come_back_on_it(tmp_path):
    def make():
        return tiny_trainer(generator__kinds=("photometric", "geometric", "composite"), generator__grid=4, rounds=3)

    whole = make()
    finish(whole)
    again = through_a_checkpoint(make, PLACES["second round"], tmp_path)
    assert torch.equal(weights(again), weights(whole))
    assert [getattr(each, "grid", None) for each in again.pool] == [4, None, 4]


@pytest.mark.parametrize("at", [11, 14])
def test_a_domain_refused_after_a_resume_is_rolled_back_all_the_same(at, tmp_path):
    def make():
        return tiny_trainer(gate__distance=5.0)  # nothing is so far from the source

    whole = make()
    finish(whole)
    assert [each.verdict for each in whole.reports][:2] == ["retrain", "dropped"]
    again = through_a_checkpoint(make, at, tmp_path)
    assert torch.equal(weights(again), weights(whole))


@pytest.mark.parametrize("method", ["ada", "randconv", "augmix"])
def test_baselines_resume_too(method, tmp_path):
    def make():
        trainer = tiny_trainer(method=method)
        trainer.baseline.growth = (2, 9) if method == "ada" else ()
        return trainer

    whole = make()
    finish(whole)
    assert torch.equal(weights(through_a_checkpoint(make, 10, tmp_path)), weights(whole))


def test_dropout_repeats_after_a_resume(tmp_path):
    def make():
        trainer = tiny_trainer(gate__mode="off")
        trainer.task.encoder.append(torch.nn.Dropout(0.5))
        return trainer

    whole = make()
    finish(whole)
    assert torch.equal(weights(through_a_checkpoint(make, 9, tmp_path)), weights(whole))
