"""The job behind `coral-spec train`: a run directory around a `Trainer`, from start or checkpoint to the drafter."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coral_spec.targets import Target
from coral_spec.training.config import TrainConfig
from coral_spec.training.data import Answers, Manifest, require_same_target
from coral_spec.training.loop import Loop, Scores, fit
from coral_spec.training.report import model_card, plot_curves, save_drafter
from coral_spec.training.trainer import Trainer
from expkit.checkpoint import Checkpoint, CheckpointStore, write_json
from expkit.cli import console, progress
from expkit.device import peak_memory
from expkit.distributed import World, barrier
from expkit.errors import UsageError
from expkit.metrics import read_metrics
from expkit.rundir import RunDir, evidence


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        folder: the run's directory; the drafter is in its folder `drafter`.
        result: the figures that `result.json` holds.
    """

    folder: Path
    result: dict[str, Any]


def read_answers(config: TrainConfig, target: Target) -> tuple[Answers, list[Manifest]]:
    """The answers of all data folders, in order.

    Raises:
        UsageError: a folder without answers, incomplete, or written by another model.
    """
    manifests = [Manifest.read(folder) for folder in config.data]
    for manifest, folder in zip(manifests, config.data, strict=True):
        require_same_target(manifest, target, folder)
    return Answers.join([Answers.read(folder) for folder in config.data]), manifests


def train(config: TrainConfig, target: Target, runs: Path, world: World, *, resume: bool = False) -> Outcome | None:
    """Train a drafter, evaluate, keep checkpoints, and leave it; the other processes return None.

    Args:
        runs: folder of all runs.
        resume: go on with the run of this name.

    Raises:
        UsageError: see `read_answers` and `RunDir.create`.
    """
    record = evidence(config.seed)
    answers, manifests = read_answers(config, target)
    trainer = Trainer(config, target, answers, world)
    run = fit_in(runs, trainer, resume=resume)
    return None if run is None else _finish(trainer, run, manifests, record)


def fit_in(runs: Path, trainer: Loop, *, resume: bool) -> RunDir | None:
    """Run a loop to its end in the run directory `runs/NAME`; the directory, or None on all but the main process.

    Raises:
        UsageError: see `RunDir.create`.
    """
    config = trainer.config
    run = RunDir.create(runs, config.name, config, resume) if trainer.world.is_main else None
    barrier()
    checkpoint = CheckpointStore(runs / config.name / "checkpoints").latest() if resume else None
    if checkpoint is not None:
        trainer.restore(checkpoint)
    if run is None:
        _fit_along(trainer)
        barrier()
        return None
    trainer.keep(run.path)
    try:
        _fit_with_records(trainer, run)
    finally:
        run.metrics.close()
    barrier()
    return run


def best_of(run: RunDir) -> Checkpoint:
    """The checkpoint with the best score; UsageError when there is none."""
    best = run.checkpoints.best()
    if best is None:
        raise UsageError(f"{run.path} has no checkpoint to make anything of")
    return best


def common_result(
    trainer: Loop, run: RunDir, manifests: list[Manifest], record: dict[str, Any], best_step: int
) -> dict[str, Any]:
    """What every stage's `result.json` holds."""
    clock = trainer.clock
    return {
        **record,
        "name": trainer.config.name,
        "target": trainer.target.name,
        "align_steps": trainer.config.align_steps,
        "best_step": best_step,
        "steps": clock.step,
        "tokens": clock.tokens,
        "minutes": clock.seconds / 60,
        "tokens_per_second": clock.tokens / max(clock.seconds, 1e-9),
        "answer_tokens": trainer.answers.answer_tokens,
        "held_out_rows": sum(len(batch.tokens) for batch in trainer.held_out),
        "peak_memory_bytes": peak_memory(trainer.target.device),
        "data": [asdict(manifest) for manifest in manifests],
    }


def _fit_along(trainer: Loop) -> None:
    """The part of processes that write nothing: metrics are averaged over all, so they take part in that."""
    schedule = trainer.config

    def on_step() -> None:
        if _logs_now(schedule, trainer.clock.step) and trainer.progress() < 1:
            trainer.take_metrics()

    def on_evaluation(_: Scores | None) -> None:
        trainer.take_metrics()

    fit(trainer, on_step, on_evaluation)


def _logs_now(config: TrainConfig, step: int) -> bool:
    return step % config.log_every == 0 and step % config.evaluation.every != 0


def _fit_with_records(trainer: Loop, run: RunDir) -> None:
    config, clock = trainer.config, trainer.clock
    console().print(
        f"{config.target}, {config.align_steps} step(s), {len(trainer.training_rows)} answers, "
        f"{len(trainer.held_out)} held-out batches: {run.path}"
    )
    before = (clock.seconds, clock.tokens)

    with progress() as bar:
        task = bar.add_task(config.name, total=config.steps, completed=clock.step)

        def log(**extra: float) -> None:
            nonlocal before
            clock, metrics = trainer.clock, trainer.take_metrics()
            trainer.tick()
            seconds, tokens = clock.seconds - before[0], clock.tokens - before[1]
            before = (clock.seconds, clock.tokens)
            rate = trainer.optimizer.param_groups[0]["lr"]
            speed = tokens / max(seconds, 1e-9)
            run.metrics.log(
                clock.step,
                lr=rate,
                seconds=clock.seconds,
                tokens=float(clock.tokens),
                tokens_per_second=speed,
                **metrics,
                **extra,
            )

        def on_step() -> None:
            bar.update(task, completed=trainer.clock.step)
            if _logs_now(config, trainer.clock.step) and trainer.progress() < 1:
                log()

        def on_evaluation(found: Scores | None) -> None:
            assert found is not None
            log(epoch=float(trainer.plan.epoch_of(trainer.clock.step - 1)), **found.figures)
            better = found.score > trainer.clock.best
            trainer.clock.best = max(found.score, trainer.clock.best)
            run.checkpoints.save(trainer.clock.step, trainer.module.state_dict(), trainer.state(), best=better)
            bar.update(task, description=f"{config.name}: {trainer.said.format(found.score)}")

        fit(trainer, on_step, on_evaluation)


def _finish(trainer: Trainer, run: RunDir, manifests: list[Manifest], record: dict[str, Any]) -> Outcome:
    config, best = trainer.config, best_of(run)
    lines = read_metrics(run.path / "metrics.jsonl")
    scored = {int(line["step"]): line for line in lines if "tau_sim" in line}
    rates = [value for name, value in scored[best.step].items() if name.startswith("rate_")]
    result = {
        **common_result(trainer, run, manifests, record, best.step),
        "tau_sim": scored[best.step]["tau_sim"],
        "rates": rates,
    }
    trainer.drafter.load_state_dict(best.tensors)
    ranking = trainer.answers.frequency_ranking(trainer.training_rows, trainer.backbone.vocab_size)
    save_drafter(run.path / "drafter", trainer.drafter, model_card(config, result, manifests), ranking)
    title = f"{config.name}: {config.align_steps} step(s), {config.target}"
    if not plot_curves(run.path / "curves.png", lines, title):
        console().print("curves.png is left out: matplotlib is not installed")
    write_json(run.path / "result.json", result)
    return Outcome(run.path, result)
