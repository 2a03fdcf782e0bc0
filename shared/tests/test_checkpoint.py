from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from expkit import checkpoint
from expkit.checkpoint import (
    CheckpointStore,
    atomic_path,
    load_tensors,
    read_metadata,
    save_tensors,
    write_json,
    write_text,
)
from expkit.errors import UsageError


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def save(store: CheckpointStore, step: int, best: bool = False) -> Path:
    return store.save(step, {"w": torch.full((2,), float(step))}, {"step": step}, best=best)


def test_an_atomic_file_appears_whole_and_alone(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "new" / "a.png") as temporary:
        assert temporary.suffix == ".png" and temporary.parent == tmp_path / "new"
        temporary.write_text("whole")
        assert not (tmp_path / "new" / "a.png").exists()
    assert names(tmp_path / "new") == ["a.png"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(error), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise error
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_what_a_link_leads_to_is_replaced_and_not_the_link(tmp_path: Path) -> None:
    write_text(tmp_path / "there" / "a.txt", "old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "there" / "a.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "there" / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["link.txt", "there"] and names(tmp_path / "there") == ["a.txt"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_or_a_device_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="pipe is no plain file"):
        write_text(tmp_path / "pipe", "new")
    assert (tmp_path / "pipe").is_fifo() and names(tmp_path) == ["pipe"]


def test_a_whole_folder_replaces_an_older_one(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / "inside").write_text(text)
    assert names(tmp_path) == ["folder"] and (tmp_path / "folder" / "inside").read_text() == "new"


def test_json_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert names(tmp_path) == []


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(3), "c": torch.ones(2, dtype=torch.bfloat16)}
    save_tensors(tmp_path / "t.safetensors", tensors, {"format": "pt"})
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert read_metadata(tmp_path / "t.safetensors") == {"format": "pt"}


def test_tied_and_transposed_tensors_can_be_saved(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    save_tensors(tmp_path / "t.safetensors", {"a": weight, "b": weight, "c": weight.T})
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert torch.equal(loaded["b"], weight) and torch.equal(loaded["c"], weight.T)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "missing", "folder"])
def test_a_damaged_safetensors_file_is_named_in_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.randn(100)})
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"truncated": data[:-10], "garbage": b"\xff" * 50, "empty": b""}[damage])
    for read in (load_tensors, read_metadata):
        with pytest.raises(UsageError, match=r"t\.safetensors") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_an_empty_store_has_no_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "none")
    assert store.latest() is None and store.best() is None and store.steps() == []


def test_a_checkpoint_comes_back_with_weights_and_state(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    state = {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 3, "lr": 0.5, "order": (1, 2)}
    path = store.save(7, {"w": torch.arange(3)}, state)
    assert path.name == "step_00000007" and names(path) == ["state.pt", "weights.safetensors"]
    found = store.latest()
    assert found is not None and found.step == 7 and found.path == path
    assert torch.equal(found.tensors["w"], torch.arange(3))
    assert torch.equal(found.state["optimizer"]["state"][0]["exp_avg"], torch.ones(2))
    assert found.state["epoch"] == 3 and found.state["order"] == (1, 2)


def test_the_last_n_and_the_best_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in range(1, 6):
        save(store, step, best=step == 2)
    assert store.steps() == [2, 4, 5]
    best, latest = store.best(), store.latest()
    assert best is not None and best.step == 2 and latest is not None and latest.step == 5
    save(store, 6, best=True)
    assert store.steps() == [5, 6]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    store.save(1, {"w": torch.zeros(1)}, {"again": True})
    found = store.latest()
    assert found is not None and found.state == {"again": True} and names(tmp_path) == ["step_00000001"]


def test_state_that_could_not_be_loaded_back_is_refused_at_once(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c")
    with pytest.raises(TypeError, match=r"state\['path'\]"):
        store.save(1, {}, {"path": Path("x")})
    assert store.steps() == []


def test_at_least_one_checkpoint_must_be_kept(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="0"):
        CheckpointStore(tmp_path, keep=0)


@pytest.mark.parametrize("name", ["state.pt", "weights.safetensors"])
def test_a_damaged_checkpoint_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    store = CheckpointStore(tmp_path)
    path = save(store, 1)
    (path / name).write_bytes(b"damaged")
    with pytest.raises(UsageError, match=name) as caught:
        store.latest()
    assert "\n" not in str(caught.value) and "without" not in str(caught.value)
    newest = save(store, 2)
    (newest / name).write_bytes(b"damaged")
    with pytest.raises(UsageError, match=f"without .*{newest.name} the run goes on from {path.name}"):
        store.latest()


# Each case is a forked child, so that torch is imported once.
KILLED = """
import os, signal, sys, torch
from pathlib import Path
from expkit import checkpoint

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def half(path, content):
    path.open("wb").write(content[: len(content) // 2])
    die()

def save(where):
    store = checkpoint.CheckpointStore(Path(sys.argv[1]) / where)
    store.save(1, {"w": torch.ones(2)}, {"n": 1})
    if where == "state":
        Path.write_bytes = half
    elif where == "rename":
        os.replace = die
    elif where == "removal":
        store.keep = 1
        checkpoint._remove = die
    store.save(2, {"w": torch.zeros(2)}, {"n": 2})

for where in ("state", "rename", "removal"):
    child = os.fork()
    if child == 0:
        save(where)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, (where, status)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores whose writing process was killed in a save, by where."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", KILLED, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize(("where", "survivor"), [("state", 1), ("rename", 1), ("removal", 2)])
def test_a_process_killed_in_a_save_leaves_no_half_checkpoint(killed: Path, where: str, survivor: int) -> None:
    store = CheckpointStore(killed / where)
    found = store.latest()
    assert store.steps() == [survivor] and found is not None and found.state == {"n": survivor}
    save(store, 3)  # the next save clears what the kill left
    assert names(store.folder) == [f"step_0000000{survivor}", "step_00000003"]


FULL = "No space left on device"


@pytest.mark.parametrize("error", [OSError(28, FULL), SafetensorError(f"I/O error: {FULL} (os error 28)")])
def test_a_full_disk_is_wrong_use_and_leaves_nothing(error, tmp_path, monkeypatch):
    def full(*arguments):
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UsageError, match=FULL):
        save_tensors(tmp_path / "w.safetensors", {"w": torch.ones(2)})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_an_oserror_too(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be made"):
        write_json(tmp_path / "file" / "inside" / "a.json", {})
    with pytest.raises(UsageError, match="cannot be made"):
        write_json(tmp_path / "file" / "inside" / "a.json", {})


def test_a_disk_that_lets_nothing_be_removed_either_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(checkpoint, "_remove", refuse)
    with pytest.raises(checkpoint.Unwritable, match=r"a\.json cannot be written: Read-only"):
        with checkpoint.atomic_path(tmp_path / "a.json"):
            refuse()
