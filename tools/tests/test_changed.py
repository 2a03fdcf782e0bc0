from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "changed.py"
PACKAGES = ["expkit", "coral-spec", "other"]


@pytest.fixture(scope="module")
def changed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("changed", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


def commit(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    git(root, "add", ".")
    git(root, "commit", "-m", "change")


def test_a_change_in_one_package_concerns_that_package_only(changed: ModuleType) -> None:
    assert changed.affected(["packages/other/src/a.py", "README.md"], PACKAGES) == ["other"]


@pytest.mark.parametrize(
    "path",
    ["shared/src/expkit/seed.py", "pyproject.toml", "conftest.py", ".ci/run", "tools/changed.py"],
)
def test_a_change_in_shared_or_root_config_concerns_all(changed: ModuleType, path: str) -> None:
    assert changed.affected([path], PACKAGES) == PACKAGES


def test_a_packages_own_pyproject_is_not_the_root_one(changed: ModuleType) -> None:
    assert changed.affected(["packages/coral-spec/pyproject.toml"], PACKAGES) == ["coral-spec"]


def test_documents_at_the_root_concern_none(changed: ModuleType) -> None:
    assert changed.affected(["README.md", "CONTRIBUTING.md"], PACKAGES) == []


def test_a_removed_package_is_not_listed(changed: ModuleType) -> None:
    assert changed.affected(["packages/gone/src/a.py"], PACKAGES) == []


def test_every_package_of_this_repository_is_known(changed: ModuleType) -> None:
    assert changed.all_packages()[:2] == ["expkit", "coral-spec"]


def test_a_git_range_is_read_with_both_sides_of_a_rename(changed: ModuleType, tmp_path: Path) -> None:
    git(tmp_path, "init", "-b", "main")
    commit(tmp_path, "packages/one/a.py", "README.md")
    (tmp_path / "packages/two").mkdir()
    git(tmp_path, "mv", "packages/one/a.py", "packages/two/a.py")
    git(tmp_path, "commit", "-m", "rename")
    assert changed.changed_paths("HEAD~1..HEAD", tmp_path) == ["packages/one/a.py", "packages/two/a.py"]


def test_an_unknown_range_lists_every_package(changed: ModuleType) -> None:
    done = subprocess.run([sys.executable, SCRIPT, "no-such-ref..HEAD"], capture_output=True, text=True)
    assert json.loads(done.stdout) == changed.all_packages()


def test_no_range_is_wrong_use() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage:")
