"""`evaluate`: named attacks on a split, chunk by chunk, with a progress bar and a memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import train_adv
from expkit.cli import progress
from expkit.errors import UsageError
from train_adv.attacks.norms import check_epsilon, make_norm
from train_adv.data.batches import to_float
from train_adv.data.dataset import DataSet
from train_adv.evaluation.attacks import NAMES, Evaluator
from train_adv.evaluation.statistics import accuracy, paired_difference
from train_adv.evaluation.store import AnswerStore
from train_adv.models.checkpoint import find_model, load_model
from train_adv.models.classifier import Classifier
from train_adv.modes import eval_mode

_PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """What answers depend on.

    Attributes:
        epsilon, norm: of the attacks.
        limit: the first so many test images; 0 is all. `autoattack_limit` is that of AutoAttack alone.
        size: images of one batch; ten batches make a chunk, the unit of a restart, and one does on a CPU, or for
            AutoAttack.
        precision: "fp32", "tf32" or "bf16", of the model inside the attacks; verdicts are in fp32 always.
        compiled: see `Evaluator`.
        seed: of the random starts.
    """

    epsilon: float
    norm: str = "Linf"
    limit: int = 0
    autoattack_limit: int = 1000
    size: int = 500
    precision: str = "fp32"
    compiled: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon, self.norm)
        make_norm(self.norm)
        if self.precision not in _PRECISIONS:
            raise UsageError(f"precision is {self.precision!r}; use one of {', '.join(_PRECISIONS)}")
        if self.size < 1 or self.limit < 0 or self.autoattack_limit < 0:
            raise UsageError(f"batch size {self.size}, limits {self.limit} and {self.autoattack_limit}: out of range")


def evaluate(
    checkpoint: Path,
    data: DataSet,
    attacks: Sequence[str],
    settings: Settings,
    *,
    device: torch.device,
    work: Path | None = None,
    model: Classifier | None = None,
) -> dict[str, Tensor]:
    """Which test images each attack leaves rightly classified: name -> boolean (n,).

    Args:
        checkpoint: a file, or a run's folder.
        attacks: some of `train_adv.evaluation.attacks.NAMES`.
        work: folder of the memory; left out, `eval` beside the checkpoint.
        model: the network, where it was read already; it is moved to `device`, and keeps its mode.

    Raises:
        UsageError: an unknown attack; a checkpoint that cannot be read or that does not fit the data.
    """
    unknown = [name for name in attacks if name not in NAMES]
    if unknown:
        raise UsageError(f"unknown attack {unknown[0]!r}; use some of {', '.join(NAMES)}")
    if not attacks:
        raise UsageError(f"no attack is named; use some of {', '.join(NAMES)}")
    require_classes(attacks, len(data.class_names))
    path = find_model(checkpoint)
    if model is None:
        model = load_model(path, device)
    require_fit(model, data, path)
    key = {**asdict(settings), "data": data.name, "images": data.test.fingerprint(), "version": train_adv.__version__}
    for name in ("limit", "autoattack_limit"):
        del key[name]  # chunks are the same whatever the limit, but for the last one, which is checked below
    # which images a number means
    key["chunks"] = [_chunk_size(name, settings, device) for name in ("autoattack", "pgd20")]
    store = AnswerStore(work if work is not None else path.parent / "eval", path, key)
    evaluator = Evaluator(
        model.to(device).to(memory_format=torch.channels_last),
        settings.epsilon,
        settings.norm,
        settings.size,
        device,
        _PRECISIONS[settings.precision],
        settings.precision == "tf32",
        settings.compiled,
        settings.seed,
    )
    shown = path.resolve().parent.name
    with eval_mode(model), progress() as bar:
        task = bar.add_task(shown, total=sum(_count(name, data, settings) for name in attacks))
        found = {}
        for name in attacks:
            bar.update(task, description=f"{shown}: {name}")
            parts = []
            for number, indices in enumerate(
                torch.split(torch.arange(_count(name, data, settings)), _chunk_size(name, settings, device))
            ):
                parts.append(_chunk(evaluator, store, data, name, number, indices))
                bar.advance(task, len(indices))
            found[name] = torch.cat(parts)
    return found


def _chunk_size(name: str, settings: Settings, device: torch.device) -> int:
    """Images: many on a GPU, as the last batch of those that still stand is filled up, but where each takes long."""
    return settings.size * (1 if name == "autoattack" or device.type == "cpu" else 10)


def _chunk(evaluator: Evaluator, store: AnswerStore, data: DataSet, name: str, number: int, indices: Tensor) -> Tensor:
    known = store.get(name, number)
    if known is not None and len(known) == len(indices):
        return known
    images = to_float(data.test.read(indices).to(evaluator.device)).contiguous(memory_format=torch.channels_last)
    labels = data.test.labels[indices.to(data.test.labels.device)].to(evaluator.device)
    answers = evaluator.survivors(name, images, labels, number)
    store.put(name, number, answers)
    return answers


def _count(name: str, data: DataSet, settings: Settings) -> int:
    limit = settings.limit or len(data.test)
    if name == "autoattack" and settings.autoattack_limit:
        limit = min(limit, settings.autoattack_limit)
    return min(limit, len(data.test))


def require_fit(model: Classifier, data: DataSet, path: Path) -> None:
    """Raise UsageError where a checkpoint's classes or channels are not the data's; arrays name no classes."""
    spec = model.spec
    if len(spec.class_names) != len(data.class_names) or spec.image_shape[0] != data.image_shape[0]:
        raise UsageError(
            f"{path} knows {len(spec.class_names)} classes of {spec.image_shape[0]}-channel images, and {data.name} "
            f"has {len(data.class_names)} of {data.image_shape[0]}"
        )
    if spec.class_names != data.class_names and "#" not in data.name:
        own, other = next(pair for pair in zip(spec.class_names, data.class_names, strict=True) if pair[0] != pair[1])
        raise UsageError(f'{path} knows a class "{own}" where {data.name} has "{other}": they are not the same classes')


def require_classes(attacks: Sequence[str], classes: int) -> None:
    """Raise UsageError where an attack's targeted loss is not defined for so few classes."""
    for name in attacks:
        if name in ("apgd-t", "apgd", "autoattack") and classes < 4:
            raise UsageError(f"{name} needs at least 4 classes, and there are {classes}; use apgd-ce, cw or pgd100")


def row(name: str, answers: dict[str, Tensor], data: DataSet) -> dict[str, Any]:
    """The figures of one checkpoint, as they go into JSON."""
    labels = data.test.labels.cpu()
    figures = {each: accuracy(right, labels[: len(right)], len(data.class_names)) for each, right in answers.items()}
    return {"name": name, "attacks": figures}


def differences(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Any]:
    """First minus second, attack by attack, on the images that both were tried on."""
    return {
        name: paired_difference([(first[name][: len(second[name])], second[name][: len(first[name])])])
        for name in first.keys() & second.keys()
    }


def markdown(rows: Sequence[dict[str, Any]], compared: dict[str, Any] | None = None) -> str:
    """A table of rows (accuracy and interval in per cent), and one of differences."""
    names = [each for each in NAMES if any(each in entry["attacks"] for entry in rows)]
    images = {
        name: max(entry["attacks"][name]["images"] for entry in rows if name in entry["attacks"]) for name in names
    }
    heads = [f"{name} ({images[name]} images)" if len(set(images.values())) > 1 else name for name in names]
    lines = ["| checkpoint | " + " | ".join(heads) + " |", "|---" * (len(names) + 1) + "|"]
    for entry in rows:
        cells = []
        for name in names:
            found = entry["attacks"].get(name)
            cells.append(_cell(found["accuracy"], found["interval"]) if found else "")
        lines.append(f"| {entry['name']} | " + " | ".join(cells) + " |")
    if compared:
        for other, table in compared.items():
            cells = [_cell(table[n]["difference"], table[n]["interval"], "+") if n in table else "" for n in names]
            lines.append(f"| {other} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float, interval: tuple[float, float], sign: str = "") -> str:
    return f"{100 * value:{sign}.2f} [{100 * interval[0]:{sign}.2f}, {100 * interval[1]:{sign}.2f}]"
