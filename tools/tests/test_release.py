"""What a release consists of."""

from __future__ import annotations

import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import release


@pytest.mark.parametrize("package", ["expkit", "coral-spec", "train-adv", "pden"])
def test_a_wheel_is_told_where_releases_are(package):
    text = (release.folder_of(package) / "pyproject.toml").read_text(encoding="utf-8")
    told = tomllib.loads(release.with_releases(text, "https://example.org/releases/"))
    assert told["project"].pop("urls") == {"Releases": "https://example.org/releases"}
    assert told == tomllib.loads(text)


def test_addresses_that_are_there_are_not_written_over():
    with pytest.raises(ValueError, match=r"project\.urls already"):
        release.with_releases('[project]\nname = "x"\n[project.urls]\nHome = "y"\n', "https://example.org")


def test_the_archive_of_a_drafter_is_what_the_package_accepts(tmp_path, monkeypatch):
    bundled = pytest.importorskip("coral_spec.bundled")
    drafters = release.folder_of("coral-spec") / "drafters"
    (archive,) = release.pack_drafters(drafters, tmp_path)
    with zipfile.ZipFile(archive) as packed:
        files = {Path(name).name: packed.read(name) for name in packed.namelist()}
    assert bundled.digest(files) == bundled.RELEASED["gemma3-270m"].digest
    first = archive.read_bytes()
    release.pack_drafters(drafters, tmp_path)
    assert archive.read_bytes() == first
    monkeypatch.setattr(bundled, "digest", lambda files: "another")
    with pytest.raises(ValueError, match=r"gemma3-270m has the digest another, but bundled\.py expects"):
        release.pack_drafters(drafters, tmp_path)


def test_drafters_are_as_small_as_they_are_said_to_be():
    spec = release.folder_of("coral-spec")
    sizes = {
        each: sum(file.stat().st_size for file in (spec / each).rglob("*") if file.is_file())
        for each in ("src/coral_spec/drafters/smollm2-135m", "drafters/gemma3-270m")
    }
    assert sizes["src/coral_spec/drafters/smollm2-135m"] <= 10e6
    assert sizes["drafters/gemma3-270m"] <= 15.5e6
