"""The command line: what it writes, one line and exit code 2 on wrong use, resume after a kill, a quick --help."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pden
from expkit.checkpoint import load_tensors
from expkit.cli import main
from expkit.errors import UsageError
from pden.cli import build
from pden.training.trainer import Trainer

SHORT = [
    "--set",
    "pretrain_steps=20",
    "--set",
    "round_steps=8",
    "--set",
    "gate.judge_steps=4",
    "--set",
    "gate.mode=record",
]
TINY = ["train", "--preset", "tiny", *SHORT]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(build(), [str(each) for each in arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the embedded digits."""
    folder = tmp_path_factory.mktemp("trained")
    assert (
        run(*TINY, "--source", "digits", "--target", "digits-thick", "--runs", folder, "--json", folder / "out.json")
        == 0
    )
    return folder / "tiny"


def test_train_leaves_model_figures_and_pictures(trained):
    result = json.loads((trained.parent / "out.json").read_text())
    assert {"command", "seed", "versions", "hardware", "git", "started"} < result.keys()
    assert set(result["selections"]) == {"last", "averaged", "source-validation", "oracle"}
    assert 0 < result["selections"]["last"]["targets"]["digits-thick"] <= 1
    assert [each["round"] for each in result["history"]] == [0, 1, 2]
    assert len(result["reports"]) == result["domains"] == 2
    assert result == json.loads((trained / "result.json").read_text())
    for name in ("curve.png", "gallery.png"):
        with Image.open(trained / name) as picture:
            assert min(picture.size) > 100
    assert {"config.toml", "env.json", "metrics.jsonl", "checkpoints", "model"} <= {
        each.name for each in trained.iterdir()
    }


def test_load_gives_model_and_transforms(trained):
    found = pden.load(trained)
    assert len(found.generators) == 2 and found.classes == tuple("0123456789")
    images = pden.load_domain("digits", pden.Home.of()).images[:8]
    labels, probabilities = found.predict(images)
    assert labels.shape == (8,) and ((0 < probabilities) & (probabilities <= 1)).all()
    assert torch.equal(labels, found.predict(images[:, :1])[0])  # grey is copied to colour
    assert found.generators[0](images[0]).dtype == torch.uint8
    assert found.predict(images[:, :, :16])[0].shape == (8,)  # resized, as a file is
    for odd, said in ((images.numpy(), "takes a tensor"), (images[0], "a tensor")):
        with pytest.raises(UsageError, match=said):
            found.predict(odd)
    averaged = pden.load(trained, "averaged")
    assert not torch.equal(averaged.predict(images)[1], probabilities)


def test_eval_measures_the_same_as_training(trained, tmp_path, capsys):
    out = tmp_path / "eval.json"
    assert run("eval", trained, "--target", "digits-thick", "--selection", "all", "--json", out) == 0
    found = json.loads(out.read_text())["selections"]
    trained_on = json.loads((trained / "result.json").read_text())["selections"]
    for name in ("last", "averaged", "source-validation"):
        value = found[name]["targets"]["digits-thick"]["accuracy"]
        assert value == pytest.approx(trained_on[name]["targets"]["digits-thick"], abs=1e-6)
    assert "last  average" in capsys.readouterr().out


def test_images_that_are_not_square_are_one_thing_to_train_eval_and_predict(tmp_path, capsys):
    for split, seed in (("source", 0), ("target", 1)):
        rng = np.random.default_rng(seed)
        for number in range(40):
            place = tmp_path / split / "ab"[number % 2] / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 60, (48, 32, 3), dtype=np.uint8)
            pixels[:, :8] += np.uint8(180 * (number % 2))  # a bar on the left, or none
            pixels[:8] += np.uint8(120 * (1 - number % 2))
            Image.fromarray(pixels).save(place)
    call = [*TINY, "--source", tmp_path / "source", "--target", tmp_path / "target", "--runs", tmp_path / "runs"]
    call += ["--set", "data.size=0", "--set", "model.name=wrn-10-1", "--set", 'generator.kinds=["photometric"]']
    assert run(*call, "--set", "pretrain_steps=30", "--set", "pretrain_batch=16", "--set", "batch=8") == 0
    result = json.loads((tmp_path / "runs" / "tiny" / "result.json").read_text())
    assert run("eval", tmp_path / "runs" / "tiny", "--target", tmp_path / "target", "--json", tmp_path / "e.json") == 0
    found = json.loads((tmp_path / "e.json").read_text())["selections"]["last"]["targets"]["target"]
    assert found["accuracy"] == pytest.approx(result["selections"]["last"]["targets"]["target"])
    model = pden.load(tmp_path / "runs" / "tiny")
    assert model.shape == (48, 32)
    domain = pden.load_domain(str(tmp_path / "target"), pden.Home.of(), size=0)
    labels, _ = model.predict(domain.images)
    assert float((labels == domain.labels).float().mean()) == pytest.approx(found["accuracy"])
    assert run("predict", tmp_path / "runs" / "tiny", tmp_path / "target", "--json", tmp_path / "p.json") == 0
    rows = json.loads((tmp_path / "p.json").read_text())["predictions"]
    assert sum(each["label"] == Path(each["image"]).parent.name for each in rows) == round(40 * found["accuracy"])


def test_a_class_that_a_target_lacks_is_said(trained, tmp_path, capsys):
    file = tmp_path / "few.npz"
    np.savez(file, x=np.zeros((4, 28, 28), dtype=np.uint8), y=np.array([0, 1, 2, 3]))
    assert run("eval", trained, "--target", f"few={file}#x,y") == 0
    assert "few has no image of 4, 5, 6, 7, 8, 9: scored on the other classes" in capsys.readouterr().err


def test_gallery_is_a_picture(trained, tmp_path):
    assert run("gallery", trained, "--out", tmp_path / "g.png", "--columns", 5) == 0
    with Image.open(tmp_path / "g.png") as picture:
        assert picture.width > 300 and picture.height > 150


def test_expand_writes_a_folder_that_train_reads(trained, tmp_path, capsys):
    out = tmp_path / "expanded"
    assert run("expand", trained, "--out", out, "--limit", 40) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert len(manifest["images"]) == 80 and len(manifest["domains"]) == 2
    assert all((out / each["file"]).is_file() for each in manifest["images"])
    domain = pden.load_domain(str(out / "domain-02"), pden.Home.of())
    assert len(domain) == 40 and domain.classes == tuple("0123456789")
    assert max(each["source"] for each in manifest["images"]) > 40  # evenly over the source
    assert run("expand", trained, "--out", out) == 2
    assert "exists already" in capsys.readouterr().err


def test_predict_says_a_label_for_each_image(trained, tmp_path, capsys):
    for number in range(3):
        Image.new("L" if number else "RGB", (20 + number, 40), 100).save(tmp_path / f"{number}.png")
    assert run("predict", trained, tmp_path, tmp_path / "0.png", "--json", tmp_path / "p.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].split("\t")[1] in "0123456789"
    assert len(json.loads((tmp_path / "p.json").read_text())["predictions"]) == 4


def test_seeds_start_their_own_processes_not_torchruns(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(*TINY, "--runs", tmp_path, "--target", "digits-thick", "--seeds", "0,1") == 2
    assert "call it without torchrun" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_seeds_are_processes_and_compare_makes_one_row_of_them(tmp_path, capsys):
    options = ["--target", "digits-thick", "--runs", tmp_path / "runs", "--rounds", 1, "--method", "erm"]
    call = [*TINY, *options, "--set", "data.target_every=0", "--name", "erm", "--seeds", "0,1", "--jobs", 2]
    assert run(*call, "--json", tmp_path / "s.json") == 0
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["seeds"] == [0, 1] and found["selections"]["last"]["digits-thick"]["std"] > 0
    told = "selection: last; average over 1 target; seeds: erm [0, 1]"
    assert told in found["table"] and told in capsys.readouterr().out
    outs = [tmp_path / f"table{suffix}" for suffix in (".md", ".csv", ".tex")]
    written = [word for out in outs for word in ("--out", out)]
    runs = sorted((tmp_path / "runs").iterdir())
    for file in (each / name for each in runs for name in ("result.json", "env.json")):
        assert json.loads(file.read_text())["command"] == found["command"]
    assert run("compare", *runs, *written, "--plot", tmp_path / "c.png", "--json", tmp_path / "c.json") == 0
    assert all(out.read_text() for out in outs) and (tmp_path / "c.png").is_file()
    assert json.loads((tmp_path / "c.json").read_text())["methods"]["erm"]["seeds"] == [0, 1]
    assert told in capsys.readouterr().out
    assert all(told in out.read_text() for out in outs if out.suffix != ".csv")
    assert all(line.endswith(",last,2") for line in (tmp_path / "table.csv").read_text().splitlines()[1:])
    assert run("compare", *runs, runs[0]) == 2 and "seed 0 is there more than once" in capsys.readouterr().err
    assert run(*call) == 0  # what is there is kept
    assert run(*call, "--set", "optimizer.lr=0.5") == 2 and "changed config: optimizer.lr" in capsys.readouterr().err
    assert run(*call, "--source", "nope", "--name", "n", "--seeds", "0,") == 2
    assert "1 of 1 runs refused what they were given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--preset", "huge"], 'unknown preset "huge"'),
        (["train", "--config", "missing.toml"], "missing.toml"),
        (["train", "--preset", "tiny", "--config", "x.toml"], "not both"),
        (["train", "--set", "loss.cicle=1"], 'did you mean "loss.cycle"'),
        (["train", "--set", "rounds"], "KEY=VALUE"),
        (["train", "--rounds", "-1"], "rounds is -1"),
        (["train", "--set", "optimizer.weight_decay=-1.0"], "optimizer.weight_decay is -1.0"),
        (["train", "--set", "optimizer.momentum=1.0"], "optimizer.momentum is 1.0"),
        (["train", "--set", "optimizer.lr=nan"], "optimizer.lr is nan"),
        (["train", "--set", "gate.judge_lr=0.0"], "gate.judge_lr is 0.0"),
        (["train", "--set", "averaging.from_round=0"], "averaging.from_round is 0"),
        (["train", "--set", "stop.patience=-1"], "stop.patience is -1"),
        (["train", "--set", "data.disguised=-1"], "data.disguised is -1"),
        (["train", "--set", "generator.grid=-1"], "generator.grid must be 0 or more"),
        (["train", "--set", "generator.grid_share=0.5"], "is a share of a generator.grid"),
        (["train", "--set", "generator.grid_share=0"], "generator.grid_share is 0.0; it must be in (0, 1]"),
        (["train", "--set", "generator.grid=100000"], "generator.grid is 100000 on images of 32x32"),
        (["train", "--set", "generator.grid=4", "--set", 'generator.kinds=["geometric"]'], "for photometric domains"),
        (["train", "--method", "magic"], "'magic' is not one of"),
        (["train", "--preset", "tiny", "--source", "mnist_m"], 'did you mean "mnist-m"'),
        (["train", "--preset", "tiny", "--target", "digits"], 'target "digits" is the source'),
        (["train", "--preset", "tiny", "--seeds", "many", "--target", "usps"], "write a count"),
        (["train", "--preset", "tiny", "--seeds", "2"], "name at least one with --target"),
        (["train", "--preset", "tiny", "--dtype", "fp16"], "float16 is not supported"),
        (["train", "--preset", "tiny", "--source", "a.npz"], "write FILE.npz#x_key,y_key"),
        (["eval", "nowhere", "--target", "usps"], "no trained model"),
        (["eval", "nowhere"], "--target"),
        (["predict", "nowhere", "none.png"], "no trained model"),
        (["gallery", "nowhere"], "no trained model"),
        (["compare", "nowhere"], "no finished run"),
        (["train", "--nonsense"], "--nonsense"),
        (["train", "--preset", "tiny", "--data-dir", "nowhere"], "nowhere"),
        (["train", "--preset", "tiny", "--json", "."], "is a directory"),
        (["train", "--preset", "tiny", "--runs", "file"], "is a file"),
        (["demo", "--out", "file"], "is a file"),
        (["compare", "odd.json"], "holds no figures of a run"),
        (["train", "--set", "loss.cycle=nan"], "loss weights must be numbers"),
        (["train", "--set", "optimizer.lr=inf"], "optimizer.lr is inf"),
        (["train", "--set", "gate.mode=off", "--set", "stop.patience=1"], "stop.patience counts what the gate"),
        (["train", "--preset", "tiny", "--source", "odd.npz#wide,y"], "images of 32x46"),
        (["train", "--preset", "tiny", "--source", "odd.npz#words,y"], "images of <U1"),
        (["train", "--preset", "tiny", "--seeds", "0,99999999999", "--target", "usps"], "below 2**31"),
        (["gallery", "nowhere", "--out", "g.jpg"], "ends in .png"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    wide, labels = np.zeros((20, 20, 29), np.uint8), np.arange(20) % 2
    np.savez(tmp_path / "odd.npz", wide=wide, words=np.full((20, 4, 4), "a"), y=labels)
    (tmp_path / "odd.json").write_text('{"selections": {"last": {"targets": {}, "average": 0}}}')
    assert run(*arguments) == 2
    message = capsys.readouterr().err.strip()
    assert said in message and "Traceback" not in message
    assert message.count("\n") == 0
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


def test_averages_over_other_targets_are_left_out(trained, tmp_path, capsys):
    assert run(*TINY, "--runs", tmp_path, "--name", "o", "--method", "erm", "--target", "digits-inverted") == 0
    capsys.readouterr()
    assert run("compare", trained, tmp_path / "o", "--plot", tmp_path / "c.png") == 0
    said = capsys.readouterr().out
    assert "averages compare nothing" in said and "| - |" in said.splitlines()[-4]


def test_compare_says_where_runs_were_trained_on_and_what_their_figures_want_known(tmp_path, capsys):
    for name, source in (("a", "digits"), ("b", "digits-thick")):
        call = [*TINY, "--runs", tmp_path, "--name", name, "--source", source, "--target", "syn-like", "--rounds", 0]
        assert run(*call, "--set", "pretrain_steps=2") == 0
    assert "note: digits rendered from fonts, a stand-in for SYN" in capsys.readouterr().err
    out = tmp_path / "c.json"
    assert run("compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c.md", "--json", out) == 0
    said = capsys.readouterr().out
    assert "trained on other sources: a on digits, b on digits-thick" in said
    assert said.count("a stand-in for SYN") == 1
    assert set(said.splitlines()) == set((tmp_path / "c.md").read_text().splitlines())
    assert any("a stand-in for SYN" in note for note in json.loads(out.read_text())["notes"])


def test_the_source_cannot_hold_itself_out(tmp_path, capsys):
    assert run(*TINY, "--runs", tmp_path, "--source", "digits", "--set", "data.validation=digits") == 2
    assert "data.validation is the source itself" in capsys.readouterr().err
    source = pden.load_domain("digits", pden.Home.of())
    np.savez(tmp_path / "d.npz", x=source.images[:200].numpy(), y=source.labels[:200].numpy(),
             held=source.images[:50].numpy(), its=source.labels[:50].numpy())  # fmt: skip
    held = f'data.validation="{tmp_path}/d.npz#held,its"'
    call = [*TINY, "--runs", tmp_path, "--source", f"{tmp_path}/d.npz#x,y", "--rounds", 0, "--set", "pretrain_steps=2"]
    assert run(*call, "--set", held) == 2
    assert "all 50 images of held are among those that are trained or held out" in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()


def test_an_early_stop_and_a_collapse_without_a_gate_are_said(tmp_path, capsys):
    call = [*TINY, "--runs", tmp_path]
    assert run(*call, "--rounds", 3, "--set", "stop.patience=1", "--set", "stop.novelty=2.0") == 0
    assert "stopped after round 2 of 3: 1 round(s) in a row brought nothing new" in capsys.readouterr().err
    assert json.loads((tmp_path / "tiny" / "result.json").read_text())["stopped"] is True
    off = ["--set", "gate.mode=off", "--set", "gate.collapse=1.0", "--name", "off"]
    assert run(*call, *off) == 0
    said = capsys.readouterr().err
    assert "warning: round 1: the generator has collapsed" in said and "warning: round 2: the gen" in said
    assert json.loads((tmp_path / "off" / "result.json").read_text())["stopped"] is False


def test_targets_that_are_measured_at_the_end_alone_are_measured_of_what_the_source_chose_too(tmp_path, monkeypatch):
    select = Trainer._select
    monkeypatch.setattr(Trainer, "_select", lambda trainer, number: select(trainer, number) if number < 2 else None)
    call = [*TINY, "--runs", tmp_path, "--target", "digits-thick", "--set", "data.target_every=0"]
    assert run(*call, "--set", "pretrain_steps=60") == 0
    found = json.loads((tmp_path / "tiny" / "result.json").read_text())["selections"]
    assert found["source-validation"]["round"] < 2 == found["last"]["round"]
    assert run("eval", tmp_path / "tiny", "--target", "digits-thick", "--selection", "source-validation", "--json",
               tmp_path / "e.json") == 0  # fmt: skip
    value = json.loads((tmp_path / "e.json").read_text())["selections"]["source-validation"]["average"]
    assert value == pytest.approx(found["source-validation"]["average"])
    assert "oracle" not in found


def test_a_run_of_which_nothing_is_kept_leaves_its_name_free(tmp_path, capsys):
    call = [*TINY, "--runs", tmp_path, "--name", "a"]
    assert run(*call, "--set", "optimizer.lr=1e30") == 2 and "train anew" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_baseline_that_cannot_grow_says_so(tmp_path, capsys):
    assert run(*TINY, "--runs", tmp_path, "--method", "ada") == 0
    assert "adds images at steps 100, 200, 300, and this run ends after" in capsys.readouterr().err


def test_what_selection_has_seen_is_no_target(tmp_path, capsys):
    held = ["--set", "data.validation=digits-test", "--set", "pretrain_steps=4"]
    domain = pden.load_domain("digits", pden.Home.of())
    images = domain.images[:30].numpy()
    np.savez(tmp_path / "same.npz", x=images, y=np.arange(30) % 10)
    assert run(*TINY, *held, "--runs", tmp_path, "--target", f"same={tmp_path}/same.npz#x,y") == 2
    assert "all 30 images of same are among those that are trained or held out" in capsys.readouterr().err
    np.savez(tmp_path / "half.npz", x=np.concatenate([images, 255 - images]), y=np.arange(60) % 10)
    assert run(*TINY, *held, "--runs", tmp_path, "--target", f"half={tmp_path}/half.npz#x,y") == 0
    assert "30 of 60 images of half are among those that are trained or held out" in capsys.readouterr().err
    assert run("eval", tmp_path / "tiny", "--target", "digits-test") == 2
    assert 'target "digits-test" is the validation domain' in capsys.readouterr().err


def test_predict_reads_what_expand_writes(trained, tmp_path, capsys):
    assert run("expand", trained, "--out", tmp_path / "out", "--limit", 20) == 0
    capsys.readouterr()
    assert run("predict", trained, tmp_path / "out") == 0
    assert len(capsys.readouterr().out.splitlines()) == len(list((tmp_path / "out").rglob("*.png"))) > 0


def test_set_takes_keys_that_have_a_flag_too_and_the_flag_wins(tmp_path, capsys):
    keys = ["--set", "rounds=0", "--set", "name=other", "--set", 'data.targets=["digits-thick"]', "--set", "seed=7"]
    assert run(*TINY, "--runs", tmp_path, *keys, "--name", "mine") == 0
    result = json.loads((tmp_path / "mine" / "result.json").read_text())
    assert list(result["selections"]["last"]["targets"]) == ["digits-thick"]
    assert result["seed"] == 7 and result["domains"] == 0


def test_a_run_is_not_overwritten(trained, capsys):
    assert run(*TINY, "--runs", trained.parent) == 2
    assert "exists already" in capsys.readouterr().err


def test_no_rounds_are_said_to_be_erm(tmp_path, capsys):
    assert run(*TINY, "--rounds", 0, "--runs", tmp_path) == 0
    assert "this is plain training on the source (ERM)" in capsys.readouterr().err
    assert run("gallery", tmp_path / "tiny") == 2
    assert "no expanded domains" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_model(trained, tmp_path):
    options = ["--source", "digits", "--target", "digits-thick", "--runs", str(tmp_path)]
    settings = ["--set", "checkpoint_every=5"]
    command = [sys.executable, "-m", "pden", *TINY, *options, *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "tiny" / "checkpoints").glob("step_*25"))) == 0 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "tiny" / "result.json").exists()
    assert run("train", "--name", "tiny", "--runs", tmp_path, "--resume", "--rounds", 3) == 2
    assert run("train", "--name", "tiny", "--runs", tmp_path, "--resume") == 0  # its own settings
    again, whole = (
        load_tensors(folder / "tiny" / "model" / "last.safetensors") for folder in (tmp_path, trained.parent)
    )
    assert all(torch.equal(again[key], value) for key, value in whole.items())
    assert run(*TINY, *options, *settings, "--name", "whole") == 0

    def losses(name: str) -> list[dict[str, float]]:
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key not in ("seconds", "time")} for line in lines]

    assert losses("tiny") == losses("whole")  # means over the same steps, each once
