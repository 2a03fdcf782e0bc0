"""The job around a trainer: what stops it, what it keeps, and that no target has a part in selection."""

from __future__ import annotations

import json

import pytest
import torch

from expkit.checkpoint import CheckpointStore
from expkit.distributed import World
from expkit.errors import UsageError
from pden.data import Home
from pden.training import run as job
from pden.training.trainer import Trainer
from tiny_domains import finish, tiny_config, tiny_domain, tiny_trainer

ALONE = World(0, 1, 0)


def train(config, folder, **options):
    return job.train(config, Home.of(), folder, ALONE, quiet=True, **options)


def embedded(**changes):
    return tiny_config(pretrain_batch=4, batch=4, **{"data__source": "digits", "data__disguised": 8, **changes})


def test_a_loss_that_is_no_number_stops_the_run_and_what_was_kept_before_stays_good(tmp_path, monkeypatch):
    broken = Trainer._plain_step, Trainer._expanding_step

    def spoil(trainer, stream):
        broken[1](trainer, stream)
        if trainer.clock.total >= 12:
            torch.nn.init.constant_(trainer.task.classifier.weight, torch.nan)

    monkeypatch.setattr(Trainer, "_expanding_step", spoil)
    with pytest.raises(UsageError, match=r"is not finite at step 1\d; lower optimizer.lr"):
        train(embedded(log_every=1000), tmp_path)
    store = CheckpointStore(tmp_path / "tiny" / "checkpoints")
    assert store.steps() and max(store.steps()) <= 12
    assert all(torch.isfinite(each).all() for each in store.latest().tensors.values())
    assert not (tmp_path / "tiny" / "result.json").exists()
    monkeypatch.setattr(Trainer, "_expanding_step", broken[1])
    assert train(embedded(log_every=1000), tmp_path, resume=True) is not None


def test_a_loss_that_is_no_number_is_wrong_use():
    trainer = tiny_trainer()
    finish(trainer, 2)
    trainer._note({"cross_entropy": torch.tensor(torch.nan)})
    with pytest.raises(UsageError, match="cross_entropy is not finite"):
        trainer.take_metrics()


@pytest.mark.parametrize(("key", "size"), [("batch", 7), ("pretrain_batch", 3), ("pretrain_batch", 2)])
def test_a_batch_must_divide_among_the_processes(key, size):
    with pytest.raises(UsageError, match=f"{key} is {size} on 2 processes; it must be 4 or another multiple of 2"):
        Trainer(tiny_config(**{key: size}), tiny_domain(), tiny_domain(24, seed=1), world=World(0, 2, 0))


def test_auto_is_fp32_where_there_is_no_bf16(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "resolve_dtype", lambda name, device: torch.float16)  # what a GPU before Ampere gives
    assert train(embedded(dtype="auto", rounds=0), tmp_path) is not None
    with pytest.raises(UsageError, match="float16 is not supported"):
        train(embedded(dtype="fp16", name="other"), tmp_path)


def test_no_target_is_selected_on():
    data = {"data__validation": "digits-test", "data__targets": ("mine=digits-test",)}
    with pytest.raises(UsageError, match='target "mine" is the validation domain'):
        job.load_data(embedded(**data), Home.of())


def test_every_round_has_its_disguised_figure_and_every_selection_too(tmp_path):
    outcome = train(embedded(rounds=1), tmp_path)
    result = json.loads((outcome.folder / "result.json").read_text())
    assert all(0 <= each["last"]["disguised"] <= 1 for each in result["history"])
    assert {"last", "averaged", "source-validation"} == set(result["selections"])
    assert all("disguised" in each for each in result["selections"].values())


def test_a_checkpoint_of_another_version_or_model_is_refused_in_one_line(tmp_path):
    train(embedded(rounds=1), tmp_path)
    store = CheckpointStore(tmp_path / "tiny" / "checkpoints")
    last = store.latest()
    for tensors, state in (
        (last.tensors, {key: value for key, value in last.state.items() if key != "pool"}),
        ({**last.tensors, "classifier.weight": torch.zeros(3, 4)}, last.state),
    ):
        store.save(last.step, tensors, state)
        with pytest.raises(UsageError, match=r"is of another model or version \(") as error:
            train(embedded(rounds=1), tmp_path, resume=True)
        assert "\n" not in str(error.value)
