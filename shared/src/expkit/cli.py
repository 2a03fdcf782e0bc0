"""One command-line manner for every package: typer, one-line errors, exit codes.

0: done. 1: the work failed. 2: wrong use.

Nothing heavy is imported here, so `--help` is quick; commands import what they need when they run.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from expkit.errors import UsageError

_PLAIN_INTERVAL = 10.0  # seconds between progress lines where there is no terminal


def make_app(name: str, help: str, distribution: str) -> typer.Typer:
    """A typer app with `--version` and `--debug`; add commands to it and start it with `main`.

    Args:
        name: the command as the user types it.
        help: one paragraph for `--help`.
        distribution: the installed distribution whose version `--version` prints.
    """
    app = typer.Typer(name=name, help=help, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"{name} {_version(distribution)}")
            raise typer.Exit

    @app.callback()
    def root(
        version: bool = typer.Option(
            False, "--version", callback=show_version, is_eager=True, help="Print the version and exit."
        ),
        debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    ) -> None:
        pass

    root.__doc__ = help
    return app


def main(app: typer.Typer, argv: Sequence[str] | None = None) -> NoReturn:
    """Run the app and exit the process; a command may return an int as its exit code.

    Wrong use (UsageError, or an option the app does not know) prints "error: ..." on stderr and exits with 2;
    Ctrl-C with 130; anything else with 1 and a hint at --debug. `--debug` is understood anywhere before `--`. Warnings
    are a line each on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in before
    arguments = [each for each in before if each != "--debug"] + arguments[len(before) :]
    if not debug:
        warnings.showwarning = _show_warning
    try:
        result = app(arguments, standalone_mode=False, prog_name=app.info.name)
        code = result if isinstance(result, int) and not isinstance(result, bool) else 0
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 0
    except Exception as error:
        code = _report(error, debug)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone (`| head`): nothing is left to be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def console() -> Console:
    """A rich console on stderr: stdout is for results. Lines are the terminal's to wrap, and whole in a log."""
    return Console(stderr=True, soft_wrap=True)


def progress() -> Progress:
    """A progress display on stderr with rate and time left; without a terminal, a plain line now and then."""
    return _Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total}"),
        _RateColumn(),
        TimeRemainingColumn(),
        console=console(),
    )


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(source tree, not installed)"


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Without the place in the code, which says nothing to a user."""
    print("warning:", " ".join(str(message).split()), file=sys.stderr)


def _report(error: Exception, debug: bool) -> int:
    """Print an error in one line (its traceback first, if asked) and return the exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, typer.Abort):
        return 130 if isinstance(error.__cause__, KeyboardInterrupt) else 1
    if isinstance(error, UsageError):
        _print_error(str(error))
        return 2
    # typer's own errors: their class lives in click or inside typer, depending on typer's version.
    describe = getattr(error, "format_message", None)
    if describe is not None:
        if describe():  # without arguments the help was printed, and there is no more to say
            _print_error(describe())
        return int(getattr(error, "exit_code", 2))
    hint = "" if debug else " (--debug shows the traceback)"
    _print_error(f"{type(error).__name__}: {error}{hint}")
    return 1


def _print_error(message: str) -> None:
    print("error:", " ".join(message.split()), file=sys.stderr)


class _RateColumn(ProgressColumn):
    """Steps per second of a task."""

    def render(self, task: Task) -> Text:
        return Text(_rate(task), style="progress.data.speed")


def _rate(task: Task) -> str:
    speed = task.finished_speed or task.speed
    return f"{speed:.1f}/s" if speed else "-/s"


class _Progress(Progress):
    """rich's progress, which prints plain lines instead where it could not redraw them."""

    def __init__(self, *columns: ProgressColumn, console: Console) -> None:
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self._due = time.monotonic() + _PLAIN_INTERVAL

    def stop(self) -> None:
        if not self.disable:  # rich before 14 ends even a disabled display with an empty line
            super().stop()

    def advance(self, task_id: Any, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._plain_line(task_id)

    def update(self, task_id: Any, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._plain_line(task_id)

    def _plain_line(self, task_id: Any) -> None:
        if not self.disable:
            return
        task = next(each for each in self.tasks if each.id == task_id)
        done = task.total is not None and task.completed >= task.total
        if time.monotonic() < self._due and not done:
            return
        self._due = time.monotonic() + _PLAIN_INTERVAL
        left = f", {task.time_remaining:.0f} s left" if task.time_remaining else ""
        print(f"{task.description} {task.completed:.0f}/{task.total} {_rate(task)}{left}", file=sys.stderr)
