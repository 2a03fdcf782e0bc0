"""Where data sets are looked for: `--data-dir`, then EXPKIT_DATA, then the user's cache; only then the network."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Home:
    """Folders to look in, best first.

    Attributes:
        folders: each may hold data sets in their published layout.
        cache: where a download goes (the last of `folders`).
        download: whether the network may be used.
    """

    folders: tuple[Path, ...]
    cache: Path
    download: bool = True

    @classmethod
    def of(cls, data_dir: Path | None = None, *, download: bool = True) -> Home:
        """The folders of this machine."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pden"
        named = [data_dir, os.environ.get("EXPKIT_DATA") or None]
        return cls((*(Path(each) for each in named if each is not None), cache), cache, download)

    def find(self, *names: str) -> Path | None:
        """The first of these relative paths that exists, in the order of the folders."""
        for folder in self.folders:
            for name in names:
                if (folder / name).exists():
                    return folder / name
        return None
