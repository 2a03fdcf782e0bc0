"""The study: what is chosen is chosen on training images, leases fit, and what was done is not done again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch

from study_figures import result

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_sweeps_see_no_test_image(modules):
    study, _, _ = modules
    from train_adv.data.load import digits

    data = digits()
    cut, again = study.tuning_split(data), study.tuning_split(data)

    def bags(split):
        return {image.numpy().tobytes() for image in split.images}

    assert torch.equal(cut.test.images, again.test.images)
    assert len(cut.train) + len(cut.test) == len(data.train) and len(cut.test) == round(0.1 * len(data.train))
    assert not bags(cut.test) & bags(data.test) and not bags(cut.test) & bags(cut.train)
    assert bags(cut.test) <= bags(data.train)


def test_every_sweep_is_judged_on_held_out_training_images_and_nothing_else_is(start):
    for part, arms in start.items():
        assert all(arm.tuning == (part in ("rate", "lambda", "beta", "joint", "inputs", "edges")) for arm in arms), part


def test_the_choice_is_the_best_of_those_that_cost_no_robustness(modules):
    _, _, report = modules
    results = [
        result("tune-at-rate-0.2", 0.80, 0.480, rate=0.2),
        result("tune-at-rate-0.05", 0.79, 0.485, rate=0.05),
        result("edge-at-rate-0.4", 0.95, 0.5, rate=0.4),  # looked at only
        result("tune-trades-rate-0.1", 0.90, 0.490),
        result("tune-at-rate-0.2-cosine-100", 0.83, 0.478, 100.0, rate=0.2),
        result("tune-at-rate-0.2-cosine-300", 0.86, 0.474, 300.0, rate=0.2),
        result("tune-at-rate-0.1-cosine-30", 0.90, 0.490, 30.0, rate=0.1),  # of another rate
        {"arm": "tune-at-rate-0.2-cosine-10", "evaluation": {}, "config": {}, "failed": "the loss is not a number"},
        result("tune-at-rate-0.2-softmax-cosine-0.1", 0.82, 0.482, 0.1, "softmax-cosine", 0.2),
        result("at+train", 0.99, 0.99, 7.0),  # judged on test images: must not be looked at
    ]
    assert report.choose(results, "at") == report.Choice(0.2, "cosine", 100.0)
    assert report.choose([], "at") == report.START
    assert report.choose(results[1:2], "at") == report.Choice(0.05, report.START.kernel, report.START.weight)
    assert report.choose([results[0], results[5]], "at") == report.Choice(0.2, "cosine", 300.0)


def test_beta_is_tuned_for_trades_by_the_rule_that_tunes_lambda_for_train(modules):
    _, arms, report = modules
    results = [
        result("tune-trades-rate-0.2", 0.74, 0.431, rate=0.2),
        result("tune-trades-rate-0.2-beta-2", 0.81, 0.415, rate=0.2, beta=2.0),
        result("tune-trades-rate-0.2-beta-3", 0.79, 0.432, rate=0.2, beta=3.0),
        result("tune-trades-rate-0.2-cosine-30", 0.90, 0.5, 30.0, rate=0.2),  # at 6
    ]
    start = report.START
    assert report.choose(results, "trades") == report.Choice(0.2, start.kernel, start.weight, 3.0)
    results.append(result("tune-trades-rate-0.2-beta-3-cosine-10", 0.80, 0.433, 10.0, rate=0.2, beta=3.0))
    assert report.choose(results, "trades") == report.Choice(0.2, "cosine", 10.0, 3.0)
    assert report.choose([results[0], results[3]], "trades") == report.Choice(0.2, "cosine", 30.0, 6.0)
    chosen = report.choose(results, "trades")
    names = {arm.name for arm in arms.parts(start, chosen, start, start)["joint"]}
    assert "tune-trades-rate-0.2-beta-3-cosine-10" in names
    assert not arms.parts(start, report.choose(results[:1], "trades"), start, start)["joint"]  # lambda has them


def test_inputs_are_chosen_with_lambda_and_name_the_arms_that_have_them(modules):
    _, arms, report = modules
    results = [
        result("tune-at-rate-0.2", 0.74, 0.434, rate=0.2),
        result("tune-at-rate-0.2-cosine-100", 0.79, 0.432, 100.0, rate=0.2),
        result("tune-at-rate-0.2-cosine-300-both", 0.80, 0.433, 300.0, rate=0.2),
    ]
    others = [report.START] * 3
    before = {arm.name for part in arms.parts(report.choose(results[:2], "at"), *others).values() for arm in part}
    results[2]["config"]["topology.inputs"] = "both"
    at = report.choose(results, "at")
    assert at == report.Choice(0.2, "cosine", 300.0, None, "both")
    found = arms.parts(at, *others)
    names = {arm.name for part in found.values() for arm in part}
    assert {"at+train-both", "tune-at-rate-0.2-cosine-300-both"} <= names
    swept = {name for name in before if name.startswith(("tune", "edge", "speed"))}
    assert swept <= names  # the sweeps stay as they were, or they would be run again
    (arm,) = (arm for arm in found["main"] if arm.name == "at+train-both")
    assert arm.settings["topology.inputs"] == "both"


def test_trades_at_its_customary_beta_and_a_careful_lambda_are_reported_beside_what_is_chosen(modules):
    _, arms, report = modules
    results = [
        result("tune-trades-rate-0.2", 0.74, 0.431, rate=0.2),
        result("tune-trades-rate-0.2-cosine-30", 0.77, 0.429, 30.0, rate=0.2),
        result("tune-trades-rate-0.2-beta-3", 0.79, 0.432, rate=0.2, beta=3.0),
        result("tune-trades-rate-0.2-beta-3-cosine-10", 0.80, 0.433, 10.0, rate=0.2, beta=3.0),
        result("tune-at-rate-0.2", 0.74, 0.434, rate=0.2),
        result("tune-at-rate-0.2-cosine-100", 0.79, 0.432, 100.0, rate=0.2),
        result("tune-at-rate-0.2-cosine-30", 0.76, 0.439, 30.0, rate=0.2),
    ]
    at, trades = report.choose(results, "at"), report.choose(results, "trades")
    customary, careful = report.choose(results, "trades", beta=6.0), report.choose(results, "at", tolerance=0.0)
    assert customary == report.Choice(0.2, "cosine", 30.0, 6.0) and careful == report.Choice(0.2, "cosine", 30.0)
    found = arms.parts(at, trades, customary, careful)
    assert [arm.name for arm in found["customary"]] == ["trades-6", "trades-6+train"]
    assert [arm.settings["beta"] for arm in found["customary"]] == [6.0, 6.0]
    assert [arm.name for arm in found["careful"]] == ["at+train-30"]
    none = arms.parts(careful, customary, customary, careful)
    assert not none["customary"] and not none["careful"]  # main has them


def test_leases_fit_and_hold_every_arm_once(modules, start):
    _, arms, _ = modules
    jobs = [arms.Job(arm, 0, arms.Costs().of(arm), part) for part, found in start.items() for arm in found]
    found = list(arms.leases(jobs, 24 * 60))
    assert sorted(id(job) for lease in found for job in lease) == sorted(id(job) for job in jobs)
    assert all(arms.cost(lease) <= 24 * 60 or len(lease) == 1 for lease in found)
    text = arms.plan(jobs, 24)
    assert f"lease {len(found)}:" in text and f"{len(jobs)} arms" in text
    slow = {arm.kind: 200.0 for arm in start["long"]}
    assert "DOES NOT FIT" in arms.plan(
        [arms.Job(start["long"][0], 0, arms.Costs(slow).of(start["long"][0]), "long")], 24
    )


def test_measured_seconds_replace_those_on_paper(modules, start):
    _, arms, _ = modules
    speed = next(arm for arm in start["speed"] if arm.name == "speed-at-128")
    at = next(arm for arm in start["main"] if arm.name == "at")
    known = [
        {"arm": speed.name, "seconds_per_epoch_after_the_first": 2.0},
        {"arm": at.name, "judge_seconds": {"last": 30.0, "autoattack": 80.0}},
    ]
    costs = arms.Costs.measured(known, [speed, at])
    saved = 30 * (arms.PACE["at"] * arms.SMALL_BATCH_SHARE - 2.0) + 2 * (arms.EVALUATION - 30) + arms.AUTOATTACK - 80
    assert arms.Costs().of(at) - costs.of(at) == pytest.approx(saved)
    tuned = next(arm for arm in start["lambda"] if arm.name == "tune-at-rate-0.1-cosine-100")
    half = arms.Costs.measured([{"arm": tuned.name, "judge_seconds": {"last": 20.0}}], [tuned, at])
    assert half.evaluation == 40.0  # 10,000 images and not 5,000
    long = start["long"][0]
    once = arms.Arm(long.name, long.settings, long.base, final=long.final, both=False)
    assert arms.Costs().of(long) - arms.Costs().of(once) == arms.EVALUATION + arms.AUTOATTACK


def quick() -> list[str]:
    """Options for arms of seconds, on a CPU too."""
    keys = {"data.name": '"digits"', "model": '"small-cnn"', "engine": '"eager"', "dtype": '"fp32"', "epochs": "1",
            "data.limit": "400", "attack.steps": "1", "batch_size": "64", "validation.fraction": "0.2",
            "validation.every": "1"}  # fmt: skip
    return ["--limit", "6", *(word for key, value in keys.items() for word in ("--set", f"{key}={value}"))]


@pytest.mark.slow
def test_an_arm_that_diverges_is_told_and_not_tried_again(modules, tmp_path, monkeypatch, capsys):
    study, _, _ = modules
    arguments = [
        "study.py",
        "run",
        "beta",
        "--seeds",
        "0",
        "--only",
        "tune-trades-rate-0.1-beta-1",
        "--gpus",
        "1",
        *quick(),
    ]
    arguments += ["--set", "optimizer.lr=1e30", "--set", "epochs=3"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path / "o"), "--work", str(tmp_path / "w")])
    assert study.main() == 0
    told = json.loads((tmp_path / "o" / "tune-trades-rate-0.1-beta-1-0.json").read_text())
    assert "not a number" in told["failed"] and told["complete"]
    assert "not a number" in capsys.readouterr().out
    assert study.main() == 0 and "0 arms are left" in capsys.readouterr().out


@pytest.mark.slow
def test_a_lease_trains_judges_and_skips_what_is_done(modules, tmp_path, monkeypatch, capsys):
    study, _, _ = modules
    only = "tune-at-rate-0.1-cosine-100,at-control"
    arguments = ["study.py", "run", "lambda", "main", "--seeds", "0", "--only", only, "--gpus", "1", *quick()]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path / "o"), "--work", str(tmp_path / "w")])
    assert study.main() == 0
    tuned, control = (json.loads((tmp_path / "o" / f"{name}-0.json").read_text()) for name in only.split(","))
    assert tuned["judged_on"] == "6 held-out training images" and control["judged_on"] == "6 test images"
    assert tuned["training"]["data"] == "digits-tuning" and tuned["complete"] and len(tuned["reference"]) == 64
    assert tuned["reference"] != control["reference"]  # the sweep's standard model has not seen these images either
    assert "best" not in control["evaluation"] and {"natural", "pgd20", "apgd"} == control["answers"]["last"].keys()
    capsys.readouterr()
    assert study.main() == 0
    assert "0 arms are left" in capsys.readouterr().out
    (tmp_path / "o" / "at-control-0.json").unlink()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--minutes", "0"])
    assert study.main() == 0
    assert "time is up with 1 arms left" in capsys.readouterr().out


@pytest.mark.slow
def test_several_gpus_do_the_sweeps_first_and_each_has_its_own_standard_model(tmp_path):
    only = "epsilon-0,epsilon-2,tune-trades-rate-0.1-beta-1"
    arguments = ["run", "epsilons", "beta", "--only", only, "--gpus", "2", *quick()]
    arguments += ["--out", str(tmp_path / "o"), "--work", str(tmp_path / "w")]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1,-2"}  # torch sees none of them
    call = [sys.executable, str(BENCHMARKS / "study.py"), *arguments]
    result = subprocess.run(call, env=hidden, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    found = {name: json.loads((tmp_path / "o" / f"{name}-0.json").read_text()) for name in only.split(",")}
    assert all(each["complete"] for each in found.values())
    swept = (tmp_path / "o" / "tune-trades-rate-0.1-beta-1-0.json").stat().st_mtime
    assert all(
        datetime.fromisoformat(found[name]["started"]).timestamp() > swept for name in ("epsilon-0", "epsilon-2")
    )
    standards = {path.parts[-2] for path in (tmp_path / "w").glob("gpu*/standard-0")}
    assert standards == {"gpu0", "gpu1"} and found["epsilon-0"]["reference"] == found["epsilon-2"]["reference"]


def test_missing_libraries_are_said_before_anything_is_trained(modules, start, monkeypatch):
    study, arms, _ = modules
    monkeypatch.setattr(study.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(study.UsageError, match="sklearn, scipy, pyautoattack"):
        study.require_libraries([arms.Job(start["main"][0], 0, 1.0, "main")])


def test_a_part_that_is_none_is_said(modules, monkeypatch, capsys):
    study, _, _ = modules
    monkeypatch.setattr(sys, "argv", ["study.py", "plan", "lamda"])
    with pytest.raises(SystemExit):
        study.parse()
    assert "lamda" in capsys.readouterr().err
