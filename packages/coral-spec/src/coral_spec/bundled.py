"""Trained drafters of known models: in this package, in the checkout it is from, or fetched from a release of it.

Drafters whose terms or size keep them out of the wheel lie in the repository's ``drafters`` folder, and as one archive
each among the files of the package's release. An archive counts only if its files have the digest that is written here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from coral_spec.download import download
from coral_spec.drafter import DrafterConfig
from coral_spec.targets.home import downloads_folder, drafters_folder, preparation
from expkit.errors import UsageError

if TYPE_CHECKING:
    from coral_spec.targets import Target

PACKAGED = Path(__file__).parent / "drafters"
SOURCE = Path(__file__).parents[2]  # of the project, where the package runs from a checkout


@dataclass(frozen=True)
class Release:
    """A drafter outside the wheel.

    Attributes:
        file: the archive's name; its members are the files of a drafter's folder.
        digest: of these files, see :func:`digest`; nothing else is ever used.
        license: terms of the weights.
    """

    file: str
    digest: str
    license: str


RELEASED: dict[str, Release] = {  # by alias
    "gemma3-270m": Release(
        file="gemma3-270m-drafter-1.zip",
        digest="5c00bac6a87e410b38f1a575dd3a46d9d692a1daf894076ead31c50fda44856f",
        license="Gemma terms of use",
    )
}


def folders() -> Iterator[Path]:
    """Every trained drafter that this machine has for a known model."""
    checkout = _checkout()
    for place in (PACKAGED, *([checkout / "drafters"] if checkout else []), drafters_folder()):
        yield from sorted(path.parent for path in place.glob("*/config.json"))


def _checkout() -> Path | None:
    """The project's folder that this package runs from or was installed from, by what pip has noted of it (PEP 610)."""
    if (SOURCE / "pyproject.toml").is_file():
        return SOURCE
    try:
        noted = importlib.metadata.distribution("coral-spec").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    origin = json.loads(noted) if noted else {}
    return Path(url2pathname(urlsplit(origin["url"]).path)) if "dir_info" in origin else None


def bundled_drafter(target: Target) -> Path | None:
    """Folder of the drafter that fits ``target``'s sizes and tokenizer; None without one."""
    needed = DrafterConfig.from_target(target)
    for folder in folders():
        try:
            config = DrafterConfig.from_json(folder / "config.json")
        except UsageError as error:
            warnings.warn(f"{error}: this drafter is left out", stacklevel=2)
            continue
        if (config.hidden_size, config.vocab_size, config.tokenizer_hash) == (
            needed.hidden_size,
            needed.vocab_size,
            needed.tokenizer_hash,
        ):
            return folder
    return None


def digest(files: Mapping[str, bytes]) -> str:
    """Of a folder's files by name: the SHA-256 of their names and SHA-256, a line each, in the order of names."""
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def fetch_drafter(alias: str, url: str | None = None) -> Path:
    """Bring a released drafter into the user's cache.

    Args:
        alias: whose drafter.
        url: the folder of the release's files; by default that of the project's own releases. An archive that the
            user has put into the downloads folder comes first.

    Returns:
        its folder; :func:`bundled_drafter` finds it from now on. One that is there already is not fetched again, one of
        another release is replaced.

    Raises:
        UsageError: no such drafter is released, it cannot be had, or what came is not the file that is expected.
    """
    if alias not in RELEASED:
        known = ", ".join(RELEASED) or "none"
        raise UsageError(f"no drafter for {alias!r} is released apart from the package; released: {known}")
    release = RELEASED[alias]
    folder, brought = drafters_folder() / alias, downloads_folder() / release.file
    with preparation() as work:
        if folder.is_dir() and digest({each.name: each.read_bytes() for each in folder.iterdir()}) == release.digest:
            return folder
        if brought.is_file():
            files = _read(release, brought)
        else:
            base = url or _releases()
            if base is None:
                raise UsageError(f"this installation does not know its releases: give --url, or put {brought} there")
            archive = work / release.file
            source, what = f"{base.rstrip('/')}/{release.file}", f"the drafter of {alias}"
            download(source, archive, verify=lambda path: None, what=what, brought=brought)
            files = _read(release, archive)
        unpacked = work / alias
        unpacked.mkdir()
        for name, content in files.items():
            (unpacked / name).write_bytes(content)
        folder.parent.mkdir(exist_ok=True)
        if folder.exists():
            folder.rename(work / "replaced")
        unpacked.rename(folder)
    return folder


def _read(release: Release, path: Path) -> dict[str, bytes]:
    """The files of a released archive by name."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [each for each in archive.namelist() if not each.endswith("/")]
            files = {PurePosixPath(name).name: archive.read(name) for name in names}
    except (zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path} is no whole archive ({error}); fetch it again") from None
    found = digest(files)
    if found != release.digest:
        raise UsageError(f"{path}: the digest of its files is {found}, expected {release.digest}; fetch it again")
    return files


def _releases() -> str | None:
    """Where the files of this version's release are, by the package's own metadata."""
    try:
        about = importlib.metadata.metadata("coral-spec")
    except importlib.metadata.PackageNotFoundError:
        return None
    urls = dict(each.split(", ", 1) for each in about.get_all("Project-URL") or [])
    return f"{urls['Releases'].rstrip('/')}/download/coral-spec-{about['Version']}" if "Releases" in urls else None
