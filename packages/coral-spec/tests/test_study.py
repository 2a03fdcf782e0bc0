"""Every command of the study is one that the command line takes, before a GPU is spent on it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

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


@pytest.fixture
def commands(tmp_path: Path) -> list[list[str]]:
    study = load_study().Study(tmp_path, tmp_path / "prompts.jsonl")
    found = [options for steps in study.leases().values() for step in steps for options in step.commands.values()]
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


def test_a_training_of_an_earlier_lease_needs_no_run_here(tmp_path: Path) -> None:
    study = load_study().Study(tmp_path, tmp_path / "prompts.jsonl")
    step = study.heads("smollm2")
    for out in step.commands:
        kept = tmp_path / "results/training" / Path(out).relative_to("runs")
        kept.parent.mkdir(parents=True)
        kept.touch()
    study.do(step)
    assert not (tmp_path / "runs").exists()


def test_nothing_is_begun_after_a_step_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = load_study().Study(tmp_path, None)
    assert not study.run("smollm2-seed0", ends=0.0)
    assert capsys.readouterr().out.count("left for another lease") == 1
    assert not (tmp_path / "logs").exists()


def test_commands_of_a_step_are_spread_over_gpus_and_one_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"  # stands in for a training: says which GPU it sees, and fails where it is told to
    python.write_text('#!/bin/sh\necho "gpu $CUDA_VISIBLE_DEVICES"\n[ "$3" = good ] || exit 1\nsleep 0.5\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    module = load_study()
    study = module.Study(tmp_path, None, ["5", "7"])
    study.do(module.Step(1, {name: ["good"] for name in ("a", "b", "c")}, {}))
    seen = {name: (tmp_path / f"logs/{name}.log").read_text() for name in ("a", "b", "c")}
    assert seen["a"] == "gpu 5\n" and seen["b"] == "gpu 7\n" and seen["c"] in (seen["a"], seen["b"])
    with pytest.raises(SystemExit, match=r"bad\.log:\ngpu 5"):
        study.do(module.Step(1, {"bad": ["bad"], "other": ["good"], "never": ["good"]}, {}))
    assert (tmp_path / "logs/other.log").is_file() and not (tmp_path / "logs/never.log").exists()


def test_drafters_of_settings_are_kept_for_their_evaluation(tmp_path: Path) -> None:
    steps = load_study().Study(tmp_path, None).settings("smollm2")
    kept = {f"{tmp_path}/keep/{folder}" for step in steps for folder in step.keep.values()}
    asked = {
        each.partition("=")[2] for step in steps for out in step.commands.values() for each in values(out, "--draft")
    }
    assert asked and asked <= kept
