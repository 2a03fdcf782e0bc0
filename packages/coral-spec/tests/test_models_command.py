from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from coral_spec.commands import models
from coral_spec.targets.aliases import ALIASES


def test_models_lists_every_alias_and_writes_the_same_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORAL_SPEC_HOME", str(tmp_path / "home"))
    app = typer.Typer()
    app.command()(models.run)
    result = CliRunner().invoke(app, ["--json", str(tmp_path / "models.json")])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "models.json").read_text())
    assert [row["alias"] for row in written["models"]] == list(ALIASES)
    assert not any(row["cached"] for row in written["models"])
    assert {"command", "seed", "versions", "hardware", "git", "started"} <= written.keys()
    for name, alias in ALIASES.items():
        assert name in result.output and alias.parts[0].requirement in result.output


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from coral_spec.targets.home import home_folder

    monkeypatch.setenv("CORAL_SPEC_HOME", str(tmp_path / "own"))
    assert home_folder() == tmp_path / "own"
    monkeypatch.delenv("CORAL_SPEC_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert home_folder() == tmp_path / "cache" / "coral-spec"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home_folder() == tmp_path / ".cache" / "coral-spec"
