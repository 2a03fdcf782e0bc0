"""The files of a package's release: wheel and sdist that know where releases are, and what the wheel leaves out.

    python tools/release.py coral-spec-0.1.0 --releases https://github.com/OWNER/NAME/releases --out dist

Of the last commit, whatever else lies in the working folder. Releases are tagged NAME-VERSION. An installed package
reads their address from its own metadata, so it is written into the copy that is built, and a fork's wheels name the
fork's releases. Archives of drafters go to `--archives`, if their files are those that the package will accept and the
terms of their weights lie beside them. Needs git and `hatch` on the path, and for coral-spec the package installed.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def folder_of(package: str) -> str:
    """Where a package lies, below the root."""
    return "shared" if package == "expkit" else f"packages/{package}"


def package_of(tag: str, root: Path = ROOT) -> str:
    """The package that a tag releases.

    Raises:
        ValueError: there is no such package, or it has another version.
    """
    package, _, version = tag.rpartition("-")
    file = root / folder_of(package) / "pyproject.toml"
    if not package or not file.is_file():
        raise ValueError(f"{tag!r} names no package: a tag is NAME-VERSION")
    own = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["version"]
    if own != version:
        raise ValueError(f"the tag is {tag}, but {package} has the version {own}")
    return package


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
        ValueError: a folder's files are not those whose digest the package has, or the terms of the weights are
            missing, which must be passed on with them.
    """
    from coral_spec.bundled import RELEASED, digest

    packed = []
    for alias, release in RELEASED.items():
        folder = drafters / alias
        if not list(folder.glob("TERMS*")):
            raise ValueError(
                f"{folder} has no TERMS file: put the text of the {release.license} there, see CONTRIBUTING.md"
            )
        found = digest({each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()})
        if found != release.digest:
            raise ValueError(f"{folder} has the digest {found}, but bundled.py expects {release.digest}")
        packed.append(out / release.file)
        pack(folder, packed[-1])
    return packed


def build(package: str, address: str | None, out: Path) -> None:
    """Wheel and sdist of the last commit into ``out``."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        files = subprocess.run(
            ["git", "archive", f"HEAD:{folder_of(package)}"], cwd=ROOT, check=True, capture_output=True
        )
        with tarfile.open(fileobj=io.BytesIO(files.stdout)) as archive:
            archive.extractall(copy, filter="data")
        file = copy / "pyproject.toml"
        if address is not None:
            file.write_text(with_releases(file.read_text(encoding="utf-8"), address), encoding="utf-8")
        subprocess.run(["hatch", "build", str(out.resolve())], cwd=copy, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag", help="NAME-VERSION")
    parser.add_argument("--releases", metavar="URL", help="the page of all releases; without it wheels name none")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="for wheel and sdist")
    parser.add_argument("--archives", type=Path, help="for what the wheel leaves out; OUT, if not given")
    options = parser.parse_args()
    archives: Path = options.archives or options.out
    try:
        package = package_of(options.tag)
        for folder in (options.out, archives):
            folder.mkdir(parents=True, exist_ok=True)
        if package == "coral-spec":
            for archive in pack_drafters(ROOT / folder_of(package) / "drafters", archives):
                print(archive)
        build(package, options.releases, options.out)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
