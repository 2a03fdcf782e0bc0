"""The study's plan fits its leases, finished trainings are not run again, and no target has a part in the choice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
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
@given(st.integers(1, 8), st.floats(12, 40), st.sets(st.integers(0, 80)))
def test_every_training_that_is_left_is_in_one_lease_that_is_not_too_long(side, limit, done):
    number, left = 0, {}
    for part, jobs in every().items():
        left[part] = [job for place, job in enumerate(jobs, start=number) if place not in done]
        number += len(jobs)
    planned = study.leases(left, study.FORESEEN, side, limit)
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


def call(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "study.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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
