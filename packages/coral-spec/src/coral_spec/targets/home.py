"""The user's cache: where it is, what lies where in it, and one preparation at a time.

* `<home>/models/<name>/`: converted models, whole or absent
* `<home>/downloads/`: wheels and GGUF files that the user brought; read, never written or removed
* `<home>/fetched/`: wheels that were downloaded; removed once the model is converted
* `<home>/drafters/<name>/`: drafters that were fetched from a release, whole or absent
* `<home>/timings/`: what rounds cost on this machine; may be removed at any time
* `<home>/tmp/`: work in progress; cleared by the next preparation, since a killed one may leave some
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from expkit.errors import UsageError


def home_folder() -> Path:
    """`$CORAL_SPEC_HOME`, else `coral-spec` in `$XDG_CACHE_HOME` or in `~/.cache`; it need not exist yet."""
    chosen = os.environ.get("CORAL_SPEC_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "coral-spec"


def models_folder() -> Path:
    """Where converted models are."""
    return home_folder() / "models"


def downloads_folder() -> Path:
    """Where a user without network puts wheels or GGUF files by hand."""
    return home_folder() / "downloads"


def fetched_folder() -> Path:
    """Where whole wheels wait for their conversion, so that an interrupted preparation need not fetch them again."""
    return home_folder() / "fetched"


def drafters_folder() -> Path:
    """Where fetched drafters are."""
    return home_folder() / "drafters"


def timings_folder() -> Path:
    """Where measured step costs are kept."""
    return home_folder() / "timings"


@contextmanager
def preparation() -> Iterator[Path]:
    """Hold the cache's lock and yield an empty folder for work in progress, removed at the end.

    The lock is the operating system's, so that a killed process releases it; a second process waits here.

    Raises:
        UsageError: the cache cannot be written to.
    """
    from filelock import FileLock, Timeout

    home = home_folder()
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = FileLock(home / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            from expkit.cli import console

            console().print("waiting for another process that is preparing a model ...")
            lock.acquire()
    except OSError as error:
        raise _unwritable(home, error) from None
    try:
        try:
            _clear_leftovers(home)
            work = Path(tempfile.mkdtemp(prefix="work-", dir=home / "tmp"))
        except OSError as error:
            raise _unwritable(home, error) from None
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        lock.release()


def _clear_leftovers(home: Path) -> None:
    """Remove what a killed preparation left; only to be called with the lock held."""
    shutil.rmtree(home / "tmp", ignore_errors=True)
    for leftover in models_folder().glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    (home / "tmp").mkdir(exist_ok=True)


def _unwritable(home: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot write to the cache {home} ({error.strerror or error}); set CORAL_SPEC_HOME to a folder")
