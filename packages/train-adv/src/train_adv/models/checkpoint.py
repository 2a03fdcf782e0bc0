"""One model, one safetensors file: weights, and in its metadata all that is needed to build and use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expkit.checkpoint import load_tensors, read_metadata, save_tensors
from expkit.errors import UsageError
from train_adv.models.build import build
from train_adv.models.classifier import Classifier, ModelSpec

_KEY = "train-adv"


def save_model(path: Path, model: Classifier, figures: dict[str, Any] | None = None) -> None:
    """Write the model; `figures` (epoch, validation accuracy and the like) travel in the metadata."""
    metadata = {"format": _KEY, "model": model.spec.to_json(), "figures": json.dumps(figures or {})}
    save_tensors(path, model.state_dict(), metadata)


def load_model(path: Path, device: str | torch.device = "cpu", model: nn.Module | None = None) -> Classifier:
    """Read what `save_model` wrote, in eval mode. A folder is that of a run: its best checkpoint, else the last.

    Args:
        path: the file or the run's folder.
        model: the network, where it is one of the caller's own.

    Raises:
        UsageError: no such file, another kind of file, or weights of another architecture.
    """
    path = find_model(path)
    spec = spec_of(path)
    built = Classifier(model, spec) if model is not None else build(spec)
    load_weights(built, load_tensors(path), str(path))
    return built.to(device).eval()


def spec_of(path: Path) -> ModelSpec:
    """What a checkpoint says about its model; UsageError where it is none."""
    path = find_model(path)
    metadata = read_metadata(path)
    if metadata.get("format") != _KEY or "model" not in metadata:
        raise UsageError(f"{path} is not a train-adv checkpoint: its metadata names no model")
    return ModelSpec.from_json(metadata["model"])


def load_weights(model: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Put tensors into a model, all of them or none.

    Raises:
        UsageError: names or shapes differ: one of them is named.
    """
    own = model.state_dict()
    missing, unknown = own.keys() - tensors.keys(), tensors.keys() - own.keys()
    other = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if missing or unknown or other:
        example = sorted(missing or unknown or other)[0]
        what = "lacks" if missing else "has also" if unknown else "has another shape for"
        raise UsageError(
            f'{source} is of another architecture: it {what} "{example}" '
            f"({len(missing)} missing, {len(unknown)} unknown, {len(other)} of another shape)"
        )
    model.load_state_dict(tensors)


def figures_of(path: Path) -> dict[str, Any]:
    """What was saved beside the weights."""
    found: dict[str, Any] = json.loads(read_metadata(find_model(path)).get("figures", "{}"))
    return found


def find_model(path: Path) -> Path:
    """The checkpoint that `path` means: a file, or the best (else last) one of a run's folder."""
    if not path.is_dir():
        return path
    for name in ("best.safetensors", "last.safetensors"):
        if (path / name).is_file():
            return path / name
    raise UsageError(f"{path} holds no best.safetensors or last.safetensors; is it the folder of a finished run?")
