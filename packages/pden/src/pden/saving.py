"""A trained run on disk: `model/model.json`, one safetensors file per selection, and one of all generators."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expkit.checkpoint import load_tensors, save_tensors, write_json
from expkit.device import resolve_device
from expkit.errors import UsageError
from pden.data.domain import fit_images, to_uint8
from pden.generators import Generator, build_generator, generator_settings
from pden.models import TaskModel, build_model

if TYPE_CHECKING:
    from pden.training.trainer import Trainer

SELECTIONS = ("last", "averaged", "source-validation")


@dataclass(frozen=True)
class Expanded:
    """What `load` gives: a trained model with the domains it was trained on.

    Attributes:
        model: the task model, in eval mode.
        generators: of the accepted domains in order; each is an image transform.
        domains: what the gate measured of each of them (empty where there was no gate).
        classes: names of the labels.
        size, channels: that its data were fitted to (`data.size`, `data.channels`).
        shape: height and width of the images that it was trained on.
        source: the source's specification.
        validation: that of the held-out domain, where it was one of its own.
        selection: which weights these are.
    """

    model: TaskModel
    generators: list[Generator]
    domains: list[dict[str, Any]]
    classes: tuple[str, ...]
    size: int
    channels: int
    shape: tuple[int, int]
    source: str
    validation: str
    selection: str

    @torch.no_grad()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Labels and their probabilities, ``(batch,)`` each (with pixels after it for segmentation).

        Args:
            images: uint8 or floats in [0, 1], ``(batch, channels, height, width)``; resized to `shape` (in segmentation
                to `size`, in their own shape), and grey ones copied to colour.

        Raises:
            UsageError: no such tensor, bad pixels, or a shape that the model does not take.
        """
        if not isinstance(images, Tensor) or images.dim() != 4:
            raise UsageError("predict takes a tensor (batch, channels, height, width)")
        device = next(self.model.parameters()).device
        size = self.size if self.model.dense else self.shape
        fitted = fit_images(to_uint8(images, "images"), size, self.channels, "images").to(device)
        parts = [self.model(part.float() / 255).softmax(dim=1) for part in torch.split(fitted, 512)]
        probabilities = torch.cat(parts)
        top = probabilities.max(dim=1)
        return top.indices, top.values


def save(trainer: Trainer, run: str | Path, *, source: str = "", validation: str = "") -> None:
    """Write what `load` reads: a trainer's model, its other weights, and the generators of its accepted domains.

    Args:
        trainer: pre-trained at least; of a round that is not done, the model is kept and the domain is not.
        run: a folder, made where there is none.
        source, validation: what `load_domain` knows the data by; the source's name where it is nothing of the kind.

    Raises:
        UsageError: nothing is trained yet, or the folder is a run of `pden train`.
    """
    if (Path(run) / "config.toml").exists():
        raise UsageError(f"{run} is a run of pden train, whose figures are of its own model; name another folder")
    write_trained(trainer, Path(run), source=source, validation=validation)


def write_trained(trainer: Trainer, run: Path, *, source: str, validation: str) -> None:
    """:func:`save`, into a run's folder too."""
    config, images = trainer.config, trainer.source.images
    if trainer.clock.stage == "pretrain":
        raise UsageError("nothing to save: pre-training is not done")
    weights = {"last": trainer.task.state_dict(), "source-validation": trainer.best.tensors}
    if trainer.averaged is not None:
        weights["averaged"] = trainer.averaged.state_dict()
    channels = images.shape[1]
    model = {"name": config.model.name, "classes": len(trainer.source.classes), "channels": channels}
    model |= {"size": trainer.size, "width": config.model.width, "embedding": config.model.embedding}
    settings = {"model": model, "classes": trainer.source.classes, "channels": channels}
    settings["shape"] = list(images.shape[-2:])
    settings["size"] = config.data.size and trainer.size  # which data of one's own need not have been fitted to
    settings |= {"source": source or trainer.source.name, "validation": validation}
    kept = [each.plain() for each in trainer.reports if each.verdict in ("accepted", "recorded")]
    settings["domains"] = kept[: len(trainer.pool)]  # a domain in the midst of its round is not in the pool
    save_model(run / "model", settings, weights, trainer.pool)


def save_model(
    folder: Path,
    settings: Mapping[str, Any],
    selections: Mapping[str, Mapping[str, Tensor]],
    generators: Sequence[Generator],
) -> None:
    """Write the model's folder.

    Args:
        settings: `model` (what `build_model` takes), and of `Expanded` classes, size, channels, shape, source,
            validation and domains.
        selections: weights by name, of `SELECTIONS`.
        generators: of the accepted domains.
    """
    for name, tensors in selections.items():
        save_tensors(folder / f"{name}.safetensors", tensors)
    merged = {
        f"{number}.{key}": value for number, each in enumerate(generators) for key, value in each.state_dict().items()
    }
    if merged:
        save_tensors(folder / "generators.safetensors", merged)
    made = [generator_settings(each) for each in generators]
    write_json(folder / "model.json", {**settings, "selections": list(selections), "generators": made})


def saved_selections(run: str | Path) -> list[str]:
    """Which of `SELECTIONS` a finished run has.

    Raises:
        UsageError: see `load`.
    """
    _, about = _read(run)
    return list(about["selections"])


def _read(run: str | Path) -> tuple[Path, dict[str, Any]]:
    """A model's folder and its `model.json`."""
    folder = Path(run) / "model" if (Path(run) / "model").is_dir() else Path(run)
    path = folder / "model.json"
    if not path.is_file():
        raise UsageError(f"{run} holds no trained model ({path} does not exist); train it, or --resume its training")
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        list(about["selections"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged or of another version ({type(error).__name__}: {error})") from None
    return folder, about


def load(run: str | Path, selection: str = "last", device: str | torch.device = "cpu") -> Expanded:
    """The model and generators of a finished run.

    Args:
        run: its folder.
        selection: last, averaged or source-validation (best on held-out source images).
        device: where both go; "auto" takes the GPU where there is one.

    Raises:
        UsageError: no finished run, no such selection, or files that are damaged or another model's.
    """
    folder, about = _read(run)
    path, place = folder / "model.json", resolve_device(str(device))
    try:
        if selection not in about["selections"]:
            raise UsageError(f'{run} has no selection "{selection}"; it has {", ".join(about["selections"])}')
        return Expanded(
            _load_model(folder / f"{selection}.safetensors", about["model"], place),
            _load_generators(folder, about["generators"], place),
            about["domains"],
            tuple(about["classes"]),
            about["size"],
            about["channels"],
            tuple(about.get("shape", (about["size"], about["size"]))),  # older runs do not say
            about["source"],
            about.get("validation", ""),  # older runs do not say
            selection,
        )
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged or of another version ({type(error).__name__}: {error})") from None


def _load_model(file: Path, settings: dict[str, Any], device: torch.device) -> TaskModel:
    model = build_model(**settings)
    fill(model, load_tensors(file), str(file))
    return model.to(device).eval()


def fill(module: torch.nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Give a module its weights.

    Raises:
        UsageError: they are another model's; one line says how.
    """
    try:
        module.load_state_dict(dict(tensors))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UsageError(f"{name} holds the weights of another model ({reason})") from None


def _load_generators(folder: Path, settings: list[dict[str, Any]], device: torch.device) -> list[Generator]:
    if not settings:
        return []
    tensors, generators = load_tensors(folder / "generators.safetensors"), []
    for number, each in enumerate(settings):
        generator = build_generator(**each)
        own = {key.removeprefix(f"{number}."): value for key, value in tensors.items() if key.startswith(f"{number}.")}
        fill(generator, own, str(folder / "generators.safetensors"))
        generators.append(generator.to(device).eval().requires_grad_(False))
    return generators
