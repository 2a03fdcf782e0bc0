"""Every command of the study is one that the command line takes, before a GPU is spent on it."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from coral_spec.bench.methods import parse_methods
from coral_spec.commands.train import parse_setting
from coral_spec.heads.choose import HeadChoice
from coral_spec.training.config import TrainConfig
from expkit.config import load_config


def load_study() -> ModuleType:
    """Under a name of its own: other packages have studies too."""
    path = Path(__file__).parents[1] / "benchmarks" / "study.py"
    spec = importlib.util.spec_from_file_location("coral_spec_study", path)
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def values(options: list[str], name: str) -> list[str]:
    return [options[at + 1] for at, each in enumerate(options) if each == name]


def made(work: Path, gpus: tuple[str, ...] = ("0",), prompts: Path | None = None) -> Any:
    """The study in a folder."""
    module = load_study()
    return module.Study(module.Plan(work, prompts), gpus)


@pytest.fixture
def commands(tmp_path: Path) -> list[list[str]]:
    found = [list(job.options) for job in made(tmp_path, prompts=tmp_path / "prompts.jsonl").all]
    for options in found:
        for each in [*values(options, "--draft"), *",".join(values(options, "--methods")).split(",")]:
            if "=" in each:
                Path(each.partition("=")[2]).mkdir(parents=True, exist_ok=True)
    return found


def test_methods_and_heads_are_known(commands: list[list[str]]) -> None:
    measured = [options for options in commands if options[0] in ("eval", "bench")]
    assert len(measured) > 20
    for options in measured:
        assert parse_methods(",".join(values(options, "--draft") or values(options, "--methods")))
        for head in values(options, "--head"):
            HeadChoice.parse(head)


def test_settings_of_trainings_are_known(commands: list[list[str]]) -> None:
    trainings = [options for options in commands if options[0] == "train"]
    assert len(trainings) > 30
    for options in trainings:
        settings = dict(parse_setting(each) for each in values(options, "--set"))
        drafter = next(map(Path, values(options, "--drafter")), None)
        flags = {"stages": values(options, "--stages")[0].split(","), "drafter": drafter}
        load_config(TrainConfig, Path(values(options, "--config")[0]), {**settings, **flags})


def test_nothing_that_a_command_names_is_missing_and_all_leave_different_files(tmp_path: Path) -> None:
    study = made(tmp_path)
    assert len({job.out for job in study.all}) == len(study.all) > 100
    kept = {f"keep/{name}" for job in study.all for name in job.keep.values()}
    for job in study.all:
        asked = {name for name in job.names(tmp_path) if name.startswith("keep/") and name not in job.makes()}
        answers = {name for name in asked if name.startswith("keep/answers")}
        assert asked - answers <= kept, job.out
        assert len(study.needs[job]) == len(asked), job.out


def test_evaluations_wait_for_trainings_and_these_for_answers(tmp_path: Path) -> None:
    study = made(tmp_path)
    jobs = {job.out: job for job in study.all}
    first = jobs["runs/smollm2-hass-0/result.json"]
    assert [each.out for each in study.lacks(first)] == [f"keep/answers/smollm2-t0{n}/complete" for n in (0, 8)]
    speed = jobs["results/smollm2-speed-t1-full.json"]
    recipes = [f"runs/smollm2-{recipe}-0/result.json" for recipe in ("csra", "eagle2", "hass")]
    assert [each.out for each in study.lacks(speed)] == recipes
    (tmp_path / "keep/drafters/smollm2-hass-0").mkdir(parents=True)  # from elsewhere
    assert [each.out for each in study.lacks(speed)] == recipes[:2]


def test_a_training_of_an_earlier_lease_needs_no_run_here(tmp_path: Path) -> None:
    study = made(tmp_path)
    jobs = study.chosen((), ["runs/smollm2-lowrank*", "runs/smollm2-coral*"])
    assert len(jobs) == 3
    for job in jobs:
        kept = tmp_path / "results/training" / Path(job.out).relative_to("runs")
        kept.parent.mkdir(parents=True)
        kept.touch()
    assert study.run(jobs, ends=0.0)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "logs").exists()


def test_nothing_is_begun_that_would_not_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = made(tmp_path)
    jobs = study.chosen(["smollm2-data", "smollm2-seed0"])
    assert not study.run(jobs, ends=0.0)
    out = capsys.readouterr().out
    assert out.count("left: ") == len(jobs) == 6
    assert "left: keep/answers/smollm2-t00/complete (3.5 minutes)" in out
    assert "runs/smollm2-hass-0/result.json (needs keep/answers/smollm2-t00/complete, keep/answers/smollm2-t08" in out
    assert not (tmp_path / "logs").exists()


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for a command: notes which GPU it sees, and when, and fails where it is told to."""
    file = tmp_path / "python"
    file.write_text(
        f'#!/bin/sh\necho "$3 $CUDA_VISIBLE_DEVICES" >> {tmp_path}/begun\necho "gpu $CUDA_VISIBLE_DEVICES"\n'
        f'[ "$3" = bad ] && exit 3\nsleep 0.5\n'
        'for each; do last=$each; done\nmkdir -p "$(dirname "$last")"; touch "$last"\n'
    )
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))
    return file


def study_of(work: Path, jobs: list[tuple[str, str, float, tuple[str, ...]]], gpus: tuple[str, ...]) -> Any:
    """Jobs of a name, a file, minutes, and the folders below WORK that they name."""
    module = load_study()
    found = [
        module.Job("lease", out, (name, *(str(work / each) for each in named), str(work / out)), minutes, {})
        for name, out, minutes, named in jobs
    ]
    plan = module.Plan(work, None)
    plan.jobs = lambda: found
    return module.Study(plan, gpus)


@pytest.mark.usefixtures("python")
def test_what_most_waits_for_begins_first_and_each_has_a_gpu_for_itself(tmp_path: Path) -> None:
    jobs = [
        ("short", "a/1", 1.0, ()),
        ("before", "b/1", 1.0, ()),
        ("long", "c/1", 2.0, ()),
        ("after", "d/1", 5.0, ("b",)),
    ]
    study = study_of(tmp_path, jobs, ("5", "7"))
    assert study.run(study.all, time.monotonic() + 600)
    begun = [line.split() for line in (tmp_path / "begun").read_text().splitlines()]
    assert {each[0] for each in begun[:2]} == {"before", "long"} and {each[1] for each in begun[:2]} == {"5", "7"}
    assert {each[0] for each in begun[2:]} == {"after", "short"}


@pytest.mark.usefixtures("python")
def test_a_job_that_fails_is_told_and_keeps_back_only_what_waits_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [("bad", "a/1", 1.0, ()), ("never", "b/1", 1.0, ("a",)), ("good", "c/1", 1.0, ())]
    study = study_of(tmp_path, jobs, ("5",))
    assert not study.run(study.all, time.monotonic() + 600)
    out = capsys.readouterr().out
    assert "a_1.log: exit code 3\ngpu 5" in out and "left: b/1 (needs a/1)" in out and "done: c/1" in out
    assert "never" not in (tmp_path / "begun").read_text()
