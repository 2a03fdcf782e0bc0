"""What is measured after each round, and what a run's selections come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pden.data import Domain
from pden.evaluation.accuracy import evaluate
from pden.models import TaskModel
from pden.training.trainer import Trainer


def measure_round(
    trainer: Trainer, number: int, targets: Sequence[Domain], disguised: Sequence[Domain] = ()
) -> dict[str, Any]:
    """Validation and target figures of the last and the averaged weights after a round (0: pre-training).

    Args:
        targets: none where this round is not measured on them.
        disguised: held-out source images in disguise.
    """
    entry: dict[str, Any] = {"round": number, "step": trainer.clock.total}
    entry["last"] = figures(trainer.task, trainer.validation, targets, disguised)
    if trainer.averaged is not None:
        entry["averaged"] = figures(trainer.averaged, trainer.validation, targets, disguised)
    return entry


def figures(
    model: TaskModel, validation: Domain, targets: Sequence[Domain], disguised: Sequence[Domain] = ()
) -> dict[str, Any]:
    """Accuracy (mIoU for segmentation) on the validation images, on them in each disguise with the mean, on each
    target, and the targets' average."""
    found: dict[str, Any] = {"validation": evaluate(model, validation).value}
    if disguised:
        found["disguises"] = {each.name.rpartition(", ")[2]: evaluate(model, each).value for each in disguised}
        found["disguised"] = sum(found["disguises"].values()) / len(disguised)
    scores = [evaluate(model, each) for each in targets]
    if scores:
        found["targets"] = {each.domain: each.value for each in scores}
        found["average"] = sum(each.value for each in scores) / len(scores)
    return found


def selections(history: Sequence[dict[str, Any]], best_round: int) -> dict[str, dict[str, Any]]:
    """Figures by how the model was selected.

    `last` and `averaged` take the final round, `source-validation` the round that labelled the held-out source images
    best; `oracle` takes the round that was best on the targets themselves, which nobody could have known (left out
    unless every round was measured on them).
    """
    final = history[-1]
    found: dict[str, dict[str, Any]] = {"last": {**final["last"], "round": final["round"]}}
    if "averaged" in final:
        found["averaged"] = {**final["averaged"], "round": final["round"]}
    chosen = next((each for each in history if each["round"] == best_round), None)
    if chosen is not None:
        found["source-validation"] = {**chosen["last"], "round": best_round}
    measured = [each for each in history if "average" in each["last"]]
    if len(measured) == len(history):
        top = max(measured, key=lambda each: each["last"]["average"])
        found["oracle"] = {**top["last"], "round": top["round"]}
    return found
