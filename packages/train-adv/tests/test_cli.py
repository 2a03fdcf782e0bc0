"""The command line: figures where promised, one line and exit code 2 on wrong use, a quick --help; the README runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_adv
from expkit.checkpoint import load_tensors, read_metadata, save_tensors
from expkit.cli import main
from train_adv.cli import VERBS, build
from train_adv.images import read_images

README = Path(__file__).parents[1] / "README.md"
QUICK = ["--device", "cpu", "--set", "data.limit=200", "--set", "attack.steps=2", "--set", "validation.fraction=0.2"]
EVIDENCE = {"command", "seed", "versions", "hardware", "git", "started"}


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(build(), list(arguments))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of AT + TRAIN called `one`, and its standard model inside."""
    folder = tmp_path_factory.mktemp("runs")
    arguments = ["train", "--name", "one", "--data", "digits", "--topology-weight", "20", "--epochs", "4"]
    assert run(*arguments, "--runs", str(folder), *QUICK, "--json", str(folder / "one.json")) == 0
    return folder


def test_train_writes_best_and_last(runs):
    result = json.loads((runs / "one.json").read_text())
    assert result.keys() > EVIDENCE and {"natural", "pgd20"} <= result["best"].keys() & result["last"].keys()
    assert (runs / "one" / "reference" / "best.safetensors").is_file()


def test_a_run_is_resumed_by_its_name_alone_as_it_was_begun(runs, tmp_path, capsys):
    shutil.copytree(runs / "one", tmp_path / "one")
    before = load_tensors(tmp_path / "one" / "last.safetensors")
    (tmp_path / "one" / "last.safetensors").unlink()
    call = ["train", "--name", "one", "--runs", str(tmp_path), "--resume"]
    assert run(*call, "--epochs", "5") == 2 and "epochs (4 -> 5)" in capsys.readouterr().err
    assert run(*call) == 0
    after = load_tensors(tmp_path / "one" / "last.safetensors")
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_run_without_a_name_gets_one_that_is_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run("train", "--data", "digits", "--epochs", "1", *QUICK) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["digits-at", "digits-at-2"]


def test_eval_prints_intervals_and_compares(runs, tmp_path, capsys):
    out = tmp_path / "out.json"
    folders = [str(runs / "one"), str(runs / "one" / "reference")]
    assert run("eval", *folders, "--attacks", "natural,fgsm,apgd-ce", "--limit", "30", "--json", str(out)) == 0
    shown = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert shown.startswith("| checkpoint | natural | fgsm | apgd-ce |") and "| reference - one |" in shown
    first = written["rows"][0]["attacks"]["fgsm"]
    assert written.keys() > EVIDENCE and first["images"] == 30 and len(first["per_class"]) == 10
    assert first["interval"][0] <= first["accuracy"] <= first["interval"][1]
    assert written["settings"]["epsilon"] == pytest.approx(0.2)


def test_predict_names_classes_and_bad_files(runs, tmp_path, capsys):
    Image.fromarray(np.full((20, 24), 99, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no")
    model = ["--model", str(runs / "one")]
    assert run("predict", str(tmp_path / "a.png"), *model, "--json", str(tmp_path / "p.json")) == 0
    assert re.match(r".*a\.png: \d \d+\.\d%, ", capsys.readouterr().out)
    assert len(json.loads((tmp_path / "p.json").read_text())["rows"][0]["classes"]) == 3
    assert run("predict", str(tmp_path), *model) == 2
    assert "1 of 2 images cannot be read" in capsys.readouterr().err
    assert run("predict", str(tmp_path), *model, "--corrupt", "skip") == 0
    assert "skipped 1 of 2" in capsys.readouterr().err


def test_attack_writes_images_inside_the_ball(runs, tmp_path, capsys):
    from train_adv.data.load import digits

    out = tmp_path / "adv"
    assert run("attack", str(runs / "one"), "--out", str(out), "--count", "6", "--json", str(tmp_path / "a.json")) == 0
    said = capsys.readouterr().out
    assert Image.open(out / "grid.png").size[0] > 300
    images = digits().test.read(torch.arange(6))
    for index in range(6):
        written = torch.from_numpy(np.array(Image.open(out / f"test-{index:05d}.png")))
        change = (written.int() - images[index, 0].int()).abs().max()
        assert 0 < int(change) <= 0.2 * 255
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    model = train_adv.load(runs / "one")
    with torch.no_grad():
        natural = [str(each) for each in model(images.float() / 255).argmax(1).tolist()]
    assert [row["natural"] for row in rows] == natural and [Path(row["file"]).exists() for row in rows] == 6 * [True]
    assert all(row["broken"] == (row["natural"] == row["label"] != row["adversarial"]) for row in rows)
    wrong = sum(row["natural"] != row["label"] for row in rows)
    assert f"of 6 images {sum(row['broken'] for row in rows)} are misclassified by the attack, {wrong} were" in said
    call = ["attack", str(runs / "one"), "--out", str(tmp_path / "none"), "--epsilon", "0", "--count", "40"]
    assert run(*call) == 0 and "of 40 images 0 are misclassified by the attack" in capsys.readouterr().out
    assert (
        run("attack", str(runs / "one"), str(out / "test-00000.png"), "--out", str(out / "again"), "--target", "3") == 0
    )
    assert run("attack", str(runs / "one"), "--out", str(out), "--target", "cat") == 2
    (tmp_path / "mixed").mkdir()
    shutil.copy(out / "test-00000.png", tmp_path / "mixed" / "a.png")
    (tmp_path / "mixed" / "b.png").write_bytes(b"no")
    call = ["attack", str(runs / "one"), str(tmp_path / "mixed"), "--out", str(tmp_path / "skipped")]
    assert run(*call) == 2 and run(*call, "--corrupt", "skip") == 0
    assert (tmp_path / "skipped" / "a.png").is_file() and not (tmp_path / "skipped" / "b.png").exists()


def test_pictures_are_scaled_to_what_is_no_square_too(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (120, 9, 13, 3), dtype=np.uint8)
    labels = np.arange(120) % 4
    np.savez(tmp_path / "wide.npz", x=pixels, y=labels)
    call = ["--data", f"{tmp_path / 'wide.npz'}#x,y,x,y", "--epochs", "1", "--epsilon", "8/255", "--model", "small-cnn"]
    assert run("train", *call, *QUICK, "--name", "wide", "--runs", str(tmp_path), "--batch-size", "32") == 0
    for index in range(3):
        Image.fromarray(pixels[index]).save(tmp_path / f"{index}.png")
    Image.fromarray(np.repeat(np.repeat(pixels[0], 2, 0), 2, 1)).save(tmp_path / "twice.png")
    model = train_adv.load(tmp_path / "wide")
    _, read = read_images([tmp_path / f"{index}.png" for index in range(3)], model)
    assert torch.equal((read * 255).round().to(torch.uint8), torch.from_numpy(pixels[:3]).permute(0, 3, 1, 2))
    assert read_images([tmp_path / "twice.png"], model)[1].shape == (1, 3, 9, 13)
    assert run("predict", str(tmp_path / "0.png"), "--model", str(tmp_path / "wide")) == 0


def test_topology_measures_against_the_runs_own_reference(runs, tmp_path, capsys):
    out = tmp_path / "t.json"
    arguments = ["topology", str(runs / "one"), "--limit", "80", "--plots", str(tmp_path / "plots")]
    assert run(*arguments, "--json", str(out)) == 0
    standard, one = json.loads(out.read_text())["rows"]
    assert standard["knn_10"] == 1 and standard["name"] == "reference" and one["knn_10"] < 1
    assert len(one["neighbour_confusion"]) == 10 and one["l_topo"] > standard["l_topo"]
    for name in ("metrics", "tsne", "confusion"):
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 10_000
    assert "| one |" in capsys.readouterr().out


def test_demo_has_the_promised_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("demo", "--seeds", "2", "--epochs", "1", "--steps", "2", "--json", "out.json") == 0
    rows = json.loads(Path("out.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["at", "at+train"]
    assert all({"seeds", "natural", "pgd20"} <= row.keys() and row["seeds"] == [0, 1] for row in rows)
    for name in ("accuracy", "neighbourhoods"):
        assert (Path("train-adv-demo") / f"{name}.png").stat().st_size > 10_000
    assert "TRAIN: natural" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--epsilon", "8"], "was 8/255 meant?"),
        (["train", "--epsilon", "a/b"], "8/255"),
        (["train", "--host", "trade"], "'trades'"),
        (["train", "--set", "topology.wieght=1"], 'did you mean "topology.weight"'),
        (["train", "--set", "epochs"], "KEY=VALUE"),
        (["train", "--data", "nowhere"], "nowhere"),
        (["train", "--batch-size", "1"], "no neighbours"),
        (["train", "--config", "missing.toml"], "missing.toml"),
        (["train", "--device", "cuda:99"], "cuda:99"),
        (["train", "--name", "one", "--runs", "RUNS"], "exists already"),
        (["train", "--name", "two", "--runs", "RUNS", "--resume"], "nothing to resume"),
        (["eval", "RUNS/one", "--attacks", "pgd"], "pgd20"),
        (["eval", "RUNS/none"], "RUNS/none"),
        (["eval", "RUNS/one", "--data", "FOLDER"], "classes"),
        (["predict", "nothing.png", "--model", "RUNS/one"], "nothing.png"),
        (["topology", "RUNS/one/reference"], "--reference"),
        (["demo", "--epsilon", "8"], "8/255"),
        (["attack", "RUNS/one", "--norm", "L7"], "L7"),
        (["train", "--set", "batch_size=1"], "no neighbours"),
        (["train", "--set", "optimizer.nesterov=true", "--set", "optimizer.momentum=0.0"], "nesterov"),
        (["train", "--set", "averaging.batches=0"], "averaging.batches is 0"),
        (["train", "--set", "attack.step_size=nan"], "attack.step_size is nan"),
        (["train", "--set", "topology.temperature=0.0"], "topology.temperature"),
        (["train", "--set", "validation.fraction=1.5"], "validation.fraction"),
        (["train", "--set", "guard.patience=0"], "guard.patience"),
        (["train", "--host", "n-fgsm", "--set", "attack.norm='L2'", "--epsilon", "1"], "Linf only"),
        (["train", "--data", "EMPTY"], "0 training"),
        (["train", "--data", "cifar10", "--data-dir", "nowhere"], "nowhere does not exist"),
        (["train", "--data", "digits", "--json", "EMPTY"], "EMPTY is a folder"),
        (["train", "--data", "digits", "--runs", "TEXT"], "TEXT is a file"),
        (["eval", "RUNS/one", "--attacks", ","], "no attack"),
        (["eval", "RUNS/one", "--work", "TEXT"], "TEXT is a file"),
        (["eval", "TEXT", "--data", "digits", "--epsilon", "0.1"], "is no checkpoint"),
        (["eval", "EMPTY"], "holds no best.safetensors"),
        (["eval", "DAMAGED", "--data", "digits", "--epsilon", "0.1"], "not a readable safetensors file"),
        (["predict", "EMPTY", "--model", "RUNS/one"], "no images"),
        (["predict", "TEXT", "--model", "RUNS/one"], "1 of 1 images cannot be read"),
        (["attack", "RUNS/one", "--out", "TEXT/a"], "TEXT is a file"),
        (["topology", "RUNS/one", "--limit", "3"], "too few"),
        (["demo", "--json", "EMPTY"], "EMPTY is a folder"),
        (["demo", "--json", "PIPE"], "PIPE is no plain file"),
        (["train", "--data", "digits", "--set", "attack.norm='L2'"], "attack.epsilon is needed with norm L2"),
        (["eval", "RUNS/one", "--norm", "L2"], "give --epsilon with --norm L2"),
        (["train", "--topology-weight", "1", "--batch-size", "2"], "needs 3 samples"),
        (["train", "--topology-weight", "1", "--set", "topology.neighbours=1"], "use 2 or more"),
        (["train", "--topology-ratio", "0.3", "--set", "topology.reference='ema'"], "needs a standard model"),
        (["attack", "RUNS/one", "TEXT", "--corrupt", "ask"], "use refuse or skip"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments, said, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / f"{index}.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no model, no image")
    put = {"RUNS": str(runs), "FOLDER": str(tmp_path / "images"), "EMPTY": str(tmp_path / "empty")}
    put |= {"TEXT": str(tmp_path / "text.txt"), "PIPE": str(tmp_path / "pipe")}
    os.mkfifo(put["PIPE"])
    (tmp_path / "damaged.safetensors").write_text("no model")
    put["DAMAGED"] = str(tmp_path / "damaged.safetensors")

    def fill(text: str) -> str:
        for key, value in put.items():
            text = text.replace(key, value)
        return text

    assert run(*map(fill, arguments)) == 2
    error = capsys.readouterr().err.strip()
    lines = [line for line in error.splitlines() if not line.startswith(("decoding", "checking"))]
    assert len(lines) == 1 and lines[0].startswith("error: ") and fill(said) in lines[0]
    assert not list(tmp_path.glob("runs/*"))  # nothing half-written, and the name is free


def test_what_is_set_is_not_hidden_by_flags_left_out(tmp_path):
    arguments = ["train", "--name", "a", "--data", "digits", *QUICK, "--set", "epochs=1", "--set", "batch_size=16"]
    assert run(*arguments, "--runs", str(tmp_path)) == 0
    text = (tmp_path / "a" / "config.toml").read_text()
    assert "epochs = 1\n" in text and "batch_size = 16\n" in text


def test_few_classes_are_said_where_a_targeted_loss_needs_more(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images, labels = np.random.default_rng(0).integers(0, 255, (60, 8, 8), np.uint8), np.arange(60) % 2
    np.savez("two.npz", x=images, y=labels)
    quick = ["--device", "cpu", "--set", "attack.steps=1", "--set", "validation.fraction=0.2", "--batch-size", "16"]
    made = ["train", "--name", "two", "--data", "two.npz#x,y,x,y", "--model", "small-cnn", "--epochs", "1", *quick]
    assert run(*made) == 0
    for words in (["eval", "--attacks", "autoattack"], ["eval", "--attacks", "apgd"], ["attack", "--loss", "dlr"]):
        capsys.readouterr()
        assert run(words[0], "runs/two", *words[1:], "--device", "cpu") == 2
        assert "classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [({"mean": "x"}, "damaged"), ({"class_names": 3}, "damaged"), ({"mean": [0.1, 0.2]}, "damaged"),
     ({"name": "resnet18"}, "another architecture"), (None, "names no model")],
)  # fmt: skip
def test_a_checkpoint_of_another_model_or_of_none_is_said(change, said, runs, tmp_path, capsys):
    source = runs / "one" / "best.safetensors"
    metadata = read_metadata(source)
    spec = json.loads(metadata.pop("model"))
    if change is not None:
        metadata["model"] = json.dumps({**spec, **change})
    save_tensors(tmp_path / "m.safetensors", load_tensors(source), metadata)
    made = ["eval", str(tmp_path / "m.safetensors"), "--data", "digits", "--epsilon", "0.1", "--device", "cpu"]
    assert run(*made) == 2
    assert said in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_keeps_what_was(runs, tmp_path, monkeypatch, capsys):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("expkit.checkpoint.save_file", full)
    assert run("train", "--name", "full", "--runs", str(tmp_path), "--data", "digits", "--epochs", "1", *QUICK) == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "full" / "best.safetensors").exists()


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_answers_without_torch(verb):
    script = "import sys; sys.argv = ['train-adv', *sys.argv[1:]]; import train_adv.cli as c\n"
    script += "try: c.main()\nexcept SystemExit as e: assert not e.code and 'torch' not in sys.modules"
    command = [sys.executable, "-c", script, *([verb] if verb else []), "--help"]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0 and "Usage" in done.stdout, done.stderr
    assert time.monotonic() - begun < 10


def test_readme_commands_and_python_run(runs, tmp_path, monkeypatch, capsys):
    """Every command of the README but the installation, shortened where it would take long."""
    monkeypatch.chdir(tmp_path)
    blocks = README.read_text(encoding="utf-8").split("```")[1::2]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("train-adv ")]
    assert len(lines) >= 7 and {shlex.split(line)[1] for line in lines} == set(VERBS)
    Image.fromarray(np.full((8, 8), 99, np.uint8)).save("photo.png")
    config = next(block for block in blocks if block.startswith("toml")).removeprefix("toml")
    Path("robust.toml").write_text(config)
    short = {
        "train": ["--data", "digits", "--epochs", "1", "--batch-size", "32", "--set", "model='small-cnn'", *QUICK],
        "eval": ["--limit", "10", "--attacks", "natural,pgd20"],
        "demo": ["--seeds", "1", "--epochs", "1"],
        "topology": ["--limit", "60"],
    }
    for line in lines:
        words = shlex.split(line)[1:]
        assert run(*words, *short.get(words[0], [])) == 0, (line, capsys.readouterr().err)
    for block in blocks:
        if block.startswith("python"):
            exec(compile(block.removeprefix("python"), "README.md", "exec"), {})
