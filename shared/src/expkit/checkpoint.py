"""Files that are either whole or absent: written aside, flushed to the disk, then renamed.

A killed process leaves at most a `.tmp-*` entry beside the target, which nothing reads and the next
`CheckpointStore.save` removes.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from expkit.errors import UsageError

_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)
_PLAIN = (type(None), bool, int, float, str, bytes, Tensor, torch.dtype, torch.device)


class Unwritable(UsageError, OSError):
    """A file that the disk does not take. An OSError too, for callers who can do without the file."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what the block wrote there (a file or a folder) becomes `path`.

    The temporary name keeps the suffix. If the block raises, the temporary is removed and `path` stays as it
    was. Of a link it is what the link leads to that is replaced.

    Raises:
        Unwritable: there is no space, no right to write there, or a device or pipe, which must not be replaced.
    """
    path = Path(path)
    require_replaceable(path)
    path = path.resolve() if path.is_symlink() else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unwritable(f"{path.parent} cannot be made: {error.strerror}") from error
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        _sync(temporary)
        if temporary.is_dir() and path.is_dir():  # no system replaces a folder that is not empty
            old = path.with_name(f".tmp-{secrets.token_hex(4)}-old-{path.name}")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
        _sync_one(path.parent)
    except BaseException as error:
        with suppress(OSError):  # a disk that takes nothing need not let anything be removed
            _remove(temporary)
        reason = _unwritable(error)
        if reason is not None:
            raise Unwritable(f"{path} cannot be written: {reason}") from error
        raise


def require_replaceable(path: Path) -> None:
    """Unwritable where a device, a pipe or a socket has the name of a file that is to be written."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise Unwritable(f"{path} is no plain file; name one")


def _unwritable(error: BaseException) -> str | None:
    """Why the disk takes nothing, where that is what an error says."""
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return os.strerror(error.errno)
    if isinstance(error, SafetensorError) and "os error" in str(error):  # it keeps the system's words alone
        return str(error)
    return None


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, obj: object) -> None:
    """Write an indented JSON file atomically; numbers that JSON does not know (nan, inf) become null."""
    write_text(path, json.dumps(_plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _plain(obj: object) -> object:
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    if isinstance(obj, Mapping):
        return {key: _plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(value) for value in obj]
    return obj


def require_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """UsageError naming the file when a training that diverged has left values that are no numbers."""
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise UsageError(f"{path}: tensor {broken[0]} holds values that are not finite; was its training stable?")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically. Tensors that share memory are written once each."""
    seen: set[int] = set()
    ready: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if storage in seen else tensor  # safetensors refuses shared memory
        seen.add(storage)
    with atomic_path(path) as temporary:
        save_file(ready, temporary, dict(metadata) if metadata is not None else None)


def load_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UsageError: the file is missing or damaged.
    """
    with _reading(path):
        return load_file(path, device=str(device))


def read_metadata(path: Path) -> dict[str, str]:
    """The text metadata of a safetensors file; empty where it has none.

    Raises:
        UsageError: the file is missing or damaged.
    """
    with _reading(path), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


@dataclass(frozen=True)
class Checkpoint:
    """What was saved at one step.

    Attributes:
        step: the step given to `save`.
        tensors: the weights, on the CPU.
        state: everything else (optimizer, random state, counters).
        path: the folder it was read from.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    path: Path


class CheckpointStore:
    """Checkpoints of one run: `folder/step_00001000/{weights.safetensors,state.pt}` and `folder/best.json`.

    Keeps the last `keep` and the best. One process may write at a time (on several ranks: the main one).
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise UsageError(f"keep = {keep} checkpoints; at least 1 is needed")
        self.folder = Path(folder)
        self.keep = keep

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], best: bool = False) -> Path:
        """Write a checkpoint whole or not at all, then drop the ones no longer kept; returns its folder.

        Raises:
            TypeError: `state` holds an object that `weights_only=True` would refuse on the way back.
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        _require_plain(state, "state")
        path = self._path(step)
        with atomic_path(path) as temporary:
            temporary.mkdir()
            save_tensors(temporary / "weights.safetensors", tensors)
            buffer = io.BytesIO()  # torch's own writer does not say that a disk is full
            torch.save(dict(state), buffer)
            (temporary / "state.pt").write_bytes(buffer.getbuffer())
        if best:
            write_json(self.folder / "best.json", {"step": step})
        self._prune()
        return path

    def steps(self) -> list[int]:
        """The steps that can be loaded, in order."""
        if not self.folder.is_dir():
            return []
        matches = (re.fullmatch(r"step_(\d{8,})", entry.name) for entry in self.folder.iterdir())
        return sorted(int(match.group(1)) for match in matches if match)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, or None. Raises UsageError if it is damaged, and says which one is before it."""
        steps = self.steps()
        try:
            return self._load(steps[-1]) if steps else None
        except UsageError as error:
            if len(steps) < 2:
                raise
            newest, before = self._path(steps[-1]), self._path(steps[-2]).name
            raise UsageError(f"{error}; without {newest} the run goes on from {before}") from error

    def best(self) -> Checkpoint | None:
        """The last checkpoint saved with `best=True`, or None. Raises UsageError if it is damaged."""
        step = self._best_step()
        return self._load(step) if step in self.steps() and step is not None else None

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _load(self, step: int) -> Checkpoint:
        path = self._path(step)
        tensors = load_tensors(path / "weights.safetensors")
        try:
            state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen types for a damaged file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(f"{path / 'state.pt'} is missing or damaged ({reason})") from error
        return Checkpoint(step=step, tensors=tensors, state=state, path=path)

    def _best_step(self) -> int | None:
        path = self.folder / "best.json"
        if not path.is_file():
            return None
        try:
            return int(json.loads(path.read_text(encoding="utf-8"))["step"])
        except (ValueError, KeyError, TypeError):
            raise UsageError(f'{path} is damaged; it should read {{"step": N}}') from None

    def _prune(self) -> None:
        kept = {*self.steps()[-self.keep :], self._best_step()}
        for step in self.steps():
            if step not in kept:
                # Renamed first, so that a kill in the middle of the removal leaves no half checkpoint either.
                doomed = self.folder / f".tmp-{secrets.token_hex(4)}-old"
                os.replace(self._path(step), doomed)
        for leftover in self.folder.glob(".tmp-*"):
            _remove(leftover)


def _require_plain(value: Any, name: str) -> None:
    """Refuse at save time what could not be loaded at resume time."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _require_plain(key, f"a key of {name}")
            _require_plain(entry, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            _require_plain(entry, f"{name}[{index}]")
    elif type(value) not in _PLAIN and not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; checkpoints hold plain values and tensors")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is not a readable safetensors file ({error})") from None


def _sync(path: Path) -> None:
    """Flush a file, or a folder and all that is in it, to the disk."""
    if path.is_dir():
        for entry in path.iterdir():
            _sync(entry)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
