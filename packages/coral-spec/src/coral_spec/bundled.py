"""Trained drafters of known models: in this package, in a checkout beside it, or fetched from a release of it.

Drafters whose terms or size keep them out of the wheel lie in the repository's ``drafters`` folder, and as one archive
each among the files of the package's release. An archive counts only with the digest that is written here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coral_spec.download import download
from coral_spec.drafter import DrafterConfig
from coral_spec.targets.home import downloads_folder, drafters_folder, preparation
from expkit.errors import UsageError

if TYPE_CHECKING:
    from coral_spec.targets import Target

PACKAGED = Path(__file__).parent / "drafters"
CHECKOUT = Path(__file__).parents[2] / "drafters"


@dataclass(frozen=True)
class Release:
    """A drafter outside the wheel.

    Attributes:
        file: the archive's name; its members are the files of a drafter's folder.
        sha256: its hexadecimal digest; nothing else is ever used.
        license: terms of the weights.
    """

    file: str
    sha256: str
    license: str


RELEASED: dict[str, Release] = {}  # by alias


def folders() -> Iterator[Path]:
    """Every trained drafter that this machine has for a known model."""
    places = [PACKAGED, *([CHECKOUT] if (CHECKOUT.parent / "pyproject.toml").is_file() else []), drafters_folder()]
    for place in places:
        yield from sorted(path.parent for path in place.glob("*/config.json"))


def bundled_drafter(target: Target) -> Path | None:
    """Folder of the drafter that fits ``target``'s sizes and tokenizer; None without one."""
    needed = DrafterConfig.from_target(target)
    for folder in folders():
        config = DrafterConfig.from_json(folder / "config.json")
        if (config.hidden_size, config.vocab_size, config.tokenizer_hash) == (
            needed.hidden_size,
            needed.vocab_size,
            needed.tokenizer_hash,
        ):
            return folder
    return None


def fetch_drafter(alias: str, url: str | None = None) -> Path:
    """Bring a released drafter into the user's cache.

    Args:
        alias: whose drafter.
        url: the folder of the release's files; by default that of the project's own releases. An archive that the
            user has put into the downloads folder comes first.

    Returns:
        its folder; :func:`bundled_drafter` finds it from now on.

    Raises:
        UsageError: no such drafter is released, it cannot be had, or what came is not the file that is expected.
    """
    if alias not in RELEASED:
        known = ", ".join(RELEASED) or "none"
        raise UsageError(f"no drafter for {alias!r} is released apart from the package; released: {known}")
    release = RELEASED[alias]
    folder, brought = drafters_folder() / alias, downloads_folder() / release.file
    with preparation() as work:
        archive = brought if brought.is_file() else work / release.file
        if archive == brought:
            _require_digest(release, brought)
        else:
            base = url or _releases()
            if base is None:
                raise UsageError(f"this installation does not know its releases: give --url, or put {brought} there")
            verify = lambda path: _require_digest(release, path)  # noqa: E731
            download(f"{base.rstrip('/')}/{release.file}", archive, verify=verify, what=f"the drafter of {alias}")
        unpacked = work / alias
        unpacked.mkdir()
        with zipfile.ZipFile(archive) as packed:
            for member in packed.namelist():
                (unpacked / Path(member).name).write_bytes(packed.read(member))
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            unpacked.rename(folder)
    return folder


def _require_digest(release: Release, path: Path) -> None:
    with path.open("rb") as source:
        digest = hashlib.file_digest(source, "sha256").hexdigest()
    if digest != release.sha256:
        raise UsageError(f"{path}: the SHA-256 is {digest}, expected {release.sha256}; fetch it again")


def _releases() -> str | None:
    """Where the files of this version's release are, by the package's own metadata."""
    try:
        about = importlib.metadata.metadata("coral-spec")
    except importlib.metadata.PackageNotFoundError:
        return None
    urls = dict(each.split(", ", 1) for each in about.get_all("Project-URL") or [])
    return f"{urls['Releases'].rstrip('/')}/download/coral-spec-{about['Version']}" if "Releases" in urls else None
