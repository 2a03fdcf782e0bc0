"""The files of a package's release: wheel and sdist that know where releases are, and what the wheel leaves out.

    python tools/release.py coral-spec --releases https://github.com/OWNER/NAME/releases --out dist

Releases are tagged NAME-VERSION. An installed package reads their address from its own metadata, so it is written into
the copy that is built, and a fork's wheels name the fork's releases. Archives of drafters are packed beside the wheel,
if their files are those that the package will accept. Needs `hatch` on the path, and for coral-spec the package
installed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def folder_of(package: str, root: Path = ROOT) -> Path:
    """Where a package lies."""
    return root / "shared" if package == "expkit" else root / "packages" / package


def with_releases(pyproject: str, address: str) -> str:
    """The text of a pyproject.toml that names the releases.

    Raises:
        ValueError: it names addresses already.
    """
    if "urls" in tomllib.loads(pyproject)["project"]:
        raise ValueError("pyproject.toml has project.urls already: add Releases there, and leave --releases out")
    return f'{pyproject.rstrip()}\n\n[project.urls]\nReleases = "{address.rstrip("/")}"\n'


def pack(folder: Path, archive: Path) -> None:
    """A folder as an archive, in order of names; file times and modes are not kept, so that its bytes are the same."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in sorted(each for each in folder.iterdir() if each.is_file()):
            packed.writestr(zipfile.ZipInfo(f"{folder.name}/{file.name}"), file.read_bytes(), zipfile.ZIP_DEFLATED)


def pack_drafters(drafters: Path, out: Path) -> list[Path]:
    """Archives of the drafters outside coral-spec's wheel.

    Raises:
        ValueError: a folder's files are not those whose digest the package has.
    """
    from coral_spec.bundled import RELEASED, digest

    packed = []
    for alias, release in RELEASED.items():
        folder = drafters / alias
        found = digest({each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()})
        if found != release.digest:
            raise ValueError(f"{folder} has the digest {found}, but bundled.py expects {release.digest}")
        packed.append(out / release.file)
        pack(folder, packed[-1])
    return packed


def build(package: str, address: str | None, out: Path) -> None:
    """Wheel and sdist into ``out``."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / package
        shutil.copytree(folder_of(package), copy, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        file = copy / "pyproject.toml"
        if address is not None:
            file.write_text(with_releases(file.read_text(encoding="utf-8"), address), encoding="utf-8")
        subprocess.run(["hatch", "build", str(out.resolve())], cwd=copy, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package")
    parser.add_argument("--releases", metavar="URL", help="the page of all releases; without it wheels name none")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    if not (folder_of(options.package) / "pyproject.toml").is_file():
        parser.error(f"there is no package {options.package!r}")
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        if options.package == "coral-spec":
            for archive in pack_drafters(folder_of("coral-spec") / "drafters", options.out):
                print(archive)
        build(options.package, options.releases, options.out)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
