"""Where data is looked for: --data-dir, EXPKIT_DATA, the user's cache, and only then its official home."""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from expkit.checkpoint import atomic_path
from expkit.cli import progress
from expkit.errors import UsageError

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Archive:
    """A published download.

    Attributes:
        name: the file, or the folder that the archive unpacks to.
        url: its official home.
        md5: of the download.
    """

    name: str
    url: str
    md5: str


def folders(data_dir: Path | None) -> list[Path]:
    """Where to look, in order; UsageError for a folder that was named and is none."""
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UsageError(f"the data folder {data_dir} does not exist")
    found = [] if data_dir is None else [Path(data_dir)]
    if os.environ.get("EXPKIT_DATA"):
        found.append(Path(os.environ["EXPKIT_DATA"]))
    return [*found, cache()]


def cache() -> Path:
    """The user's folder for downloads."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "expkit" / "data"


def locate(archive: Archive, data_dir: Path | None) -> Path:
    """The file or folder on this machine, fetched if need be.

    Raises:
        UsageError: it is nowhere, and cannot be fetched or is not what was published.
    """
    for folder in folders(data_dir):
        for candidate in (folder / archive.name, folder):
            if candidate.name == archive.name and candidate.exists():
                return candidate
    return download(archive, cache())


def download(archive: Archive, folder: Path) -> Path:
    """Fetch, check, unpack aside and move into `folder`: what has its name there is whole.

    Raises:
        UsageError: it cannot be fetched, is not what was published, or holds no such folder.
    """
    print(f"fetching {archive.url}", file=sys.stderr)
    target, file = folder / archive.name, Path(archive.url).name
    looked = [str(each) for each in folders(None)]
    if archive.name == file:
        with atomic_path(target) as temporary:
            _fetch(archive, temporary, looked)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as aside, atomic_path(target) as temporary:
        packed = Path(aside) / file
        _fetch(archive, packed, looked)
        _unpack(packed, Path(aside) / "unpacked")
        whole = Path(aside) / "unpacked" / archive.name
        if not whole.is_dir():
            raise UsageError(f"{archive.url} holds no folder {archive.name}")
        whole.rename(temporary)
    return target


def _unpack(packed: Path, folder: Path) -> None:
    if packed.suffix == ".zip":
        with zipfile.ZipFile(packed) as content:
            content.extractall(folder)
    else:
        with tarfile.open(packed) as tar:
            tar.extractall(folder, filter="data")


def _fetch(archive: Archive, path: Path, looked: list[str]) -> None:
    digest = hashlib.md5()
    try:
        with urllib.request.urlopen(archive.url, timeout=60) as answer, path.open("wb") as file, progress() as bar:
            task = bar.add_task(archive.name, total=int(answer.headers.get("Content-Length") or 0) // _CHUNK or None)
            while piece := answer.read(_CHUNK):
                file.write(piece)
                digest.update(piece)
                bar.advance(task)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise UsageError(
            f"{archive.name} is not in {', '.join(looked)}, and {archive.url} cannot be fetched ({error}); "
            "name its folder with --data-dir"
        ) from None
    if digest.hexdigest() != archive.md5:
        raise UsageError(
            f"{archive.url} gave something else than was published: MD5 {digest.hexdigest()}, expected {archive.md5}"
        )
