from __future__ import annotations

import io
import subprocess
import sys
import warnings
from importlib import metadata

import pytest
import typer
from rich.console import Console

from expkit import cli
from expkit.errors import UsageError


def make() -> typer.Typer:
    app = cli.make_app("tool", "A tool for tests.", "typer")

    @app.command()
    def work(limit: int = 3) -> None:
        """Do the work."""
        if limit < 0:
            raise UsageError(f"limit {limit} is negative;\nuse 0 or more")
        typer.echo(f"done {limit}")

    @app.command()
    def crash() -> None:
        raise RuntimeError("broken\nin two lines")

    @app.command()
    def interrupt() -> None:
        raise KeyboardInterrupt

    @app.command()
    def fail() -> int:
        return 1

    @app.command()
    def warn() -> None:
        warnings.warn("slow here:\nthe usual path is taken", stacklevel=1)

    @app.command()
    def echo(words: list[str]) -> None:
        typer.echo(" ".join(words))

    return app


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(make(), arguments)
    out, err = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, out, err


def test_a_command_that_works_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "work", "--limit", "2") == (0, "done 2\n", "")


def test_wrong_use_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "work", "--limit", "-1") == (2, "", "error: limit -1 is negative; use 0 or more\n")


def test_without_arguments_there_is_help_and_no_error_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys)
    assert code == 2 and "Usage" in out + err and "error:" not in err


@pytest.mark.parametrize("arguments", [("work", "--limt", "1"), ("wrok",), ("work", "--limit", "x")])
def test_what_typer_refuses_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    code, out, err = call(capsys, *arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_a_crash_is_one_line_with_a_hint_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "crash")
    assert code == 1 and err == "error: RuntimeError: broken in two lines (--debug shows the traceback)\n"


@pytest.mark.parametrize("arguments", [("--debug", "crash"), ("crash", "--debug")])
def test_debug_shows_the_traceback_from_either_place(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    code, _, err = call(capsys, *arguments)
    assert code == 1 and "Traceback" in err and 'raise RuntimeError("broken' in err


def test_what_stands_after_a_double_dash_is_not_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "echo", "--", "--debug")[:2] == (0, "--debug\n")


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "warn") == (0, "", "warning: slow here: the usual path is taken\n")


def test_ctrl_c_exits_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "interrupt")[0] == 130


def test_the_int_a_command_returns_is_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "fail")[0] == 1


def test_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version")[:2] == (0, f"tool {metadata.version('typer')}\n")


def test_version_copes_with_a_source_tree(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(cli.make_app("tool", "Help.", "no-such-distribution"), ["--version"])
    assert "not installed" in capsys.readouterr().out


def test_help_shows_the_text_and_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0 and "A tool for tests." in out and "Do the work." in out and "--debug" in out


def test_importing_the_command_line_does_not_import_torch() -> None:
    code = "import sys, expkit.cli, expkit.config, expkit.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_console_writes_to_stderr() -> None:
    assert cli.console().stderr


def test_without_a_terminal_progress_prints_a_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with cli.progress() as progress:
        task = progress.add_task("reading", total=3)
        for _ in range(3):
            progress.advance(task)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("reading 3/3")


def test_without_a_terminal_long_work_prints_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_PLAIN_INTERVAL", 0.0)
    with cli.progress() as progress:
        task = progress.add_task("reading", total=3)
        progress.update(task, completed=1)
        progress.update(task, advance=1)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["1/3", "2/3"]


def test_on_a_terminal_progress_shows_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(cli, "console", lambda: terminal)
    with cli.progress() as progress:
        task = progress.add_task("reading", total=2)
        progress.advance(task)
        progress.advance(task)
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "2/2" in shown and "/s" in shown and "0:00:00" in shown
