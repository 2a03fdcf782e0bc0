"""Every command of the README but the installation runs as it is written, and so does its Python."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from PIL import Image

from expkit.cli import main
from pden.cli import build

README = Path(__file__).parents[1] / "README.md"
SHORT = {
    "train": ["--set", "pretrain_steps=20", "--set", "round_steps=8", "--set", "gate.mode=record"],
    "demo": ["--rounds", "1"],
}


def run(words: list[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(build(), words)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.mark.slow
def test_readme_commands_and_python_run(tmp_path, monkeypatch, capsys):
    blocks = README.read_text(encoding="utf-8").split("```")[1::2]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("pden ")]
    assert {line.split()[1] for line in lines} == {"train", "eval", "predict", "gallery", "expand", "compare", "demo"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "IMAGES").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "IMAGES" / "a.png")
    for line in lines[1:]:  # the first is the demo, which comes again at the end
        words = shlex.split(line)[1:]
        assert run([*words, *SHORT.get(words[0], [])]) == 0, (line, capsys.readouterr().err)
    python = next(block for block in blocks if block.startswith("python")).removeprefix("python")
    exec(compile(python, str(README), "exec"), {"__name__": "readme"})
    assert run(["eval", "runs/mine", "--target", "digits-thick"]) == 0, capsys.readouterr().err
    assert (tmp_path / "table.tex").is_file()
    demo = json.loads((tmp_path / "demo.json").read_text())["methods"]
    assert set(demo) == {"erm", "pden"} and all(len(each["targets"]) == 5 for each in demo.values())
    for method in demo.values():
        assert method["average"] == pytest.approx(sum(method["targets"].values()) / 5)
    assert (tmp_path / "pden-demo" / "gallery.png").is_file() and (tmp_path / "pden-demo" / "chart.png").is_file()
