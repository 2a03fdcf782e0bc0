"""Every command of the study is one that the command line takes, before a GPU is spent on it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from study import Study  # noqa: E402

from coral_spec.bench.methods import parse_methods  # noqa: E402
from coral_spec.commands.train import parse_setting  # noqa: E402
from coral_spec.heads.choose import HeadChoice  # noqa: E402
from coral_spec.training.config import TrainConfig  # noqa: E402
from expkit.config import load_config  # noqa: E402


def values(options: list[str], name: str) -> list[str]:
    return [options[at + 1] for at, each in enumerate(options) if each == name]


@pytest.fixture
def commands(tmp_path: Path) -> list[list[str]]:
    study = Study(tmp_path, tmp_path / "prompts.jsonl")
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
