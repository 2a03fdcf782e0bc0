"""Options that several verbs share, so that they read the same everywhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from train_adv.data.dataset import DataSet
    from train_adv.data.folder import CorruptPolicy
    from train_adv.training.config import TrainConfig

Data = Annotated[
    str | None,
    typer.Option(
        help="digits, cifar10, cifar100, svhn, tiny-imagenet, a folder, FILE.npz#x,y,x,y; else the run's own."
    ),
]
DataDir = Annotated[Path | None, typer.Option(help="Looked in first, before EXPKIT_DATA and the user's cache.")]
Epsilon = Annotated[
    str | None, typer.Option(help="Radius, for images in [0, 1]: 8/255 or 0.0314; else that of the run.")
]
Norm = Annotated[str | None, typer.Option(help="Linf, L2 or L1; else that of the run.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Corrupt = Annotated[str, typer.Option(help="refuse or skip images that cannot be read.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at once.")]
Limit = Annotated[int, typer.Option(min=0, help="Only the first so many test images; 0 is all.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of every random start.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too.")]


def check_outputs(files: Sequence[Path | None] = (), folders: Sequence[Path | None] = ()) -> None:
    """UsageError for an output that could not be written at the end: a folder where a file is to be, or so."""
    from expkit.checkpoint import require_replaceable
    from expkit.errors import UsageError

    for path in files:
        if path is not None and path.is_dir():
            raise UsageError(f"{path} is a folder; name a file to be written")
        if path is not None:
            require_replaceable(path)
    for path in [*(each.parent for each in files if each is not None), *(each for each in folders if each is not None)]:
        there = next(each for each in (path, *path.absolute().parents) if each.exists())
        if not there.is_dir():
            raise UsageError(f"{there} is a file; a folder is needed there")
        if not os.access(there, os.W_OK):
            raise UsageError(f"{there} cannot be written to")


def parse_number(text: str | None, name: str) -> float | None:
    """`8/255` or `0.03` as a number; UsageError for anything else."""
    from expkit.errors import UsageError

    if text is None:
        return None
    above, slash, below = text.partition("/")
    try:
        return float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"{name} is {text!r}; expected a number such as 0.03 or 8/255") from None


def corrupt_policy(corrupt: str) -> CorruptPolicy:
    """What `--corrupt` says; UsageError for anything else."""
    from expkit.errors import UsageError

    if corrupt not in ("refuse", "skip"):
        raise UsageError(f"--corrupt is {corrupt!r}; use refuse or skip")
    return "skip" if corrupt == "skip" else "refuse"


def run_config(checkpoint: Path) -> TrainConfig | None:
    """The configuration of the run that a checkpoint (or folder) belongs to, where it lies beside it."""
    from expkit.config import load_config
    from train_adv.training.config import TrainConfig

    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    path = folder / "config.toml"
    return load_config(TrainConfig, path) if path.is_file() else None


def data_of(name: str | None, data_dir: Path | None, checkpoint: Path) -> DataSet:
    """The data that the user names, else the run's own.

    Raises:
        UsageError: neither is known, or the data cannot be read.
    """
    from dataclasses import replace

    from expkit.errors import UsageError
    from train_adv.models.checkpoint import spec_of
    from train_adv.training.config import DataConfig
    from train_adv.training.given import read_data

    require_there(checkpoint)
    config = run_config(checkpoint)
    if name is None and config is None:
        raise UsageError(f"{checkpoint} lies in no run's folder, so its data are not known; give --data")
    settings = config.data if config is not None else DataConfig()
    if name not in (None, settings.name) or config is None:
        _, height, width = spec_of(checkpoint).image_shape
        if height != width and Path(str(name)).is_dir():
            raise UsageError(f"{checkpoint} takes images of {width}x{height}, and a folder's are read as squares")
        settings = replace(settings, name=str(name), image_size=height)
    try:
        return read_data(replace(settings, dir=data_dir if data_dir is not None else settings.dir))
    except UsageError as error:
        if name is None:
            raise UsageError(f"the data of {checkpoint}, unless --data names others: {error}") from None
        raise


def require_there(checkpoint: Path) -> None:
    """UsageError where there is no such checkpoint, or a folder without one."""
    from expkit.errors import UsageError
    from train_adv.models.checkpoint import find_model

    if not checkpoint.exists():
        raise UsageError(f"{checkpoint} does not exist")
    if find_model(checkpoint).suffix != ".safetensors":
        raise UsageError(f"{checkpoint} is no checkpoint; give a run's folder or a .safetensors file")


def attack_of(epsilon: str | None, norm: str | None, checkpoint: Path) -> tuple[float, str]:
    """Radius and norm that the user gives, else the run's own.

    Raises:
        UsageError: neither is known.
    """
    from expkit.errors import UsageError
    from train_adv.attacks.norms import check_epsilon

    require_there(checkpoint)
    config = run_config(checkpoint)
    radius = parse_number(epsilon, "--epsilon")
    if radius is None and config is not None and norm not in (None, config.attack.norm):
        raise UsageError(f"the run's epsilon is one of {config.attack.norm}; give --epsilon with --norm {norm}")
    if radius is None:
        radius = config.resolved().attack.epsilon if config is not None else None
    if radius is None:
        raise UsageError(f"{checkpoint} lies in no run's folder, so its epsilon is not known; give --epsilon")
    kind = norm if norm is not None else config.attack.norm if config is not None else "Linf"
    check_epsilon(radius, kind)
    return radius, kind
