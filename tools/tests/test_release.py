"""What a release consists of."""

from __future__ import annotations

import shutil
import sys
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import release

DRAFTERS = release.ROOT / "packages/coral-spec/drafters"


@pytest.mark.parametrize("package", ["expkit", "coral-spec", "train-adv", "pden"])
def test_a_wheel_is_told_where_releases_are(package):
    text = (release.ROOT / release.folder_of(package) / "pyproject.toml").read_text(encoding="utf-8")
    told = tomllib.loads(release.with_releases(text, "https://example.org/releases/"))
    assert told["project"].pop("urls") == {"Releases": "https://example.org/releases"}
    assert told == tomllib.loads(text)
    assert release.package_of(f"{package}-{told['project']['version']}") == package


def test_addresses_that_are_there_are_not_written_over():
    with pytest.raises(ValueError, match=r"project\.urls already"):
        release.with_releases('[project]\nname = "x"\n[project.urls]\nHome = "y"\n', "https://example.org")


@pytest.mark.parametrize(
    ("tag", "told"), [("pden-9.9.9", "pden has the version"), ("nothing-1.0", "names no package"), ("pden", "names no")]
)
def test_a_tag_of_something_else_releases_nothing(tag, told):
    with pytest.raises(ValueError, match=told):
        release.package_of(tag)


def test_the_archive_of_a_drafter_is_what_the_package_accepts(tmp_path, monkeypatch):
    bundled = pytest.importorskip("coral_spec.bundled")
    folder = tmp_path / "drafters/gemma3-270m"
    shutil.copytree(DRAFTERS / "gemma3-270m", folder)
    (folder / "TERMS.txt").write_text("terms")
    with pytest.raises(ValueError, match=r"gemma3-270m has the digest .*, but bundled\.py expects"):
        release.pack_drafters(tmp_path / "drafters", tmp_path)
    files = {each.name: each.read_bytes() for each in folder.iterdir()}
    digest = bundled.digest(files)
    monkeypatch.setitem(bundled.RELEASED, "gemma3-270m", replace(bundled.RELEASED["gemma3-270m"], digest=digest))
    (archive,) = release.pack_drafters(tmp_path / "drafters", tmp_path)
    with zipfile.ZipFile(archive) as packed:
        assert {Path(name).name: packed.read(name) for name in packed.namelist()} == files
    first = archive.read_bytes()
    release.pack_drafters(tmp_path / "drafters", tmp_path)
    assert archive.read_bytes() == first


def test_without_the_terms_of_its_weights_a_drafter_is_not_released(tmp_path):
    pytest.importorskip("coral_spec.bundled")
    with pytest.raises(ValueError, match="has no TERMS file: put the text of the Gemma terms of use there"):
        release.pack_drafters(DRAFTERS, tmp_path)
    assert not list(tmp_path.iterdir())


def test_drafters_are_as_small_as_they_are_said_to_be():
    spec = release.ROOT / "packages/coral-spec"
    sizes = {
        each: sum(file.stat().st_size for file in (spec / each).rglob("*") if file.is_file())
        for each in ("src/coral_spec/drafters/smollm2-135m", "drafters/gemma3-270m")
    }
    assert sizes["src/coral_spec/drafters/smollm2-135m"] <= 10e6
    assert sizes["drafters/gemma3-270m"] <= 15.5e6
