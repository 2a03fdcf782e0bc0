"""The demo, on a tiny model in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coral_spec.commands import demo
from expkit.errors import UsageError
from tiny import tiny_target


@pytest.fixture
def folder(tmp_path: Path) -> str:
    target = tiny_target()
    target.model.save_pretrained(tmp_path / "tiny")
    target.tokenizer.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def test_the_demo_shows_the_same_words_twice_and_says_where_the_chart_is(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot, figures = tmp_path / "demo.png", tmp_path / "demo.json"
    assert demo.run(model=folder, prompts=1, max_new_tokens=8, dtype="fp32", device="cpu", plot=plot, json=figures) == 0
    shown = capsys.readouterr().out
    plain, drafted = (part.split("\n")[1] for part in shown.split("--- ")[2:])
    assert plain == drafted
    assert f"chart: {plot}" in shown and plot.is_file()
    assert [run["method"] for run in json.loads(figures.read_text())["runs"]] == ["hf", "ar", "ngram"]


def test_a_slow_machine_ends_the_demo_early(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "BUDGET_SECONDS", 0.0)
    assert demo.run(model=folder, max_new_tokens=4, dtype="fp32", device="cpu", plot=tmp_path / "demo.png") == 0
    assert "ends after 1 of 3 prompts" in capsys.readouterr().out


def test_no_prompt_is_no_demo() -> None:
    with pytest.raises(UsageError, match="prompts is 0"):
        demo.run(prompts=0)
