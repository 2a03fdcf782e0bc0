"""Which packages a range of commits can have broken, as a JSON list.

    python tools/changed.py origin/main...HEAD     ->  ["coral-spec"]

A change under packages/NAME/ concerns that package. A change in shared/ or in anything that configures all of
them (the root's pyproject.toml and conftest.py, .ci/, .github/, tools/) concerns every package. Documents at
the root concern none. When git cannot tell (a new branch, a shallow clone), every package is listed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = "expkit"
EVERYTHING = ("shared/", ".ci/", ".github/", "tools/", "pyproject.toml", "conftest.py")


def all_packages(root: Path = ROOT) -> list[str]:
    """Names of all packages: expkit, then every folder in packages/ that has a pyproject.toml."""
    return [SHARED, *sorted(found.parent.name for found in (root / "packages").glob("*/pyproject.toml"))]


def affected(paths: Iterable[str], packages: list[str]) -> list[str]:
    """The packages, in order, that changes in `paths` (relative to the root, with /) can have broken."""
    hit: set[str] = set()
    for path in paths:
        if any(path == each or (each.endswith("/") and path.startswith(each)) for each in EVERYTHING):
            return packages
        if path.startswith("packages/"):
            hit.add(path.split("/")[1])
    return [package for package in packages if package in hit]


def changed_paths(commits: str, root: Path = ROOT) -> list[str] | None:
    """Paths that differ in a git range (a renamed file under both names); None when git cannot resolve it."""
    command = ["git", "diff", "--name-only", "--no-renames", "-z", commits, "--"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"git cannot compare {commits}: every package is listed", file=sys.stderr)
        return None
    return [path for path in done.stdout.split("\0") if path]


def main(arguments: list[str]) -> int:
    """Print the JSON list for the range given as the only argument."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python tools/changed.py RANGE   (for example origin/main...HEAD)", file=sys.stderr)
        return 2
    packages = all_packages()
    paths = changed_paths(arguments[0])
    print(json.dumps(packages if paths is None else affected(paths, packages)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
