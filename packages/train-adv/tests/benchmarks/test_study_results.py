"""The study's report: differences of pairs, what is published and restored, pictures, and the configs it recommends."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from study_figures import result

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CONFIGS = BENCHMARKS.parent / "configs"


def test_answers_survive_packing(modules):
    _, _, report = modules
    for count in (0, 1, 7, 8, 103):
        right = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
        assert torch.equal(report.unpack(report.pack(right)), right)


def test_a_seed_that_failed_takes_no_other_out_of_the_differences(modules):
    _, _, report = modules
    right = {seed: {"natural": report.pack(torch.rand(50, generator=torch.Generator().manual_seed(seed)) < 0.6)}
             for seed in (0, 1)}  # fmt: skip
    base = {"config": {}, "evaluation": {}, "judged_on": "", "seconds_per_epoch_after_the_first": None}
    results = [{**base, "arm": "at", "training": {"seed": seed}, "answers": {"last": right[seed]}} for seed in (0, 1)]
    results.append({**base, "arm": "at+train", "training": {"seed": 0}, "answers": {"last": right[1]}})
    results.append({**base, "arm": "at+train", "training": {"seed": 1}, "answers": {}, "failed": "no number"})
    results.append({**base, "arm": "at+train-30", "training": {"seed": 0}, "answers": {"last": right[1]}})
    found = report.differences(results)
    assert [(each["arm"], each["other"], list(each["by_seed"])) for each in found] == [
        ("at+train", "at", ["0"]),
        ("at+train-30", "at", ["0"]),
    ]
    one, two = (report.unpack(right[seed]["natural"]).double().mean() for seed in (0, 1))
    assert found[0]["difference"] == pytest.approx(float(two - one)) == found[0]["by_seed"]["0"] != 0
    assert f"at+train - at, last, natural: {100 * found[0]['difference']:+.2f} [" in report.report(results)


def answered(arm: str, seed: int, **answers: torch.Tensor) -> dict:
    """An arm with answers to one attack by checkpoint, and no other figures."""
    packed = {which: {"apgd": sys.modules["study_results"].pack(right)} for which, right in answers.items()}
    base = {"evaluation": {}, "config": {}, "complete": True}
    return {**base, "arm": arm, "training": {"seed": seed}, "answers": packed}


def test_of_arms_of_100_epochs_the_best_checkpoints_are_compared_too(modules):
    _, _, report = modules
    none, some, all_ = (torch.arange(8) < count for count in (0, 4, 8))
    results = [answered("long-at", 0, last=none, best=some), answered("long-at+train", 0, last=some, best=all_)]
    assert {each["checkpoint"]: each["difference"] for each in report.differences(results)} == {
        "last": 0.5,
        "best": 0.5,
    }
    results[1] = answered("long-at+train", 0, last=some)  # its last checkpoint is its best one
    assert {each["checkpoint"]: each["difference"] for each in report.differences(results)} == {
        "last": 0.5,
        "best": 0.0,
    }
    results[1]["complete"] = False  # its best checkpoint is still to be judged
    assert [each["checkpoint"] for each in report.differences(results)] == ["last"]
    cut = [answered(f"multistep-at{end}", 0, last=none, best=some) for end in ("", "+train-both")]
    assert [each["checkpoint"] for each in report.differences(cut)] == ["last", "best"]
    assert len(report.publishable(cut)["differences"]) == 2
    short = [{**each, "arm": each["arm"].removeprefix("long-")} for each in results]
    assert [each["checkpoint"] for each in report.differences(short)] == ["last"]


def test_a_study_goes_on_from_what_was_published(modules, tmp_path, monkeypatch, capsys):
    study, _, report = modules
    none, all_ = torch.arange(8) < 0, torch.arange(8) < 8
    results = [answered(arm, seed, last=right) for arm, right in (("at", none), ("at+train", all_)) for seed in (0, 1)]
    published = report.publishable(results)
    assert [each["difference"] for each in published["differences"]] == [1.0]
    (tmp_path / "study.json").write_text(json.dumps(published))
    out = tmp_path / "out"
    call = ["study.py", "restore", "--out", str(out), "--to", str(tmp_path / "study.json")]
    monkeypatch.setattr(sys, "argv", call)
    assert study.main() == 0 and "4 files" in capsys.readouterr().out
    found = study.read_results(out)
    assert report.publishable(found)["differences"] == published["differences"]
    assert all(each in found for each in published["arms"]) and len(found) == 4
    newer = answered("at", 0, last=all_)
    (out / "at-0.json").write_text(json.dumps(newer))
    assert study.main() == 0 and "0 files" in capsys.readouterr().out
    assert newer in study.read_results(out)
    # Answers that were lost take no published difference with them; more seeds replace it, fewer do not.
    lost = [{**each, "answers": {}} for each in found]
    assert report.publishable(lost, published)["differences"] == published["differences"]
    some = [{**each, "answers": each["answers"] if each["training"]["seed"] == 0 else {}} for each in found]
    assert report.publishable(some, published)["differences"] == published["differences"]
    # A seed of its own replaces none that was published.
    third = [answered("at", 2, last=none), answered("at+train", 2, last=none)]
    assert report.publishable(third, published)["differences"] == published["differences"]
    again = [answered(arm, seed, last=none) for arm in ("at", "at+train") for seed in (0, 1)]
    assert report.publishable(again, published)["differences"][0]["difference"] == 0  # the same seeds: the newer one
    more = [*found, answered("at", 2, last=all_), answered("at+train", 2, last=all_)]
    assert report.publishable(more, published)["differences"][0]["difference"] == pytest.approx(2 / 3)
    monkeypatch.setattr(sys, "argv", [*call[:-1], str(tmp_path / "absent.json")])
    with pytest.raises(SystemExit):
        study.main()


def test_a_report_takes_no_arm_out_of_what_was_published(modules, tmp_path, monkeypatch):
    study, _, report = modules
    monkeypatch.setattr(study, "plot_frontier", lambda *given: None)
    drawn = []
    monkeypatch.setattr(study, "plot_long", lambda results, path: drawn.append(path.name))
    quiet = {"judged_on": "", "seconds_per_epoch_after_the_first": None}
    arms = [{**answered(arm, 0, last=torch.arange(8) < 4), **quiet} for arm in ("at", "mart", "long-at")]
    (tmp_path / "study.json").write_text(json.dumps(report.publishable(arms[:1])))
    for count, arm in ((2, arms[1]), (3, arms[2])):
        out = tmp_path / f"out{count}"
        study.write_json(out / f"{arm['arm']}-0.json", arm)
        to = tmp_path / "study.json"
        monkeypatch.setattr(sys, "argv", ["study.py", "report", "--out", str(out), "--to", str(to)])
        assert study.main() == 0
        assert len(json.loads(to.read_text())["arms"]) == count
        assert len(drawn) == count - 2  # an empty picture takes no other's place


def test_hosts_whose_answers_are_gone_are_told_before_minutes_are_spent(modules, start):
    study, arms, _ = modules
    at, with_train = (next(arm for arm in start["main"] if arm.name == name) for name in ("at", "at+train"))
    left = [arms.Job(with_train, seed, 1.0, "main") for seed in (0, 1)]
    known = [answered(at.name, 0), answered(at.name, 1, last=torch.arange(8) < 4)]
    assert study.unpaired(left, known) == ["at+train-0"]


def test_long_arms_are_drawn_and_both_their_checkpoints_meet_autoattack(modules, start, tmp_path):
    _, _, report = modules
    assert all(arm.final_of_both for part in ("long", "multistep", "everything") for arm in start[part])
    assert not any(arm.final_of_both for arm in start["main"])
    assert all(arm.settings["optimizer.milestones"] == [0.5, 0.75] for arm in start["multistep"])
    epochs = [{"epoch": each, "val_natural": 0.1 * each, "val_pgd": 0.05 * each} for each in (2, 4, 6)]
    config = {"host": "at", "optimizer.schedule": "multistep", "awp.gamma": 0.005, "topology.weight": 0.0}
    beside = {**config, "awp.gamma": 0.0, "data.erase": 0.5, "topology.weight": 100.0, "topology.inputs": "both"}
    assert report._spelled(config) == ("AT in steps, AWP 0.005", "")
    assert report._spelled(beside) == ("AT in steps, erasing", " + TRAIN (both)")
    arm = {"arm": "multistep-at", "epochs": [{"epoch": 1}, *epochs], "training": {"best": {"epoch": 4}}}
    report.plot_long([{**arm, "config": config}, {**arm, "config": beside}], tmp_path / "long.png")
    assert (tmp_path / "long.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_published_has_no_path_and_no_answers_of_sweeps_and_is_drawn(modules, tmp_path):
    _, _, report = modules
    results = [
        result("tune-at-rate-0.1", 0.74, 0.43),
        result("tune-at-rate-0.1-cosine-30", 0.76, 0.44, 30.0),
        result("tune-trades-rate-0.1-beta-3", 0.75, 0.43, beta=3.0),
    ]
    for each in results:
        each["command"] = "study.py run --data-dir /data/here --work /w --out /o --only a --work /w/gpu1"
        each["config"] |= {"data.dir": "/data/here", "topology.path": "/w/gpu1/standard-0"}
        each["answers"] = {"last": {"apgd": "4:f"}}
        each["training"] = {"seed": 0}
        each["evaluation"]["last"]["apgd"]["per_class"] = {}
    published = report.publishable(results)
    assert published["differences"] == report.differences(results) == []
    assert "/data" not in json.dumps(published) and "/w" not in json.dumps(published)
    first = published["arms"][0]
    assert first["config"]["topology.path"] == "WORK/gpu1/standard-0" and first["config"]["data.dir"] == "DATA"
    assert first["answers"] == {"last": {"apgd": "4:f"}} and "per_class" not in first["evaluation"]["last"]["apgd"]
    for each in results:  # relative paths are no machine's, and "out" is a word
        each["command"] = "study.py run --data-dir data --out out"
    assert report.publishable(results)["arms"][0]["config"]["data.dir"] == "/data/here"
    results[0]["tuning_split"] = {"seed": 1}  # of the sweeps they serve no difference
    assert report.publishable(results)["arms"][0]["answers"] == {} != results[0]["answers"]
    report.plot_frontier(results, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    first_pass = json.loads((BENCHMARKS.parent / "results" / "study-batch512.json").read_text())
    report.plot_topology(first_pass["arms"], tmp_path / "topology.png")
    assert (tmp_path / "topology.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "arm"),
    [("at-train", "at+train"), ("at-train-100", "long-at+train"), ("trades-train", "trades+train-adversarial")],
)
def test_the_configs_that_are_recommended_are_those_that_were_measured(name, arm):
    from expkit.config import flatten, load_config
    from train_adv.training.config import TrainConfig

    own = flatten(json.loads(json.dumps(asdict(load_config(TrainConfig, CONFIGS / f"cifar10-{name}.toml").resolved()))))
    published = json.loads((BENCHMARKS.parent / "results" / "study.json").read_text())["arms"]
    measured = next(each["config"] for each in published if each["arm"] == arm)
    # Where it ran, what it was called, and what it measured besides; graphs are the default on a GPU.
    free = {"name", "data.dir", "engine", "topology.path", "topology.metrics", "validation.test"}
    # A key that came after the run had the value of its default.
    assert {key for key in own if key in measured and own[key] != measured[key]} <= free
