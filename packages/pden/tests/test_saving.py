"""A saved model is refused in one line where it is damaged or another one's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import pden
from expkit.errors import UsageError
from pden.generators import build_generator
from pden.models import build_model
from pden.saving import save_model
from tiny_domains import finish, tiny_config, tiny_domain, tiny_trainer

MODEL = {"name": "digits", "classes": 3, "channels": 3, "size": 16, "width": 0.1, "embedding": 8}


def saved(folder: Path) -> Path:
    settings = {"model": MODEL, "classes": ["a", "b", "c"], "size": 16, "channels": 3, "source": "bars", "domains": []}
    torch.manual_seed(0)
    save_model(folder / "model", settings, {"last": build_model(**MODEL).state_dict()}, [build_generator("geometric")])
    return folder


def test_a_saved_model_comes_back(tmp_path):
    found = pden.load(saved(tmp_path))
    torch.manual_seed(0)
    model, images = build_model(**MODEL).eval(), torch.rand(2, 3, 16, 16)
    assert torch.equal(found.model(images), model(images)) and len(found.generators) == 1


def test_a_trainer_with_data_of_ones_own_is_saved_and_takes_images_of_that_size(tmp_path):
    source, validation = tiny_domain(), tiny_domain(24, seed=1)
    trainer = pden.Trainer(tiny_config(data__size=32), source, validation)
    with pytest.raises(UsageError, match="pre-training is not done"):
        pden.save(trainer, tmp_path)
    while not trainer.done:
        trainer.step()
    pden.save(trainer, tmp_path)
    found = pden.load(tmp_path, "averaged")
    assert (found.size, found.shape, found.source) == (16, (16, 16), source.name)
    assert len(found.generators) == len(found.domains) == len(trainer.pool) == 2
    images = validation.images[:4]
    assert trainer.averaged is not None
    assert torch.equal(found.model(images / 255), trainer.averaged.eval()(images / 255))
    assert not torch.equal(found.model(images / 255), pden.load(tmp_path).model(images / 255))
    assert found.predict(validation.images)[0].shape == (24,)


def change(path: Path, **values) -> None:
    about = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in {**about, **values}.items() if value is not None}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": {**MODEL, "classes": 5}}, "weights of another model"),
        ({"model": {**MODEL, "width": 0.2}}, "weights of another model"),
        ({"model": {**MODEL, "depth": 3}}, "of another version"),
        ({"selections": None}, "KeyError: 'selections'"),
        ({"generators": [{"kind": "geometric", "channels": 1}]}, "weights of another model"),
        ({"classes": 3}, "of another version"),
    ],
)
def test_another_models_files_are_refused_in_one_line(values, said, tmp_path):
    change(saved(tmp_path) / "model" / "model.json", **values)
    with pytest.raises(UsageError) as error:
        pden.load(tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_cut_off_description_or_weight_file_is_refused(tmp_path):
    for name in ("last.safetensors", "model.json"):
        file = saved(tmp_path) / "model" / name
        file.write_bytes(file.read_bytes()[:50])
        with pytest.raises(UsageError, match=name):
            pden.load(tmp_path)


def test_a_trainer_in_the_midst_of_a_round_is_saved_without_its_domain(tmp_path):
    trainer = tiny_trainer()
    while len(trainer.reports) < 2:
        trainer.step()
    pden.save(trainer, tmp_path)
    found = pden.load(tmp_path)
    assert len(found.domains) == len(found.generators) == 1


def test_a_run_of_another_training_is_not_overwritten(tmp_path):
    (tmp_path / "config.toml").write_text("")
    trainer = tiny_trainer()
    finish(trainer)
    with pytest.raises(UsageError, match="name another folder"):
        pden.save(trainer, tmp_path)
    assert not (tmp_path / "model").exists()
