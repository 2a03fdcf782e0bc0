"""Whether data, model and settings of a run fit each other."""

from __future__ import annotations

from expkit.distributed import World
from expkit.errors import UsageError
from pden.data import Domain
from pden.training.config import TrainConfig


def require_fit(config: TrainConfig, source: Domain, validation: Domain, world: World) -> None:
    """Raise UsageError where they do not; one line says how."""
    if len(source.present) < 2:
        raise UsageError(f"{source.name}: all images have one class; a classifier needs at least 2")
    if source.classes != validation.classes or source.images.shape[1:] != validation.images.shape[1:]:
        raise UsageError(
            f"validation {validation.name} ({len(validation.classes)} classes, {tuple(validation.images.shape[1:])}) "
            f"does not fit the source {source.name} ({len(source.classes)}, {tuple(source.images.shape[1:])})"
        )
    if source.dense != validation.dense:
        raise UsageError(
            f"of {source.name} and validation {validation.name}, one has labels for pixels and one for images"
        )
    if source.dense != config.model.name.startswith("fcn-"):
        need = "fcn-resnet50 or fcn-small" if source.dense else "a model for classification"
        raise UsageError(f"{source.name} has one label for each {'pixel' if source.dense else 'image'}; use {need}")
    height, width = source.images.shape[-2:]
    if config.model.name == "digits" and height != width:
        raise UsageError(f"{source.name}: images of {height}x{width}; model digits takes square ones, wrn-16-4 any")
    if source.dense and config.data.randaugment:
        raise UsageError("segmentation takes no data.randaugment: it would move the labels")
    if config.generator.grid > min(height, width):
        raise UsageError(f"generator.grid is {config.generator.grid} on images of {height}x{width}; use a coarser one")
    if source.dense and config.method not in ("pden", "erm"):
        raise UsageError(f"method {config.method} is for classification; segmentation has pden and erm")
    if source.dense and set(config.generator.kinds) != {"photometric"}:
        raise UsageError('segmentation needs generator.kinds = ["photometric"]: the others would move the labels')
    for key, size in (("batch", config.batch), ("pretrain_batch", config.pretrain_batch)):
        if size % world.size or size // world.size < 2:
            need = f"it must be {2 * world.size} or another multiple of {world.size}"
            raise UsageError(f"{key} is {size} on {world.size} processes; {need}")
