"""The study's plan fits its leases, trainings share GPUs evenly and are not run again once they are finished, and no
target has a part in the choice."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import study_jobs as study  # noqa: E402

from expkit.config import load_config, parse_setting  # noqa: E402
from pden.presets import preset_path  # noqa: E402
from pden.training.config import TrainConfig  # noqa: E402

GPUS = ("0", "1")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.floats(12, 40), st.sets(st.integers(0, 80)))
def test_every_training_that_is_left_is_in_one_lease_in_which_it_ends(side, gpus, limit, done):
    todo = [job for place, job in enumerate(study.queue()) if place not in done]
    estimates = study.Estimates(side, {})
    planned = study.leases(todo, estimates, [str(each) for each in range(gpus)], limit)
    placed = [job for lease in planned for job, *_ in lease]
    assert sorted(map(repr, placed)) == sorted(map(repr, todo))
    for lease in planned:
        assert len(lease) == 1 or max(end for *_, end in lease) <= limit + 1e-9
        for job, gpu, begin, end in lease:
            assert end - begin == pytest.approx(estimates.minutes(job))
            beside = [other for other, where, start, stop in lease if where == gpu and start <= begin < stop]
            assert len(beside) == 1 if any(each.alone for each in beside) else len(beside) <= side


def test_all_else_begins_when_the_choice_has_ended():
    for lease in study.leases(study.queue(), study.Estimates(3, {}), GPUS, 40):
        other = [begin for job, _, begin, _ in lease if job.part != "choice"]
        choice = [end for job, _, _, end in lease if job.part == "choice"]
        assert not other or max(choice, default=0.0) <= min(other)


def test_trainings_that_have_ended_tell_how_long_others_of_their_kind_take():
    first, second, *_ = study.jobs_of("paper")
    foreseen, speed = study.Estimates(5, {}), study.FORESEEN["pden"]
    thousands = 60 + 5 * study.PRETRAIN_SHARE
    assert foreseen.minutes(first) == pytest.approx(study.SLACK * thousands * speed.alone / 60 + study.START)
    assert foreseen.minutes(second) == pytest.approx(study.SLACK * thousands * 5 * speed.shared / 60 + study.START)
    seen = study.Estimates(5, {second: {"steps_per_second": 50.0}})
    assert seen.minutes(first) == foreseen.minutes(first)  # alone
    assert seen.minutes(study.jobs_of("paper")[2]) == pytest.approx(study.SLACK * 65 * 20 / 60 + study.START)


def test_a_short_run_tells_a_long_one_no_shorter_time_than_it_takes():
    """Steps before the rounds are cheap, and a larger part of a short run."""
    long = study.jobs_of("ours")[0]
    short = next(job for job in study.jobs_of("ablation") if job.kind == long.kind)
    cheap, dear = 1.0, 1.0 / study.PRETRAIN_SHARE  # milliseconds
    before = study.PRETRAINING
    seconds = {job: (before * cheap + (job.steps - before) * dear) / 1000 for job in (short, long)}
    seen = study.Estimates(3, {short: {"steps_per_second": short.steps / seconds[short]}})
    assert seen.minutes(long) == pytest.approx(study.SLACK * seconds[long] / 60 + study.START)


def test_the_whole_study_fits_four_leases_of_24_minutes_on_4_gpus():
    planned = study.leases(study.queue(), study.Estimates(1, {}), ["0", "1", "2", "3"], 24)
    assert len(planned) <= 4 and max(end for lease in planned for *_, end in lease) <= 24


@pytest.mark.parametrize("part", study.PARTS)
def test_every_training_is_a_valid_config_of_a_name_of_its_own(part):
    jobs = study.jobs_of(part, study.BARLOW)
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        assert re.fullmatch(r"[\w.-]+", job.name)  # a folder that any archive and any transfer takes
        words = iter(job.flags)
        flags = dict(parse_setting(next(words)) if word == "--set" else (word[2:], next(words)) for word in words)
        flags["rounds"] = int(flags.get("rounds", 20))
        config = load_config(TrainConfig, BENCHMARKS.parent / "configs" / f"{job.config}.toml", flags)
        steps = config.pretrain_steps + config.rounds * config.round_steps
        assert steps == job.steps or part == "cifar"
        assert (config.data.targets == study.DEVELOPMENT) == (part == "choice")


def test_the_config_and_the_preset_of_ours_are_what_was_chosen():
    chosen = json.loads((BENCHMARKS.parent / "results" / "chosen.json").read_text(encoding="utf-8"))
    runs = json.loads((BENCHMARKS.parent / "results" / "choice.json").read_text(encoding="utf-8"))["runs"]
    assert study.choose(runs)["chosen"] == chosen["chosen"] and study.choose(runs)["means"] == chosen["means"]
    assert chosen["settings"] == list(study.CANDIDATES[chosen["chosen"]])
    configs = BENCHMARKS.parent / "configs"
    given = dict(map(parse_setting, chosen["settings"]))
    ours = load_config(TrainConfig, configs / "digits-ours.toml")
    assert load_config(TrainConfig, configs / "digits-choice.toml", {**given, "name": ours.name}) == ours
    data = replace(ours.data, source="digits", validation="", targets=())
    assert load_config(TrainConfig, preset_path("ours")) == replace(
        ours, data=data, checkpoint_every=TrainConfig().checkpoint_every
    )


def result(label: str, seed: int, average: float, disguised: float = 0.0) -> dict:
    figures = {"disguises": {"texture": disguised}, "disguised": disguised, "validation": 0.9, "average": average}
    figures |= {"targets": dict.fromkeys(study.DEVELOPMENT, average)}
    return {"name": f"{label}-seed{seed}".replace(", ", "_"), "seed": seed, "selections": {"averaged": figures}}


def test_the_choice_is_the_best_mean_on_development_domains_whatever_else_is_measured():
    def results(flip: float) -> list[dict]:
        return [
            result(label, seed, 0.5 + 0.02 * place, disguised=flip * place)
            for place, label in enumerate(study.CANDIDATES)
            for seed in study.CHOICE_SEEDS
        ]

    assert study.choose(results(0.1)) == study.choose(results(-0.1))
    assert study.choose(results(0.1))["chosen"] == list(study.CANDIDATES)[-1]
    with pytest.raises(ValueError, match="batches lacks seed 100"):
        study.choose([each for each in results(0) if each["name"] != "batches-seed100"])


def test_digits_on_pictures_count_as_much_as_all_other_peoples_digits():
    results = [result(label, seed, 0.5) for label in study.CANDIDATES for seed in study.CHOICE_SEEDS]
    targets = results[2]["selections"]["averaged"]["targets"]
    targets[study.PHOTO] = 0.7
    found = study.choose(results)
    assert found["chosen"] == list(study.CANDIDATES)[2] and found["means"][found["chosen"]] == pytest.approx(0.6)
    others = results[4]["selections"]["averaged"]["targets"]
    others |= {name: 0.75 for name in others if name != study.PHOTO}
    assert study.choose(results)["chosen"] == list(study.CANDIDATES)[4]


def test_the_ablation_of_ours_trains_nothing_that_ours_is():
    assert set(study.ours_without(())) == {"ours, no-randconv", "ours, supervised", "ours, barlow"}
    for label, chosen in study.CANDIDATES.items():
        rows = study.ours_without(chosen)
        randaugment = any(word in label for word in ("quarter", "half", "whole"))
        assert ("ours, no-randaugment" in rows) == randaugment
        assert ("ours, no-grid" in rows) == ("grid" in label)
        assert ("ours, no-consistency" in rows) == ("consistent" in label)
        assert ("ours, no-randconv" in rows) == (label != "no-randconv")
        assert ("ours, supervised" in rows) == ("supervised" not in label)
        assert ("ours, photometric" in rows) == ("photometric" in label or "alternating" in label)
        assert all(set(keys) - set(chosen) for keys in rows.values())


def test_figures_of_other_domains_are_not_chosen_among():
    results = [result(label, seed, 0.5) for label in study.CANDIDATES for seed in study.CHOICE_SEEDS]
    results[0]["selections"]["averaged"]["targets"] = {"usps": 0.5}
    with pytest.raises(ValueError, match="measured on other domains: usps"):
        study.choose(results)


def test_a_candidate_with_a_training_that_failed_is_out_and_the_choice_goes_on():
    best = list(study.CANDIDATES)[-1].replace(", ", "_")
    results = [
        result(label, seed, 0.1 * place) for place, label in enumerate(study.CANDIDATES) for seed in study.CHOICE_SEEDS
    ]
    without = [each for each in results if each["name"] != f"{best}-seed100"]
    found = study.choose(without, [f"{best}-seed100"])
    assert found["chosen"] == list(study.CANDIDATES)[-2] and found["failed"] == [f"{best}-seed100"]


def load_study(name: str = "study") -> ModuleType:
    """Under a name of its own: other packages have studies too."""
    spec = importlib.util.spec_from_file_location(f"pden_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECORD = """
import json, os, pathlib, sys, time
run, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
run.mkdir(parents=True, exist_ok=True)
start = time.time()
time.sleep(seconds)
found = {"gpu": os.environ["CUDA_VISIBLE_DEVICES"], "start": start, "end": time.time(), "steps_per_second": 100}
(run / "result.json").write_text(json.dumps(found))
"""


class Runner:
    """The study with processes that sleep and say when and on which GPU, in the place of trainings."""

    def __init__(self, folder: Path, seconds: float, wanted: Callable[[study.Job], bool], **arguments: object) -> None:
        module = load_study()
        self.out, self.work = folder / "out", folder / "work"
        given = {"side": 2, "gpus": 2, "lease": 60.0, "minutes": 1.0, "parts": [], "only": None, **arguments}
        self.study = module.Study(argparse.Namespace(out=self.out, work=self.work, **given))
        self.study.command = lambda job: [sys.executable, "-c", RECORD, str(self.study.folder(job)), str(seconds)]
        module.queue = lambda chosen=(): [job for job in study.queue(chosen) if wanted(job)]

    def said(self) -> dict[str, dict]:
        """What the processes that came to their end said, by name."""
        return {file.parent.name: json.loads(file.read_text()) for file in self.out.glob("*/*/result.json")}


@pytest.mark.parametrize(("own", "gpus"), [(None, {"0", "1"}), ("GPU-7,5,3", {"GPU-7", "5"})])
def test_each_gpu_has_trainings_of_its_own_and_no_more_than_side_at_a_time(tmp_path, monkeypatch, own, gpus):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if own is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", own)
    jobs = study.jobs_of("choice")[:7]
    runner = Runner(tmp_path, 0.5, lambda job: job in jobs)
    assert runner.study.run() == 0
    runs = [runner.said()[job.name] for job in jobs]
    assert sorted(each["gpu"] for each in runs[:4]) == sorted([*gpus, *gpus])  # all places at once, shared evenly
    for one in runs:
        together = [each for each in runs if each["gpu"] == one["gpu"] and each["start"] <= one["start"] < each["end"]]
        assert len(together) <= 2


def test_only_the_named_trainings_run_and_several_commands_share_one_out(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for names in ("erm", "me-ada,randconv"):
        runner = Runner(tmp_path, 0.0, lambda job: job.part == "baselines" and job.seed < 2, only=names)
        assert runner.study.run() == 0
    assert set(runner.said()) == {f"{name}-seed{seed}" for name in ("erm", "me-ada", "randconv") for seed in (0, 1)}
    call = ["study.py", "run", "choice", "--only", "views,nothing", "--gpus", "1"]
    monkeypatch.setattr(sys, "argv", [*call, "--out", str(tmp_path), "--work", str(tmp_path), "--data-dir", "nowhere"])
    with pytest.raises(SystemExit) as stopped:
        load_study().main()
    assert stopped.value.code == 2 and "no training 'nothing'; they are alternating, " in capsys.readouterr().err


def test_what_is_measured_alone_has_its_gpu_for_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    runner = Runner(tmp_path, 0.5, lambda job: job.part == "paper")
    assert runner.study.run() == 0
    alone, *others = (runner.said()[job.name] for job in study.jobs_of("paper"))
    for other in others:
        assert other["gpu"] != alone["gpu"] or other["start"] >= alone["end"] or other["end"] <= alone["start"]


def test_trainings_are_stopped_when_time_is_over_and_none_begins_that_would_not_end(tmp_path):
    start = time.monotonic()
    runner = Runner(tmp_path, 60.0, lambda job: job.part == "choice", minutes=1 / 60)
    assert runner.study.run() == 1
    assert time.monotonic() - start < 20 and not runner.said()
    assert len(list(runner.work.glob("choice/*.log"))) == 4
    short = Runner(tmp_path / "short", 0.0, lambda job: job.part == "choice", lease=2.0)
    assert short.study.run() == 1 and not list(short.work.glob("*/*"))


def test_a_training_that_fails_is_told_and_not_tried_again(tmp_path, capsys):
    runner = Runner(tmp_path, 0.0, lambda job: job in study.jobs_of("baselines")[:2])
    fine = runner.study.command
    runner.study.command = lambda job: [sys.executable, "-c", "exit('no')"] if job.seed else fine(job)
    assert runner.study.run() == 1 and len(runner.said()) == 1
    assert "exit code 1" in capsys.readouterr().out
    assert json.loads((runner.out / "baselines/augmix-seed1/failed.json").read_text())["exit_code"] == 1
    assert runner.study.run() == 1 and "1 have failed: augmix-seed1" in capsys.readouterr().out


@pytest.mark.parametrize("end", ["import os; os.kill(os.getpid(), 9)", "exit('CUDA out of memory')"])
def test_a_training_that_was_killed_is_tried_again_by_the_next_command_alone(tmp_path, end):
    runner = Runner(tmp_path, 0.0, lambda job: job == study.jobs_of("baselines")[0])
    tries = []
    runner.study.command = lambda job: tries.append(job) or [sys.executable, "-c", end]
    assert runner.study.run() == 1 and len(tries) == 1 and not runner.said()
    again = Runner(tmp_path, 0.0, lambda job: job == study.jobs_of("baselines")[0])
    assert again.study.run() == 0 and len(again.said()) == 1


def test_what_has_ended_when_time_is_over_is_kept(tmp_path, monkeypatch):
    runner = Runner(tmp_path, 0.3, lambda job: job == study.jobs_of("baselines")[0], minutes=1 / 60)
    monkeypatch.setattr(
        runner.study, "collect_ended", lambda real=runner.study.collect_ended: time.sleep(1.2) or real()
    )
    assert runner.study.run() == 0 and len(runner.said()) == 1


def call(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "study.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_more_gpus_than_are_visible_are_planned_with_but_not_run_on(tmp_path):
    assert "GPUs: 99" in call("plan", "--out", tmp_path, "--gpus", 99).stdout
    places = ("--out", tmp_path, "--work", tmp_path, "--data-dir", tmp_path)
    refused = call("run", "paper", *places, "--gpus", 99)
    assert refused.returncode == 2 and "--gpus 99" in refused.stderr
    refused = call("restore", "--out", tmp_path, "--to", tmp_path / "nowhere")
    assert refused.returncode == 2 and "has no figures of this study" in refused.stderr
    restored = call("restore", "--out", tmp_path / "out", "--to", BENCHMARKS.parent / "results")
    assert restored.returncode == 0 and (tmp_path / "out" / "baselines" / "randconv-seed0" / "result.json").is_file()
    refused = call("run", "papers", *places)
    assert refused.returncode == 2 and "no part 'papers'" in refused.stderr


@pytest.mark.slow
def test_the_last_training_of_the_choice_writes_what_ours_starts_from(tmp_path):
    out, open_job = tmp_path / "out", study.jobs_of("choice")[-1]
    for job in study.queue():
        if job.part != "ours" and job != open_job:
            file = out / job.part / job.name / "result.json"
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps({**result(job.label, job.seed, 0.0), "steps_per_second": 1000}))
    assert f"choice: {open_job.name}" in call("plan", "--out", out).stdout
    places = ("--out", out, "--work", tmp_path / "work", "--data-dir", tmp_path)
    early = call("run", "ours", *places)
    assert early.returncode == 1 and "5 trainings are left" in early.stdout
    tiny = ["data.source=syn-like", "data.validation=", "model.width=0.1", "pretrain_steps=20", "batch=8"]
    tiny += ["round_steps=4", "pretrain_batch=32", "gate.images=32", "gate.judge_steps=4", "data.disguised=64"]
    photo, *others = study.DEVELOPMENT
    tiny += [f"data.targets={[f'{photo}=digits-test', *others]}"]  # whose own files are not here
    done = call("run", "choice", *places, *[word for key in tiny for word in ("--set", key)])
    assert done.returncode == 0, done.stdout
    found = json.loads((out / "chosen.json").read_text())
    assert found["chosen"] == open_job.label and {"command", "versions", "hardware"} < found.keys()
    assert not (tmp_path / "work" / "choice" / open_job.name / "checkpoints").exists()
    ours = call("plan", "--out", out).stdout
    assert "ours: pden-ours-seed0" in ours and "choice:" not in ours


def test_trainings_that_all_fail_end_the_command_and_may_be_tried_again(tmp_path, capsys):
    runner = Runner(tmp_path, 0.0, lambda job: job.part == "baselines")
    runner.study.command = lambda job: [sys.executable, "-c", "exit('no such folder')"]
    assert runner.study.run() == 1
    assert "trainings have all failed: stopped" in capsys.readouterr().out
    assert not list(runner.out.glob("*/*/failed.json")) and len(runner.study.todo) == len(study.jobs_of("baselines"))


def test_a_step_is_timed_in_a_second_round_that_has_as_many_as_were_asked_for():
    small = {"model.width": 0.1, "batch": 8, "pretrain_batch": 8}
    one = load_study("step_time").trainer("erm", 2, torch.device("cpu"), "auto", **small)
    while not (one.clock.stage == "round" and one.clock.round == 2):
        one.step()
    assert (one.clock.step, one.clock.total) == (0, 22) and not one.done
    assert one.step() == "none" and one.step() == "round" and one.done
