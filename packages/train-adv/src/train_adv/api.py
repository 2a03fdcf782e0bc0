"""`fit` and `load`: the whole trainer from Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

if TYPE_CHECKING:
    from train_adv.data.dataset import DataSet
    from train_adv.models.classifier import Classifier
    from train_adv.training.run import Outcome


def fit(
    model: str | nn.Module | Callable[[], nn.Module],
    data: str | DataSet,
    *,
    host: str = "at",
    topology: float | Mapping[str, Any] = 0.0,
    name: str = "run",
    runs: str | Path = "runs",
    resume: bool = False,
    **settings: Any,
) -> Outcome:
    """Train a model and keep it in `runs/name`.

    Args:
        model: a name (see `train_adv.models.build`); a network, of which copies are trained; or a function that makes
            a fresh one. The network takes normalised images and needs no normalisation of its own.
        data: a name, a folder, or a `DataSet`, whose own name the run's configuration then has.
        host: standard, at, trades, mart, lbgat, fgsm-rs or n-fgsm.
        topology: lambda of TRAIN, or the table of `TopologyConfig`; the standard model is trained first unless its
            `path` is given.
        resume: go on with the run of this name.
        settings: any other key of `TrainConfig`, tables as mappings: `epochs=30, optimizer={"lr": 0.2}`; keys of the
            table `data` one by one: `**{"data.limit": 1000}`.

    Returns:
        An `Outcome`: `.model` (the best one), `.folder`, `.result`; under torchrun the same in every process.

    Random generators and settings of torch that training changes are put back at the end.

    Raises:
        UsageError: an unknown key (the nearest one is named), one that says nothing of what was given, or anything
            that cannot be trained.
    """
    from expkit.config import flatten, load_config
    from expkit.distributed import join, leave
    from expkit.errors import UsageError
    from train_adv.data.dataset import DataSet
    from train_adv.precision import process_as_before
    from train_adv.training.config import TrainConfig
    from train_adv.training.given import Given
    from train_adv.training.run import train

    table = topology if isinstance(topology, Mapping) else {"weight": topology}
    flags: dict[str, Any] = flatten({**settings, "host": host, "name": name, "topology": table})
    if isinstance(model, str):
        flags["model"] = model
    if not isinstance(data, str):
        if not isinstance(data, DataSet):
            raise UsageError(f"data is a {type(data).__name__}; use a name, a folder or a train_adv DataSet")
        of_names = [key for key in flags if key.startswith("data.") and key not in ("data.name", "data.workers")]
        if of_names:
            raise UsageError(f"{of_names[0]} is for data that are read by name; change the DataSet instead")
    if not isinstance(model, str) and flags.get("teacher") is not None:
        raise UsageError("teacher is for models by name; LBGAT's is another network of the given kind")
    flags["data.name"] = data if isinstance(data, str) else data.name
    maker: Callable[[], nn.Module] | None = None
    if isinstance(model, nn.Module):
        network = model
        maker = lambda: deepcopy(network)  # noqa: E731
    elif not isinstance(model, str):
        maker = model
    given = Given(data=None if isinstance(data, str) else data, model=maker)
    config = load_config(TrainConfig, None, flags)
    joined = not (dist.is_available() and dist.is_initialized())  # a group of the caller's stays the caller's
    with process_as_before():
        try:
            return train(config, Path(runs), join(), resume=resume, given=given)
        finally:
            if joined:
                leave()


def load(run: str | Path, *, model: nn.Module | None = None, device: str = "cpu") -> Classifier:
    """The model of a run's folder (the best, else the last) or of one checkpoint file, in eval mode.

    It takes images in [0, 1] and gives logits; `with_features` gives pooled features too.

    Raises:
        UsageError: there is none, or it is of another architecture.
    """
    from train_adv.models.checkpoint import load_model

    return load_model(Path(run), device, model)
