"""The folder of one run, and the record that lets its figures stand as evidence."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from expkit.checkpoint import CheckpointStore, write_json, write_text
from expkit.config import flatten, to_toml
from expkit.errors import UsageError
from expkit.metrics import MetricsWriter, truncate

_SOURCE = Path(__file__).resolve().parent
_WATCHED = ("torch", "transformers", "safetensors", "numpy", "triton")


class RunDir:
    """`root/name/` with `config.toml`, `env.json`, `metrics.jsonl` and `checkpoints/`. Make it with `create`.

    Attributes:
        path: the folder.
        metrics: the open metrics file; after a resume it ends at the checkpoint's step.
        checkpoints: the run's checkpoints.
    """

    def __init__(self, path: Path, metrics: MetricsWriter, checkpoints: CheckpointStore) -> None:
        self.path = path
        self.metrics = metrics
        self.checkpoints = checkpoints

    @classmethod
    def create(
        cls, root: Path, name: str, config: object, resume: bool = False, *, tensorboard: bool = False
    ) -> RunDir:
        """Start a run, or go on with one. On several ranks call it on the main one only.

        Args:
            root: folder of all runs.
            name: one path component.
            config: the resolved config, a dataclass that `to_toml` can write.
            resume: continue the run that is there, with the same config.
            tensorboard: also write TensorBoard events (an extra of expkit).

        Raises:
            UsageError: the name is no plain folder name; the run exists and `resume` is not set; there is
                nothing to resume; or the config differs from the run's own (the keys are named).
        """
        if name in ("", ".", "..") or Path(name).name != name:
            raise UsageError(f'run name "{name}" is not a plain folder name')
        path = Path(root) / name
        text = to_toml(config)
        checkpoints = CheckpointStore(path / "checkpoints")
        metrics = path / "metrics.jsonl"
        if resume:
            require_same(path / "config.toml", text, default_toml(type(config)))
            steps = checkpoints.steps()
            truncate(metrics, after_step=steps[-1] if steps else -1)
        else:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise UsageError(f"run {path} exists already; resume it or choose another name")
            write_text(path / "config.toml", text)
        _record(path / "env.json")
        board = path / "tensorboard" if tensorboard else None
        return cls(path, MetricsWriter(metrics, append=resume, tensorboard=board), checkpoints)

    def discard_unbegun(self) -> None:
        """Remove the folder of a run that failed before its first checkpoint, so that its name is free again."""
        if not self.checkpoints.steps():
            shutil.rmtree(self.path, ignore_errors=True)


def evidence(seed: int | None = None) -> dict[str, Any]:
    """What a figure needs beside it: call it when the work starts and put the keys into the JSON.

    Returns:
        command (as a user would type it), seed, versions, hardware, git (of the current folder, else of the one
        that this code lies in, else the commit that EXPKIT_COMMIT names where there is no repository, else None) and
        started (UTC, ISO 8601).
    """
    return {
        "command": _command(),
        "seed": seed,
        "versions": _versions(),
        "hardware": _hardware(),
        "git": _git(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def config_to_resume(runs: Path, name: str, given: Path | None) -> Path | None:
    """The config file that a run goes on with: the one that was given, else the run's own, else None."""
    own = Path(runs) / name / "config.toml"
    return own if given is None and own.is_file() else given


def default_toml(cls: type) -> str:
    """The config file of a dataclass's defaults; empty where a field has none."""
    try:
        return to_toml(cls())
    except TypeError:
        return ""


def require_same(path: Path, text: str, defaults: str = "") -> None:
    """Raise UsageError where a run's `config.toml` is not there, is damaged, or says something else than `text`.

    Args:
        defaults: the file of the default config, for keys that an older version did not write.
    """
    if not path.is_file():
        raise UsageError(f"nothing to resume: {path} does not exist")
    try:
        before = flatten(tomllib.loads(defaults)) | flatten(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is damaged: {error}") from None
    now = flatten(tomllib.loads(text))
    # Compared as text, so that nan equals itself.
    changed = [key for key in sorted({*before, *now}) if repr(before.get(key)) != repr(now.get(key))]
    if changed:
        listed = ", ".join(f"{key} ({before.get(key)!r} -> {now.get(key)!r})" for key in changed)
        raise UsageError(f"cannot resume {path.parent} with a changed config: {listed}")


def _record(path: Path) -> None:
    """Write where and how the run was started; a resumed run keeps the record of each start."""
    record = evidence()
    if path.is_file():
        first = json.loads(path.read_text(encoding="utf-8"))
        record = {**first, "resumed": [*first.get("resumed", []), record]}
    write_json(path, record)


def _command() -> str:
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    script = Path(sys.argv[0] or "python")
    if spec is not None:
        start = ["python", "-m", spec.name.removesuffix(".__main__")]
    elif script.suffix == ".py":
        start = ["python", script.name if script.is_absolute() else str(script)]
    else:
        start = [script.name]
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    if processes is not None:
        start = start[1:] if start[0] == "python" else ["--no-python", *start]
        start = ["torchrun", "--nproc-per-node", processes, *start]
    return shlex.join([*start, *sys.argv[1:]])


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in (*_WATCHED[1:], "expkit", *_dependents()):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name == "expkit":
                versions[name] = "source"  # run from the source tree, not installed
    return versions


def _dependents() -> list[str]:
    """Installed packages that are built on expkit."""
    found: set[str] = set()
    for distribution in metadata.distributions():
        if any(each.startswith("expkit") for each in distribution.requires or []):
            found.add(distribution.metadata["Name"])
    return sorted(found)


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count()
    return {"cpu": cpu_name(), "cores": cores, "gpu": gpus or None, "memory": _memory()}


def cpu_name() -> str:
    """What the system calls the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    """Bytes of main memory, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _git() -> dict[str, Any] | None:
    for folder in (Path(), _SOURCE):
        try:
            sha = _run_git(folder, "rev-parse", "HEAD")
            return {"sha": sha, "dirty": bool(_run_git(folder, "status", "--porcelain", "--untracked-files=no"))}
        except (OSError, subprocess.SubprocessError):
            continue
    told = os.environ.get("EXPKIT_COMMIT")
    return {"sha": told, "dirty": None} if told else None


def _run_git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
