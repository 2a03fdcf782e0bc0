"""The command line: figures where promised, one line and exit code 2 on wrong use, a quick --help."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coral_spec.cli import build
from drafting import save_drafter
from expkit.cli import main
from tiny import tiny_target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    target = tiny_target(context=2048)
    target.model.save_pretrained(path)
    target.tokenizer.save_pretrained(path)
    return str(path)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(build(), list(arguments))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_generate_streams_the_text_and_ends_with_figures(folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["generate", "hello", "--model", folder, "--max-new-tokens", "12", "--compare", "--json", str(out)]
    assert run(*arguments) == 0
    shown = capsys.readouterr()
    record = json.loads(out.read_text())
    assert shown.out == record["text"] + "\n"
    assert "tokens/s" in shown.err and "plain decoding (the same tokens)" in shown.err
    assert {"command", "seed", "versions", "hardware", "git", "started"} < record.keys()
    assert record["statistics"]["new_tokens"] <= 12


def test_generate_reads_the_prompt_from_standard_input(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert run("generate", "-", "--model", folder, "--max-new-tokens", "6") == 0
    piped = capsys.readouterr().out
    assert run("generate", "hello", "--model", folder, "--max-new-tokens", "6") == 0
    assert capsys.readouterr().out == piped


def test_chat_answers_every_line(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand more\n"))
    assert run("chat", "--model", folder, "--max-new-tokens", "6") == 0
    assert capsys.readouterr().err.count("tokens/s") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "hi", "--max-new-tokens", "-3"], "max_new_tokens is -3"),
        (["generate", "hi", "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "hi", "--tree", "big"], "DEPTH,WIDTH,BUDGET"),
        (["generate", "hi", "--model", "no/such/folder/at/all"], "no/such/folder/at/all"),
        (["generate", "hi", "--model", "FOLDER", "--draft", "nowhere"], "nowhere"),
        (["generate", "hello " * 1500, "--model", "FOLDER"], "2048"),
        (["generate", "hi", "--nonsense"], "--nonsense"),
        (["bench", "--tasks", "poems"], "poems"),
        (["bench", "--methods", "magic"], "magic"),
        (["train", "--config", "missing.toml"], "missing.toml"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments, said, folder, capsys):
    assert run(*(folder if each == "FOLDER" else each for each in arguments)) == 2
    message = capsys.readouterr().err.strip()
    assert said in message and "Traceback" not in message
    assert message.count("\n") == 0


def test_a_drafter_for_another_model_is_refused(folder, tmp_path, capsys):
    drafter = save_drafter(tiny_target(width=64), tmp_path)
    assert run("generate", "hi", "--model", folder, "--draft", str(drafter)) == 2
    assert "width is 64" in capsys.readouterr().err


@pytest.mark.slow
def test_help_is_quick():
    """Nothing heavy is imported; the best of a few, since other work may run beside the tests."""
    command = [sys.executable, "-m", "coral_spec", "--help"]
    times = []
    for _ in range(3):
        started = time.perf_counter()
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - started)
    assert "generate" in shown.stdout
    assert min(times) < 2.0


@pytest.mark.slow
def test_control_c_ends_the_answer_with_its_figures(folder):
    command = [sys.executable, "-u", "-m", "coral_spec", "generate", "hello", "--model", folder, "--ignore-eos"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "1900", "--draft", "none"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    assert process.stdout is not None
    process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"interrupted" in errors and b"Traceback" not in errors


def test_readme_commands_and_python_run(folder, tmp_path, monkeypatch, capsys):
    """Every command of the README but the installation, with tiny models where it names real ones."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = text.split("```")[1::2]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("coral-spec ")]
    assert len(lines) >= 9
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text("".join(f'{{"prompt": "tell me about {number}"}}\n' for number in range(12)))
    config = next(block for block in blocks if block.startswith("toml")).removeprefix("toml")
    settings = "\n[evaluation]\nprompts = 2\nevery = 2\n[batch]\ntokens = 512\n[router]\nsteps = 2\n"
    Path("drafter.toml").write_text(config.replace("MODEL", folder).replace("6000", "2") + settings)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert run("generate", "hi", "--model", folder, "--max-new-tokens", "2") == 0
    short = {
        "generate": ["--max-new-tokens", "6"],
        "chat": ["--max-new-tokens", "6"],
        "bench": ["--max-new-tokens", "4", "--limit", "1", "--methods", "hf,ar,ngram"],
        "check": ["--max-new-tokens", "4", "--limit", "1"],
        "demo": ["--max-new-tokens", "4", "--prompts", "1"],
        "data": ["--max-new-tokens", "12"],
        "eval": ["--max-new-tokens", "4", "--limit", "1"],
    }
    for line in lines:
        words = [folder if word == "MODEL" else word for word in shlex.split(line)[1:]]
        if words[0] in ("generate", "chat", "bench", "check", "demo") and "--model" not in words:
            words += ["--model", folder]
        assert run(*words, *short.get(words[0], [])) == 0, (line, capsys.readouterr().err)
    python = next(block for block in blocks if block.startswith("python")).removeprefix("python")
    exec(compile(python.replace("smollm2-135m", folder), "README.md", "exec"), {})


@pytest.mark.parametrize("name", ["nowhere/out.json", "out.txt", "folder.json"])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_loaded(name, tmp_path, capsys):
    (tmp_path / "folder.json").mkdir()
    assert run("generate", "hello", "--model", "no-such-model", "--json", str(tmp_path / name)) == 2
    assert "--json is" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()
