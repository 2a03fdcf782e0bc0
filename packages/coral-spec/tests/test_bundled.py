"""Trained drafters are found in the package, in a checkout and in the cache; a release gives them by their digest."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from coral_spec import bundled
from coral_spec.bundled import RELEASED, Release, bundled_drafter, digest, fetch_drafter
from coral_spec.cli import build
from coral_spec.model import load
from coral_spec.targets import Target
from drafting import PROMPT, SMALL, save_drafter
from expkit.cli import main
from expkit.errors import UsageError
from tiny import tiny_target

DRAFTERS = Path(__file__).parents[1] / "drafters"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CORAL_SPEC_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture
def release(home: Path, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a release that has a drafter for the tiny target."""
    folder, place = save_drafter(target, tmp_path / "made"), tmp_path / "release"
    place.mkdir()
    archive = place / "tiny-drafter-1.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for file in folder.iterdir():
            packed.write(file, file.name)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setitem(bundled.RELEASED, "tiny", Release(archive.name, digest(files), "of the tests"))
    return place


def test_a_fetched_drafter_is_the_targets_own(target: Target, release: Path, home: Path) -> None:
    assert bundled_drafter(target) is None
    folder = fetch_drafter("tiny", release.as_uri())
    assert folder == home / "drafters" / "tiny" == bundled_drafter(target)
    model = load(target, tree=SMALL)
    assert model.draft_name == str(folder)
    assert model.generate(PROMPT, max_new_tokens=8).statistics.rounds > 0
    assert fetch_drafter("tiny", "http://127.0.0.1:9") == folder  # it is there: nothing is fetched
    (folder / "drafter.safetensors").write_bytes(b"of an earlier release")
    fetch_drafter("tiny", release.as_uri())
    assert load(target, tree=SMALL).draft_name == str(folder)


def test_an_archive_that_the_user_brought_needs_no_network(target: Target, release: Path, home: Path) -> None:
    (home / "downloads").mkdir(parents=True)
    (release / "tiny-drafter-1.zip").rename(home / "downloads" / "tiny-drafter-1.zip")
    assert fetch_drafter("tiny", "http://127.0.0.1:9") == bundled_drafter(target)


def test_nothing_but_the_released_file_counts(target: Target, release: Path, home: Path) -> None:
    archive = release / "tiny-drafter-1.zip"
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr("more.txt", "that nobody asked for")
    with pytest.raises(UsageError, match="the digest of its files"):
        fetch_drafter("tiny", release.as_uri())
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(UsageError, match="no whole archive"):
        fetch_drafter("tiny", release.as_uri())
    for nowhere in ((release / "nowhere").as_uri(), "no/url"):
        with pytest.raises(UsageError, match=f"cannot fetch .* put a copy .* at {home}/downloads/tiny-drafter-1.zip"):
            fetch_drafter("tiny", nowhere)
    assert bundled_drafter(target) is None and not list(home.rglob("*.safetensors"))


@pytest.mark.skipif(not DRAFTERS.is_dir(), reason="these tests are not in a checkout")
@pytest.mark.parametrize("alias", RELEASED)
def test_a_release_takes_the_drafters_of_a_checkout(alias: str, home: Path, tmp_path: Path) -> None:
    release = RELEASED[alias]
    with zipfile.ZipFile(tmp_path / release.file, "w") as archive:
        for file in (DRAFTERS / alias).iterdir():
            archive.write(file, f"{alias}/{file.name}")
    folder = fetch_drafter(alias, tmp_path.as_uri())
    assert digest({file.name: file.read_bytes() for file in folder.iterdir()}) == release.digest
    assert (folder / "NOTICE").is_file()


def test_a_checkout_has_the_drafters_beside_the_package(
    target: Target, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled, "SOURCE", tmp_path)
    folder = save_drafter(target, tmp_path / "drafters" / "tiny")
    assert bundled_drafter(target) is None  # some folder of this name, not that of a checkout
    (tmp_path / "pyproject.toml").touch()
    assert bundled_drafter(target) == folder


@pytest.mark.parametrize("info", [{"dir_info": {}}, {"archive_info": {}}, None])
def test_a_package_that_was_installed_from_a_checkout_finds_its_drafters(
    info: dict[str, object] | None, target: Target, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "a clone"
    noted = tmp_path / "site" / "coral_spec-0.1.0.dist-info"
    noted.mkdir(parents=True)
    (noted / "METADATA").write_text("Metadata-Version: 2.4\nName: coral-spec\nVersion: 0.1.0\n")
    if info is not None:  # a package of an index has no such note
        (noted / "direct_url.json").write_text(json.dumps({"url": project.as_uri(), **info}))
    monkeypatch.syspath_prepend(str(noted.parent))
    monkeypatch.setattr(bundled, "SOURCE", tmp_path / "site")
    folder = save_drafter(target, project / "drafters" / "tiny")
    assert bundled_drafter(target) == (folder if info == {"dir_info": {}} else None)


def test_a_damaged_drafter_of_another_model_is_no_hindrance(target: Target, release: Path, home: Path) -> None:
    (home / "drafters" / "damaged").mkdir(parents=True)
    (home / "drafters" / "damaged" / "config.json").write_text("{}")
    folder = fetch_drafter("tiny", release.as_uri())
    with pytest.warns(UserWarning, match="this drafter is left out"):
        assert bundled_drafter(target) == folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fetch", "nothing"], "no drafter for 'nothing' is released"),
        (["--url", "http://127.0.0.1:9"], "give both"),
        (["--fetch", "tiny", "--url", "http://127.0.0.1:9"], "cannot fetch http://127.0.0.1:9/tiny-drafter-1.zip"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    arguments: list[str], said: str, release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(build(), ["models", *arguments])
    assert end.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


def test_the_command_fetches(target: Target, release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(build(), ["models", "--fetch", "tiny", "--url", release.as_uri()])
    assert end.value.code == 0 and bundled_drafter(target) is not None
    assert "terms: of the tests" in capsys.readouterr().out
