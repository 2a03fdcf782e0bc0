"""`fit` with data of one's own, and what the verbs then make of such runs and of folders."""

from __future__ import annotations

import copy
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_adv
from expkit.cli import main
from expkit.errors import UsageError
from train_adv.attacks.norms import check_epsilon
from train_adv.cli import build
from train_adv.commands.attack import _distinct
from train_adv.commands.options import data_of
from train_adv.data.dataset import Augment, DataSet, Resident
from train_adv.data.folder import decode, image_folder
from train_adv.data.load import digits
from train_adv.evaluation.statistics import paired_difference
from train_adv.topology.regularizer import TopologyRegularizer
from train_adv.training import run as run_module
from train_adv.training.trainer import Diverged

QUICK = {"epochs": 1, "device": "cpu", "attack": {"steps": 1}, "validation": {"fraction": 0.2}, "batch_size": 64}


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(build(), arguments)
    return int(stopped.value.code or 0)


def picture_folder(root: Path, names: tuple[str, ...] = ("cat", "cow", "dog"), count: int = 20, size: int = 12) -> Path:
    """Noise with a brightness of its own for each class."""
    draws = np.random.default_rng(0)
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = draws.integers(0, 80, (size, size, 3)) + 80 * number
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index}.png")
    return root


def test_data_of_ones_own_are_not_the_digits(tmp_path, capsys):
    own = replace(digits(), name="mine")
    outcome = train_adv.fit("small-cnn", own, name="own", runs=tmp_path, **QUICK)
    config = tomllib.loads((outcome.folder / "config.toml").read_text())
    assert config["data"]["name"] == "mine"
    assert config["attack"]["epsilon"] == pytest.approx(8 / 255)  # 0.2 is the digits' own
    assert run("eval", str(outcome.folder), "--attacks", "natural", "--device", "cpu") == 2
    assert '"mine"' in capsys.readouterr().err
    assert run("eval", str(outcome.folder), "--data", "digits", "--attacks", "natural", "--device", "cpu") == 0


def test_a_model_that_the_last_step_ruined_is_not_kept(tmp_path):
    settings = {**QUICK, "batch_size": 1024}  # one step
    with pytest.raises(Diverged, match="no numbers"):
        train_adv.fit("small-cnn", digits(), name="a", runs=tmp_path, optimizer={"lr": 1e38}, **settings)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_first_images_of_a_folder_are_of_all_classes(tmp_path):
    root = picture_folder(tmp_path / "p")
    data = image_folder(root, size=12)
    assert set(data.train.labels[:20].tolist()) == set(data.test.labels[:8].tolist()) == {0, 1, 2}
    again = image_folder(root, size=12)
    assert data.test.fingerprint() == again.test.fingerprint()


def test_another_folder_is_read_as_the_model_was_trained(tmp_path):
    picture_folder(tmp_path / "a")
    picture_folder(tmp_path / "b", size=30)
    outcome = train_adv.fit(
        "small-cnn", image_folder(tmp_path / "a", size=12), name="f", runs=tmp_path, **{**QUICK, "batch_size": 16}
    )
    assert data_of(str(tmp_path / "b"), None, outcome.folder).image_shape == (3, 12, 12)


def test_adversarial_files_never_overwrite(tmp_path):
    assert _distinct([Path("x/a.png"), Path("y/A.jpg"), Path("z/a-2.png"), Path("grid.png")]) == [
        "a", "A-2", "a-2-2", "grid-2"]  # fmt: skip


def test_attack_refuses_the_folder_of_its_own_images(tmp_path, capsys):
    folder = picture_folder(tmp_path / "p")
    outcome = train_adv.fit(
        "small-cnn", image_folder(folder, size=12), name="f", runs=tmp_path, **{**QUICK, "batch_size": 16}
    )
    before = (folder / "cat" / "0.png").read_bytes()
    call = ["attack", str(outcome.folder), str(folder / "cat"), "--out", str(folder / "cat"), "--steps", "1"]
    assert run(*call, "--device", "cpu") == 2
    assert "would be overwritten" in capsys.readouterr().err and (folder / "cat" / "0.png").read_bytes() == before


def test_pictures_of_16_bits_and_bombs_are_read_rightly(tmp_path, monkeypatch, capsys):
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(levels).save(tmp_path / "deep.png")
    assert decode(tmp_path / "deep.png", 8, 1)[0].tolist() == np.rint(levels / 257).astype(int).tolist()
    outcome = train_adv.fit("small-cnn", digits(), name="d", runs=tmp_path, **QUICK)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert run("predict", str(tmp_path / "deep.png"), "--model", str(outcome.folder), "--device", "cpu") == 2
    said = capsys.readouterr().err
    assert "deep.png" in said and "data.corrupt" not in said


def test_seeds_are_averaged_image_by_image():
    """Differences of (+1, 0, 0, 0) and (-1, -1, 0, 0) are (0, -1/2, 0, 0) in the mean."""
    right = [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 0]]
    one, two, three, four = (torch.tensor(each) > 0 for each in right)
    found = paired_difference([(one, two), (three, four)])
    assert found["pairs"] == [0.25, -0.5] and found["difference"] == pytest.approx(-0.125)
    by_image = np.array([0.0, -0.5, 0.0, 0.0, 1.0, -1.0])  # Bonett and Price's two images more
    half = 1.959964 * by_image.std() / 6**0.5
    assert found["interval"] == pytest.approx((by_image.mean() - half, by_image.mean() + half), rel=1e-4)


def test_fit_leaves_the_process_as_it_was(tmp_path):
    torch.manual_seed(77)
    np.random.seed(77)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(77)
    np.random.seed(77)
    flags = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    settings = {**QUICK, "deterministic": not flags[1], "averaging": {"kind": "ema"}}
    outcome = train_adv.fit("small-cnn", "digits", runs=tmp_path, **settings, **{"data.limit": 200})
    assert torch.equal(torch.rand(3), expected[0]) and (np.random.rand(3) == expected[1]).all()
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == flags
    assert all(parameter.requires_grad for parameter in outcome.model.parameters()) and not outcome.model.training


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data.limit": 100}, "data.limit is for data that are read by name"),
        ({"data.padding": 0}, "data.padding is for data"),
        ({"teacher": "small-cnn", "host": "lbgat"}, "teacher is for models by name"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(settings, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        train_adv.fit(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), digits(), runs=tmp_path,
                      **QUICK, **settings)  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_data_of_another_kind_are_refused_before_anything_is_written(tmp_path):
    images, labels = torch.zeros(40, 3, 8, 8, dtype=torch.uint8), torch.arange(40) % 2
    for given, said in (
        ((images.float(), labels), "float32 .* needed are uint8"),
        ((images[0], labels), r"uint8 \(3, 8, 8\)"),
        ((images.permute(0, 2, 3, 1), labels), "channels last"),
        ((images, labels.int()), "labels are int32"),
        ((images, labels[:30]), r"labels are int64 \(30,\)"),
    ):
        with pytest.raises(UsageError, match=said):
            Resident(*given)
    good = Resident(images, labels)
    for other, said in (
        (Resident(images[:0], labels[:0]), "mine has no test images"),
        (Resident(images[:, :1], labels), "training images of 3x8x8 and test images of 1x8x8"),
        (Resident(images[..., :6], labels), "training images of 3x8x8 and test images of 3x8x6"),
    ):
        with pytest.raises(UsageError, match=said):
            DataSet("mine", ("a", "b"), good, other, Augment())
    for bad in (labels + 1, labels - 1):
        with pytest.raises(UsageError, match=r"test label (2|-1); its 2 classes are 0 to 1"):
            DataSet("mine", ("a", "b"), good, Resident(images, bad), Augment())
    data = DataSet("mine", ("a", "b"), good, good, Augment())
    narrow = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(100, 2))
    for network, said in ((narrow, r"gives \(2, 3\) for 2 images of 2 classes"), (other, "does not take images")):
        with pytest.raises(UsageError, match=said):
            train_adv.fit(network, data, runs=tmp_path, **QUICK)
    with pytest.raises(UsageError, match="data is a TensorDataset"):
        train_adv.fit("small-cnn", torch.utils.data.TensorDataset(images, labels), runs=tmp_path, **QUICK)
    with pytest.raises(UsageError, match=r"topology\.weight"):
        train_adv.fit("small-cnn", data, topology="much", runs=tmp_path, **QUICK)
    assert not list(tmp_path.iterdir())


def test_a_run_of_which_nothing_is_kept_leaves_its_name_free(tmp_path):
    settings = {**QUICK, "name": "a", "runs": tmp_path, "batch_size": 1024}
    with pytest.raises(Diverged, match="train anew"):
        train_adv.fit("small-cnn", digits(), optimizer={"lr": 1e38}, **settings)
    assert train_adv.fit("small-cnn", digits(), **settings).folder == tmp_path / "a"


def test_a_best_epoch_that_is_the_last_is_measured_once(tmp_path, monkeypatch):
    measured, real = [], run_module._Job._accuracies
    monkeypatch.setattr(run_module._Job, "_accuracies", lambda *given: measured.append(given[3]) or real(*given))
    result = train_adv.fit("small-cnn", digits(), runs=tmp_path, **QUICK).result
    assert measured.count(20) == 1 and result["best"] == result["last"] and result["last"]["pgd20"] > 0


def test_equal_answers_have_an_interval_and_odd_radii_and_batches_are_refused():
    low, high = paired_difference([(torch.ones(20) > 0, torch.ones(20) > 0)])["interval"]
    assert low < 0 < high
    with pytest.raises(UsageError, match="finite"):
        check_epsilon(float("inf"), "L2")
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    regularizer = TopologyRegularizer(network, copy.deepcopy(network), layer="1")
    with pytest.raises(UsageError, match="no neighbours"):
        regularizer(torch.rand(1, 1, 2, 2))


def test_a_missing_checkpoint_is_said(tmp_path, capsys):
    assert run("eval", str(tmp_path / "nope"), "--device", "cpu") == 2
    assert "does not exist" in capsys.readouterr().err
