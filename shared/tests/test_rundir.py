from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from expkit import rundir
from expkit.config import load_config
from expkit.errors import UsageError
from expkit.metrics import read_metrics
from expkit.rundir import RunDir, config_to_resume, evidence


@dataclass(frozen=True)
class Config:
    steps: int = 4
    lr: float = 0.5
    nothing: float = float("nan")


def run(root: Path, until: int, resume: bool = False) -> RunDir:
    """A training loop in four lines: a weight that grows, a checkpoint at every second step."""
    rundir = RunDir.create(root, "run", Config(), resume=resume)
    found = rundir.checkpoints.latest()
    weight, start = (found.tensors["w"], found.step) if found is not None else (torch.zeros(1), 0)
    for step in range(start + 1, until + 1):
        weight = weight + 1
        rundir.metrics.log(step, weight=float(weight))
        if step % 2 == 0:
            rundir.checkpoints.save(step, {"w": weight}, {})
    rundir.metrics.close()
    return rundir


def test_a_run_holds_its_config_and_its_surroundings(tmp_path: Path) -> None:
    rundir = RunDir.create(tmp_path, "run", Config(lr=0.25))
    assert rundir.path == tmp_path / "run"
    assert load_config(Config, rundir.path / "config.toml").lr == 0.25
    assert set(json.loads((rundir.path / "env.json").read_text())) == set(evidence())


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = run(tmp_path / "a", until=6)
    run(tmp_path / "b", until=3)  # step 3 is logged but not in a checkpoint
    resumed = run(tmp_path / "b", until=6, resume=True)
    assert read_metrics(resumed.path / "metrics.jsonl") == read_metrics(whole.path / "metrics.jsonl")
    one, other = whole.checkpoints.latest(), resumed.checkpoints.latest()
    assert one is not None and other is not None and torch.equal(one.tensors["w"], other.tensors["w"])


def test_a_key_that_an_older_version_did_not_write_has_its_default(tmp_path: Path) -> None:
    file = RunDir.create(tmp_path, "run", Config()).path / "config.toml"
    lines = [line for line in file.read_text().splitlines() if not line.startswith("lr")]
    assert len(lines) == len(file.read_text().splitlines()) - 1
    file.write_text("\n".join(lines) + "\n")
    assert RunDir.create(tmp_path, "run", Config(), resume=True).path == file.parent
    with pytest.raises(UsageError, match="changed config: lr"):
        RunDir.create(tmp_path, "run", Config(lr=0.25), resume=True)


def test_a_run_is_resumed_by_its_own_config_unless_another_is_given(tmp_path: Path) -> None:
    own = RunDir.create(tmp_path, "run", Config(lr=0.25)).path / "config.toml"
    assert config_to_resume(tmp_path, "run", None) == own
    assert config_to_resume(tmp_path, "run", Path("other.toml")) == Path("other.toml")
    assert config_to_resume(tmp_path, "none", None) is None


def test_each_start_of_a_run_is_recorded(tmp_path: Path) -> None:
    run(tmp_path, until=2)
    run(tmp_path, until=3, resume=True)
    rundir = run(tmp_path, until=4, resume=True)
    assert len(json.loads((rundir.path / "env.json").read_text())["resumed"]) == 2


def test_a_run_resumed_before_its_first_checkpoint_starts_over(tmp_path: Path) -> None:
    run(tmp_path, until=1)
    assert [line["step"] for line in read_metrics(run(tmp_path, until=3, resume=True).metrics.path)] == [1, 2, 3]


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    run(tmp_path, until=1)
    with pytest.raises(UsageError, match="exists already"):
        RunDir.create(tmp_path, "run", Config())


def test_a_changed_config_is_refused_with_the_keys(tmp_path: Path) -> None:
    run(tmp_path, until=1)
    with pytest.raises(UsageError, match=r"lr \(0\.5 -> 0\.1\)") as caught:
        RunDir.create(tmp_path, "run", Config(lr=0.1), resume=True)
    assert "steps" not in str(caught.value) and "nothing" not in str(caught.value)


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to resume"):
        RunDir.create(tmp_path, "run", Config(), resume=True)


@pytest.mark.parametrize("name", ["", "..", "a/b", "/tmp"])
def test_a_run_name_is_one_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="folder name"):
        RunDir.create(tmp_path, name, Config())


def test_evidence_names_command_seed_versions_hardware_git_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found = evidence(seed=5)
    assert list(found) == ["command", "seed", "versions", "hardware", "git", "started"]
    assert found["seed"] == 5
    assert {"python", "torch", "expkit"} <= set(found["versions"])
    assert found["hardware"]["cores"] >= 1 and found["hardware"]["cpu"] and found["hardware"]["memory"] > 0
    assert abs((datetime.now(UTC) - datetime.fromisoformat(found["started"])).total_seconds()) < 60
    json.dumps(found)


@pytest.mark.parametrize(
    ("module", "argv", "shown"),
    [
        (None, ["/usr/bin/tool", "run", "a b"], "tool run 'a b'"),
        (None, ["tools/plot.py", "--x"], "python tools/plot.py --x"),
        (None, ["/somewhere/plot.py"], "python plot.py"),
        ("package.__main__", ["/somewhere/package/__main__.py", "run"], "python -m package run"),
        ("package.tool", ["/somewhere/package/tool.py"], "python -m package.tool"),
    ],
)
def test_the_command_reads_as_a_user_types_it(
    monkeypatch: pytest.MonkeyPatch, module: str | None, argv: list[str], shown: str
) -> None:
    main = ModuleType("__main__")
    main.__spec__ = ModuleSpec(module, None) if module is not None else None
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert evidence()["command"] == shown


def test_the_command_of_several_processes_names_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    main = ModuleType("__main__")
    main.__spec__ = None
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/tool", "train"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert evidence()["command"] == "torchrun --nproc-per-node 2 --no-python tool train"


def test_git_is_that_of_the_current_folder_else_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, elsewhere = tmp_path / "code", tmp_path / "elsewhere"
    code.mkdir()
    elsewhere.mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(rundir, "_SOURCE", code)
    monkeypatch.chdir(elsewhere)
    assert evidence()["git"] is None
    monkeypatch.setenv("EXPKIT_COMMIT", "5eed")
    assert evidence()["git"] == {"sha": "5eed", "dirty": None}  # a repository tells more
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    (code / "file").write_text("a")
    for arguments in (["init"], ["add", "file"], ["commit", "-m", "first"]):
        subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, cwd=code)
    found = evidence()["git"]
    assert len(found["sha"]) == 40 and found["dirty"] is False
    monkeypatch.chdir(code)
    (code / "file").write_text("b")
    assert evidence()["git"] == {"sha": found["sha"], "dirty": True}


def test_a_run_that_never_came_to_a_checkpoint_leaves_its_name_free(tmp_path: Path) -> None:
    for begun in (True, False):
        run = RunDir.create(tmp_path, "a", Config())
        run.metrics.close()
        if begun:
            run.checkpoints.save(1, {"weight": torch.zeros(1)}, {})
        run.discard_unbegun()
        assert run.path.exists() is begun
        shutil.rmtree(run.path, ignore_errors=True)
