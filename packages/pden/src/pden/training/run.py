"""The job behind `pden train`: a run directory around a `Trainer`, from start or checkpoint to the trained model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expkit.checkpoint import CheckpointStore, write_json
from expkit.cli import console, progress
from expkit.config import to_toml
from expkit.device import peak_memory, reserved_memory, reset_peak_memory, resolve_device, resolve_dtype
from expkit.distributed import World, barrier
from expkit.errors import UsageError
from expkit.rundir import RunDir, evidence
from pden.data import Domain, Home, load_domain
from pden.evaluation.disguise import disguises
from pden.evaluation.targets import absent_note, load_targets, place, shared_notes, with_classes
from pden.saving import write_trained
from pden.training.config import TrainConfig
from pden.training.history import figures, measure_round, selections
from pden.training.state import capture, restore
from pden.training.trainer import Trainer


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        folder: its directory; the trained model is in its folder `model`.
        result: the figures that `result.json` holds.
    """

    folder: Path
    result: dict[str, Any]


def load_data(config: TrainConfig, home: Home) -> tuple[Domain, Domain, list[Domain]]:
    """Source, validation and targets.

    Raises:
        UsageError: see `load_domain` and `load_targets`.
    """
    data = config.data
    source = load_domain(data.source, home, size=data.size, channels=data.channels)
    if data.validation:
        if place(data.validation) == place(data.source):
            raise UsageError("data.validation is the source itself; left out, a share of the source is held out")
        held = load_domain(data.validation, home, size=data.size, channels=data.channels)
        held = with_classes(held, source.classes)
    else:
        source, held = source.split(data.validation_share, config.seed)
    seen = [data.source, data.validation] if data.validation else [data.source]
    targets = load_targets(data.targets, seen, source.classes, home, data.size, data.channels, dense=source.dense)
    return source, held, targets


def train(
    config: TrainConfig,
    home: Home,
    runs: Path,
    world: World,
    *,
    data: tuple[Domain, Domain, list[Domain]] | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Outcome | None:
    """Train, measure every round, keep checkpoints, and leave a model; other processes than the first return None.

    Args:
        runs: folder of all runs.
        data: what `load_data` gives for this config, where it is there already.
        resume: go on with the run of this name.
        quiet: print nothing but warnings and progress.

    Raises:
        UsageError: see `load_data`, `Trainer`, `shared_images` and `RunDir.create`.
    """
    record = evidence(config.seed)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    if dtype == torch.float16 and config.dtype == "auto":
        dtype = torch.float32  # a GPU without bfloat16
    if dtype == torch.float16:
        raise UsageError("training in float16 is not supported; use dtype bf16 or fp32")
    if not world.is_main:
        barrier()  # what is to be fetched is fetched by one process
    source, validation, targets = data or load_data(config, home)
    if world.is_main:
        barrier()
    reset_peak_memory(device)
    trainer = Trainer(config, source, validation, device=device, dtype=dtype, world=world)
    shared = shared_images(config, source, validation, targets) if world.is_main else []
    run = RunDir.create(runs, config.name, config, resume) if world.is_main else None
    barrier()
    job = _Job(trainer, run, [each.to(device) for each in targets], shared, quiet)
    checkpoint = CheckpointStore(runs / config.name / "checkpoints").latest() if resume else None
    if checkpoint is not None:
        try:
            restore(trainer, checkpoint)
            job.history = checkpoint.state["history"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or [""])[-1].strip()
            what = f"{type(error).__name__}: {reason}"
            raise UsageError(f"{checkpoint.path} is of another model or version ({what}); start a new run") from None
    try:
        job.work()
    except Exception:
        if run is not None and not resume:
            run.discard_unbegun()
        raise
    finally:
        if run is not None:
            run.metrics.close()
    barrier()
    return None if run is None else job.finish(record)


def shared_images(config: TrainConfig, source: Domain, validation: Domain, targets: Sequence[Domain]) -> list[str]:
    """Sentences on images of the targets that are trained or held out, and of the validation domain that are trained.

    Raises:
        UsageError: these are all of one's.
    """
    held = [validation] if config.data.validation else []  # a share held out may have twins
    return shared_notes(targets, (source, validation)) + shared_notes(held, [source])


class _Job:
    """A trainer with the files of its run; `run` is None on the processes that write nothing."""

    def __init__(
        self, trainer: Trainer, run: RunDir | None, targets: Sequence[Domain], shared: list[str], quiet: bool
    ) -> None:
        self.trainer, self.run, self.targets, self.shared, self.quiet = trainer, run, targets, shared, quiet
        self.history: list[dict[str, Any]] = []
        count = trainer.config.data.disguised if run is not None else 0
        self.disguised = disguises(trainer.validation, count) if count else []

    def say(self, text: str, always: bool = False) -> None:
        if self.run is not None and (always or not self.quiet):
            console().print(text, highlight=False, soft_wrap=True)

    def work(self) -> None:
        trainer, config = self.trainer, self.trainer.config
        self._introduce()
        with progress() as bar:
            shown = self.run is not None
            task = bar.add_task(config.name, total=trainer.planned_steps, completed=trainer.clock.total, visible=shown)
            saved = trainer.clock.total
            while not trainer.done:
                number = trainer.clock.round
                before = len(trainer.reports)
                event = trainer.step()
                if shown:
                    bar.update(task, completed=trainer.clock.total, total=trainer.planned_steps)
                for report in trainer.reports[before:]:
                    self._tell(report)
                for warning in trainer.take_warnings():
                    self.say(f"warning: {warning}", always=True)
                due = event == "round" or trainer.done or trainer.clock.total - saved >= config.checkpoint_every
                if due or event == "pretrained":
                    trainer.require_finite()  # neither measured nor kept, so that a resume has something to go on from
                if event in ("pretrained", "round"):
                    self._measure(0 if event == "pretrained" else number)
                    if shown:
                        bar.update(task, description=f"{config.name}: round {trainer.clock.round}/{config.rounds}")
                if self.run is not None and (due or trainer.clock.total % config.log_every == 0):
                    self._log()  # before a checkpoint too, so that a resumed run's means are of the same steps
                if due:
                    saved = trainer.clock.total
                    self._save()
        if not self.history or (self.history[-1]["round"] != trainer.clock.round and config.rounds):
            self._measure(trainer.clock.round)  # the last round's domain was dropped
        if trainer.stopped:
            rounds = f"{config.stop.patience} round(s) in a row brought nothing new"
            self.say(f"stopped after round {trainer.clock.round} of {config.rounds}: {rounds}", always=True)
        if trainer.reports and not trainer.pool:
            self.say("warning: no domain passed the gate: the model is that of pre-training", always=True)
        self._measure_best()

    def _introduce(self) -> None:
        trainer, config = self.trainer, self.trainer.config
        for note in dict.fromkeys(n for target in self.targets for n in (target.note, absent_note(target)) if n):
            self.say(f"note: {note}")
        for note in self.shared:
            self.say(f"note: {note}", always=True)
        if config.rounds == 0 and trainer.expands:
            self.say("note: with 0 rounds nothing is expanded: this is plain training on the source (ERM)", always=True)
        growth = trainer.baseline.growth
        late = [str(step) for step in growth if step >= trainer.planned_steps]
        if late:
            done = len(growth) - len(late)
            self.say(
                f"note: {config.method} adds images at steps {', '.join(map(str, growth))}, and this run ends after "
                f"{trainer.planned_steps}: it does so {done} times",
                always=True,
            )
        if note := absent_note(trainer.source):
            self.say(f"note: {note.partition(':')[0]}, which nothing is learned of", always=True)
        if self.run is not None:
            self.say(
                f"{config.method} on {trainer.source.name}: {len(trainer.source)} images, {len(trainer.validation)} "
                f"held out, {len(self.targets)} targets, {trainer.device}: {self.run.path}"
            )

    def _tell(self, report: Any) -> None:
        if report.warning:
            self.say(f"warning: {report.warning}", always=True)
        if not report.kept:
            what = "is learned anew" if report.verdict == "retrain" else "is dropped"
            self.say(f"round {report.round}: the domain {what} ({'; '.join(report.reasons)})", always=True)

    def _measure(self, number: int) -> None:
        if self.run is None:
            return
        trainer, every = self.trainer, self.trainer.config.data.target_every
        due = trainer.done or (every > 0 and number % every == 0)
        self.history.append(measure_round(trainer, number, self.targets if due else (), self.disguised))
        last = self.history[-1]["last"]
        average = f", targets {100 * last['average']:.1f} %" if "average" in last else ""
        self.say(f"round {number}: validation {100 * last['validation']:.1f} %{average}")
        trainer.skip_time()

    def _measure_best(self) -> None:
        """Target figures of the weights that the source chose, where their round was not measured on targets."""
        trainer = self.trainer
        chosen = next((each for each in self.history if each["round"] == trainer.best.round), None)
        if self.run is None or not self.targets or chosen is None or "targets" in chosen["last"]:
            return
        model = copy.deepcopy(trainer.task)
        model.load_state_dict(trainer.best.tensors)
        chosen["last"] = figures(model, trainer.validation, self.targets, self.disguised)

    def _log(self) -> None:
        assert self.run is not None
        trainer = self.trainer
        trainer.tick()
        metrics = trainer.take_metrics()
        self.run.metrics.log(trainer.clock.total, round=trainer.clock.round, seconds=trainer.clock.seconds, **metrics)

    def _save(self) -> None:
        if self.run is not None:
            state = {**capture(self.trainer), "history": self.history}
            self.run.checkpoints.save(self.trainer.clock.total, self.trainer.task.state_dict(), state)
            self.trainer.skip_time()

    def finish(self, record: dict[str, Any]) -> Outcome:
        """Write the model, the figures and the pictures."""
        assert self.run is not None
        trainer, config, clock = self.trainer, self.trainer.config, self.trainer.clock
        reports = [each.plain() for each in trainer.reports]
        result = {
            **record,
            "name": config.name,
            "method": config.method,
            "source": config.data.source,
            "metric": "mIoU" if trainer.source.dense else "accuracy",
            "domains": len(trainer.pool),
            "stopped": trainer.stopped,
            "selections": selections(self.history, trainer.best.round),
            "history": self.history,
            "reports": reports,
            "notes": [each.note for each in self.targets if each.note]
            + [n for t in self.targets if (n := absent_note(t))]
            + self.shared,
            "steps": clock.total,
            "seconds": clock.seconds,
            "steps_per_second": clock.total / max(clock.seconds, 1e-9),
            "gate_share": clock.gate_seconds / max(clock.seconds, 1e-9),
            "peak_memory_bytes": peak_memory(trainer.device),
            "reserved_memory_bytes": reserved_memory(trainer.device),
            "processes": trainer.world.size,
            "config": to_toml(config),
        }
        write_trained(trainer, self.run.path, source=config.data.source, validation=config.data.validation)
        write_json(self.run.path / "result.json", result)
        self._draw()
        return Outcome(self.run.path, result)

    def _draw(self) -> None:
        from pden.evaluation.chart import save_curve
        from pden.gallery import save_gallery

        assert self.run is not None
        trainer = self.trainer
        save_curve(self.history, self.run.path / "curve.png", title=f"{trainer.config.name}: {trainer.source.name}")
        if trainer.pool:
            kept = [each.plain() for each in trainer.reports if each.kept]
            save_gallery(trainer.validation, trainer.pool, kept, self.run.path / "gallery.png")
