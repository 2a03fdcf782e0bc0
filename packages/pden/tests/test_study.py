"""The study's plan fits its leases, trainings share GPUs evenly and are not run again once they are finished, and no
target has a part in the choice."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import study_jobs as study  # noqa: E402

from expkit.config import load_config  # noqa: E402
from pden.commands.options import parse_setting  # noqa: E402
from pden.training.config import TrainConfig  # noqa: E402


def every(chosen=()) -> dict[str, list[study.Job]]:
    return {part: study.jobs_of(part, chosen) for part in study.PARTS}


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.floats(12, 40), st.sets(st.integers(0, 80)))
def test_every_training_that_is_left_is_in_one_lease_that_is_not_too_long(side, gpus, limit, done):
    number, left = 0, {}
    for part, jobs in every().items():
        left[part] = [job for place, job in enumerate(jobs, start=number) if place not in done]
        number += len(jobs)
    planned = study.leases(left, study.FORESEEN, side, limit, gpus)
    placed = [job for lease in planned for jobs, _ in lease for job in jobs]
    assert sorted(map(repr, placed)) == sorted(repr(job) for jobs in left.values() for job in jobs)
    for lease in planned:
        alone = len(lease) == 1 and len(lease[0][0]) == 1  # nothing can shorten a single training
        assert alone or sum(minutes for _, minutes in lease) <= limit + 1e-9


def test_trainings_side_by_side_are_no_faster_than_alone_and_share_the_gpu():
    (first, *rest) = study.jobs_of("paper")
    speed = {"pden": study.Speed(alone=4.0, shared=3.0)}
    assert study.minutes([first], speed, 5) == pytest.approx(65 * 4 / 60 + study.START)
    assert study.minutes([first, *rest], speed, 5) == pytest.approx(5 * 65 * 3 / 60 + study.START)


@pytest.mark.parametrize("part", study.PARTS)
@settings(max_examples=25, deadline=None)
@given(side=st.integers(1, 8), gpus=st.integers(2, 8))
def test_more_gpus_take_no_longer_and_never_less_than_the_longest_training(part, side, gpus):
    jobs = study.jobs_of(part)
    one, many = (study.minutes(jobs, study.FORESEEN, side, count) for count in (1, gpus))
    longest = max(study.minutes([job], study.FORESEEN, side) for job in jobs)
    if part in ("speed", "alone"):  # they measure one GPU
        assert many == one
    else:
        assert max(one / gpus, longest) <= many + 1e-9 and many <= one


def test_the_whole_study_fits_three_leases_of_24_minutes_on_4_gpus():
    planned = study.leases(every(), study.FORESEEN, 5, 24, 4)
    assert len(planned) == 3 < len(study.leases(every(), study.FORESEEN, 5, 24))


@pytest.mark.parametrize("part", study.PARTS)
def test_every_training_is_a_valid_config_of_a_name_of_its_own(part):
    jobs = study.jobs_of(part, study.BOTH)
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        words = iter(job.flags)
        flags = dict(parse_setting(next(words)) if word == "--set" else (word[2:], next(words)) for word in words)
        flags["rounds"] = int(flags.get("rounds", 20))
        config = load_config(TrainConfig, BENCHMARKS.parent / "configs" / f"{job.config}.toml", flags)
        steps = config.pretrain_steps + config.rounds * config.round_steps
        assert steps == job.steps or part == "cifar"
        assert (config.data.targets == ()) == (part in ("choice", "speed"))


def result(label: str, seed: int, disguised: float, target: float = 0.0) -> dict:
    figures = {"validation": 0.9, "disguised": disguised, "average": target, "targets": {"usps": target}}
    return {"name": f"{label}-seed{seed}".replace(", ", "+"), "seed": seed, "selections": {"averaged": figures}}


def test_the_choice_is_the_best_mean_in_disguise_whatever_the_targets_say():
    def results(flip: float) -> list[dict]:
        return [
            result(label, seed, 0.5 + 0.01 * place * (seed - 99.5), target=flip * place)
            for place, label in enumerate(study.CANDIDATES)
            for seed in study.CHOICE_SEEDS
        ]

    assert study.choose(results(0.1)) == study.choose(results(-0.1))
    assert study.choose(results(0.1))["chosen"] == list(study.CANDIDATES)[-1]
    with pytest.raises(ValueError, match="paper lacks seed 101"):
        study.choose([each for each in results(0) if each["name"] != "paper-seed101"])


def load_study() -> ModuleType:
    """Under a name of its own: other packages have studies too."""
    spec = importlib.util.spec_from_file_location("pden_study", BENCHMARKS / "study.py")
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

    def __init__(self, folder: Path, seconds: float) -> None:
        self.study, self.out = load_study(), folder / "out"
        self.arguments = argparse.Namespace(out=self.out, work=folder / "work", side=2, gpus=2)
        self.study.command = lambda job, _: [sys.executable, "-c", RECORD, str(self.run_of(job)), str(seconds)]

    def run_of(self, job: study.Job) -> Path:
        return self.arguments.work / job.part / job.name

    def do(self, jobs: list[study.Job], limit: float = 60.0) -> int:
        return self.study.do(jobs, self.arguments, time.monotonic() + limit)

    def said(self) -> dict[Path, dict]:
        """What the processes that came to their end said, by folder."""
        return {file.parent: json.loads(file.read_text()) for file in self.out.glob("*/*/result.json")}


@pytest.mark.parametrize(("own", "gpus"), [(None, {"0", "1"}), ("GPU-7,5,3", {"GPU-7", "5"})])
def test_each_gpu_has_trainings_of_its_own_and_no_more_than_side_at_a_time(tmp_path, monkeypatch, own, gpus):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if own is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", own)
    runner, jobs = Runner(tmp_path, 0.5), study.jobs_of("choice")[:7]
    assert runner.do(jobs) == 0
    runs = [runner.said()[runner.out / job.part / job.name] for job in jobs]
    assert sorted(each["gpu"] for each in runs[:4]) == sorted([*gpus, *gpus])  # all places at once, shared evenly
    for one in runs:
        together = [each for each in runs if each["gpu"] == one["gpu"] and each["start"] <= one["start"] < each["end"]]
        assert len(together) <= runner.arguments.side


def test_speed_and_alone_are_measured_on_one_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    runner = Runner(tmp_path, 0.0)
    assert runner.do(study.jobs_of("alone")) == 0 and runner.do(study.jobs_of("speed")[:1]) == 0
    assert [each["gpu"] for each in runner.said().values()] == ["4"] * 4  # alone; then alone, and two side by side


def test_trainings_on_every_gpu_are_stopped_when_time_is_over(tmp_path):
    runner, start = Runner(tmp_path, 60.0), time.monotonic()
    assert runner.do(study.jobs_of("choice")[:5], limit=1.0) == 5
    assert time.monotonic() - start < 20 and not runner.said()


def call(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "study.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_more_gpus_than_are_visible_are_planned_with_but_not_run_on(tmp_path):
    assert "GPUs: 99" in call("plan", "--out", tmp_path, "--gpus", 99).stdout
    refused = call("run", "paper", "--out", tmp_path, "--work", tmp_path, "--data-dir", tmp_path, "--gpus", 99)
    assert refused.returncode == 2 and "--gpus 99" in refused.stderr


@pytest.mark.slow
def test_the_last_training_of_the_choice_writes_what_ours_starts_from(tmp_path):
    out, open_job = tmp_path / "out", study.jobs_of("choice")[-1]
    for part, jobs in every().items():
        for job in jobs:
            if part != "ours" and job != open_job:
                file = out / part / job.name / "result.json"
                file.parent.mkdir(parents=True)
                file.write_text(json.dumps(result(job.label, job.seed, 0.05)))
    (out / "speed.json").write_text(json.dumps({"kinds": {}}))
    assert f"choice: {open_job.name}" in call("plan", "--out", out).stdout
    places = ("--out", out, "--work", tmp_path / "work", "--data-dir", tmp_path)
    early = call("run", "ours", *places)
    assert early.returncode == 1 and "nothing is chosen yet" in early.stdout
    tiny = ["data.source=digits", "data.validation=digits-test", "model.width=0.1", "pretrain_steps=20", "batch=8"]
    tiny += ["round_steps=4", "pretrain_batch=32", "gate.images=32", "gate.judge_steps=4", "data.disguised=64"]
    done = call("run", "choice", *places, *[word for key in tiny for word in ("--set", key)])
    assert done.returncode == 0, done.stdout
    found = json.loads((out / "chosen.json").read_text())
    assert found["chosen"] == open_job.label and {"command", "versions", "hardware"} < found.keys()
    assert not (tmp_path / "work" / "choice" / open_job.name / "checkpoints").exists()
    ours = call("plan", "--out", out).stdout
    assert "ours: pden-ours-seed0" in ours and "choice:" not in ours
