"""The job behind `train-adv train`: a run directory around a `Trainer`, from the standard model to the final report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from expkit.checkpoint import CheckpointStore, load_tensors, write_json
from expkit.cli import console, progress
from expkit.device import peak_memory, synchronize
from expkit.distributed import World, barrier
from expkit.errors import UsageError
from expkit.rundir import RunDir, evidence
from expkit.seed import seed_everything
from train_adv.attacks.norms import make_norm
from train_adv.attacks.pgd import PGD
from train_adv.data.batches import Batches
from train_adv.data.dataset import DataSet, Resident, Split, hold_out
from train_adv.hosts.make import make_host
from train_adv.models.checkpoint import load_model, load_weights, save_model
from train_adv.models.classifier import Classifier, ModelSpec
from train_adv.precision import training_precision
from train_adv.topology import metrics
from train_adv.topology.loss import TopologyLoss
from train_adv.topology.regularizer import TopologyRegularizer
from train_adv.training.climber import resolve_engine
from train_adv.training.config import TopologyConfig, TrainConfig
from train_adv.training.detect import catastrophic_overfitting, robust_overfitting
from train_adv.training.given import Given, describe, fresh, read_data, require_logits
from train_adv.training.measure import features_of, right_answers, right_under_pgd
from train_adv.training.reduce import average_statistics, broadcast, of_main, total
from train_adv.training.trainer import Trainer

REFERENCE = "reference"  # folder of the standard model's own run, inside the run's


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        folder: the run's directory, with `best.safetensors`, `last.safetensors` and `result.json`.
        result: the figures that `result.json` holds.
        model: the best model, in eval mode.
    """

    folder: Path
    result: dict[str, Any]
    model: Classifier


def train(
    config: TrainConfig, runs: Path, world: World, *, resume: bool = False, given: Given | None = None
) -> Outcome:
    """Train, validate, keep the best and the last, report both on the test split; every process gets the outcome.

    Processes of one run see one folder of runs: the main one writes there, all of them read references there.

    Raises:
        UsageError: see `RunDir.create`; data, model or reference that cannot be used; a loss that is no number.
    """
    given = given if given is not None else Given()
    config = config.resolved()
    record = evidence(config.seed)
    device, dtype = training_precision(config.device, config.dtype, deterministic=config.deterministic)
    data = given.data if given.data is not None else read_data(config.data)
    spec = describe(config, data, given)
    if given.model is not None:
        require_logits(fresh(spec, given))
    folder = runs / config.name
    run = RunDir.create(runs, config.name, config, resume) if world.is_main else None
    barrier()
    try:
        reference = _reference(config, folder, spec, world, resume=resume, given=Given(data, given.model))
        job = _Job(config, data, spec, given, reference, device, dtype, world, run, folder)
        if resume:
            checkpoint = CheckpointStore(folder / "checkpoints").latest()
            if checkpoint is not None:
                job.trainer.restore(checkpoint.tensors, checkpoint.state)
        job.fit()
    except Exception:
        if run is not None and not resume and not (folder / REFERENCE).exists():
            run.discard_unbegun()
        raise
    finally:
        if run is not None:
            run.metrics.close()
    return job.finish(record)


def _reference(
    config: TrainConfig, folder: Path, spec: ModelSpec, world: World, *, resume: bool, given: Given
) -> Classifier | None:
    """The standard model: read, or trained first inside the run's folder, by a run of its own that resumes like any."""
    settings = config.topology
    if not settings.needs_reference or settings.reference == "ema":
        return None
    path = settings.path
    if path is None:
        path = folder / REFERENCE
        if not (path / "result.json").is_file():
            standard = replace(
                config,
                name=REFERENCE,
                host="standard",
                epochs=settings.reference_epochs or config.epochs,
                topology=TopologyConfig(),
                awp=replace(config.awp, gamma=0.0),
                averaging=replace(config.averaging, kind="none"),
                validation=replace(config.validation, test=False),
            )
            started = resume and (path / "config.toml").is_file()
            train(standard, folder, world, resume=started, given=given)
            barrier()
    reference = load_model(path, model=given.model() if given.model is not None else None)
    if reference.spec.class_names != spec.class_names or reference.spec.image_shape[0] != spec.image_shape[0]:
        raise UsageError(
            f"the reference {path} knows {len(reference.spec.class_names)} classes of "
            f"{reference.spec.image_shape[0]}-channel images, and the data have {len(spec.class_names)} of "
            f"{spec.image_shape[0]}: their topologies cannot be compared"
        )
    return reference


class _Job:
    """A trainer, its validation data and its files."""

    def __init__(
        self,
        config: TrainConfig,
        data: DataSet,
        spec: ModelSpec,
        given: Given,
        reference: Classifier | None,
        device: torch.device,
        dtype: torch.dtype,
        world: World,
        run: RunDir | None,
        folder: Path,
    ) -> None:
        self.config, self.data, self.device, self.dtype = config, data, device, dtype
        self.world, self.run, self.folder, self.spec, self.given = world, run, folder, spec, given
        self.reference: Classifier | None = None
        training, held = hold_out(data.train, config.validation.fraction, config.seed)
        self.held = held.to(device) if isinstance(held, Resident) else held
        self.batches = Batches(
            training,
            batch_size=config.batch_size,
            seed=config.seed,
            augment=data.augment,
            device=device,
            world=world,
            workers=min(config.data.workers, os.cpu_count() or 1),
        )
        seed_everything(config.seed)
        model = fresh(spec, given)
        settings = config.attack
        assert settings.epsilon is not None and settings.step_size is not None  # resolved
        attack = PGD(settings.epsilon, settings.step_size, settings.steps, make_norm(settings.norm))
        teacher = replace(spec, name=config.teacher) if config.teacher is not None else spec
        host = make_host(config.host, attack, config.beta, lambda: fresh(teacher, given))
        model, host = model.to(device), host.to(device)
        if reference is not None:
            self.reference = reference.to(device).to(memory_format=torch.channels_last).eval()
        # A function that makes the network may draw other weights in every process, and files may differ.
        broadcast([model, host, *([self.reference] if self.reference is not None else [])], world)
        topology = self._topology(model)
        engine = resolve_engine(config.engine, device)
        self.trainer = Trainer(
            config, model, host, topology, self.batches, device=device, dtype=dtype, engine=engine, world=world
        )

    def _topology(self, model: Classifier) -> TopologyRegularizer | None:
        settings = self.config.topology
        if not settings.active:
            return None
        loss = TopologyLoss(
            kernel=settings.kernel,
            temperature=settings.temperature,
            perplexity=settings.perplexity,
            diagonal=settings.diagonal,
            direction=settings.direction,
            neighbours=settings.neighbours,
            reduction=settings.reduction,
            gather=self.world.size > 1,
        )
        return TopologyRegularizer(
            model,
            self.reference,
            weight=settings.weight,
            loss=loss,
            kind=settings.reference,
            decay=settings.decay,
            warmup=round(settings.warmup * self.batches.steps),
            statistics=settings.statistics,
        ).to(self.device)

    def fit(self) -> None:
        """All epochs that are left."""
        config, trainer = self.config, self.trainer
        if self.run is not None:
            topology = f" + TRAIN ({config.topology.kernel})" if config.topology.active else ""
            console().print(f"{config.host}{topology}, {self.spec.name}, {self.data.name}: {self.folder}")
        with progress() as bar:
            steps = self.batches.steps
            task = None
            if self.run is not None:
                total = config.epochs * steps
                task = bar.add_task(config.name, total=total, completed=trainer.progress.epoch * steps)
            while trainer.progress.epoch < config.epochs and not trainer.progress.stopped:
                begun = time.perf_counter()
                for number in trainer.epoch():
                    if task is not None:
                        bar.update(task, completed=trainer.progress.epoch * steps + number)
                    every = config.checkpoint_every
                    if every and number % every == 0 and number < steps:
                        synchronize(self.device)
                        trainer.progress.seconds += time.perf_counter() - begun
                        trainer.require_finite()  # no checkpoint of a model that is no number
                        self._save()
                        begun = time.perf_counter()
                synchronize(self.device)
                trainer.progress.seconds += time.perf_counter() - begun
                self._end_epoch()
                if task is not None and trainer.progress.history:
                    last = trainer.progress.history[-1]
                    shown = f"{config.name}: natural {last['val_natural']:.1%}, PGD {last['val_pgd']:.1%}"
                    bar.update(task, description=shown)

    def _end_epoch(self) -> None:
        trainer, config = self.trainer, self.config
        done = trainer.progress.epoch
        figures = trainer.take_sums()
        trainer.require_numbers(self.held.read(torch.arange(min(2, len(self.held)))))
        if done % config.validation.every == 0 or done == config.epochs:
            self._validate(figures)
        if self.run is not None:
            rate = trainer.optimizer.param_groups[0]["lr"]
            step = done * self.batches.steps
            self.run.metrics.log(step, epoch=done, lr=rate, seconds=trainer.progress.seconds, **figures)
        self._save()

    def _validate(self, figures: dict[str, float]) -> None:
        """Every process measures its share of the images; figures, and so decisions, are the same on all of them."""
        trainer, config = self.trainer, self.config
        average = trainer.average
        if average is not None and average.updates and config.averaging.statistics == "recompute":
            average.refresh(trainer.adversarial_batches(config.averaging.batches))
            if self.world.size > 1:  # each had other batches
                average_statistics([average.model])
        model = trainer.deliverable
        figures["val_natural"], figures["val_pgd"] = self._accuracies(model, self.held, config.validation.steps)
        if config.topology.metrics and self.reference is not None:
            figures.update(self._topology_metrics(model))
        figures = of_main(figures, self.world)
        now = trainer.progress
        now.history.append({"epoch": float(now.epoch), **figures})
        score = figures["val_natural"] if config.host == "standard" else figures["val_pgd"]
        if score > now.best_score:
            now.best_score, now.best_epoch = score, now.epoch
            self._keep("best", figures)
        for detect in (catastrophic_overfitting, robust_overfitting):
            warning = detect(now.history, config.guard) if config.host != "standard" else None
            if warning is not None:
                if self.run is not None:
                    console().print(f"warning: {warning}")
                if config.guard.stop:
                    now.stopped = warning

    def _accuracies(
        self, model: Classifier, split: Split, steps: int, advance: Callable[[int], object] | None = None
    ) -> tuple[float, float]:
        """Natural and PGD accuracy. PGD's step is a quarter of epsilon, whatever the training attack's is."""
        settings, world, seed = self.config.attack, self.world, self.config.seed
        assert settings.epsilon is not None  # resolved
        attack = PGD(settings.epsilon, settings.epsilon / 4, steps, make_norm(settings.norm))
        own = split.select(torch.arange(world.rank, len(split), world.size)) if world.size > 1 else split
        counts = torch.zeros(2, dtype=torch.float64, device=self.device)
        if len(own):
            size = self.config.validation.batch_size
            natural = right_answers(model, own, size=size, device=self.device, advance=advance)
            robust = right_under_pgd(
                model, own, attack, size=size, device=self.device, seed=seed + world.rank, advance=advance
            )
            counts += torch.stack([natural.sum(), robust.sum()]).to(counts)
        right, standing = (total(counts, world) / len(split)).tolist()
        return right, standing

    def _topology_metrics(self, model: Classifier) -> dict[str, float]:
        assert self.reference is not None
        size = self.config.validation.batch_size
        own, other = (features_of(each, self.held, size=size, device=self.device) for each in (model, self.reference))
        return {f"topology_{name}": value for name, value in metrics.measure(own, other).items()}

    def _keep(self, name: str, figures: dict[str, float]) -> None:
        if self.run is None:
            return
        about = {"epoch": self.trainer.progress.epoch, **figures}
        save_model(self.folder / f"{name}.safetensors", self.trainer.deliverable, about)

    def _save(self) -> None:
        state = self.trainer.state()
        if self.run is None:
            return
        progress = self.trainer.progress
        step = progress.epoch * self.batches.steps + progress.number
        self.run.checkpoints.save(step, self.trainer.tensors(), state)

    def finish(self, record: dict[str, Any]) -> Outcome:
        """Write `last.safetensors` and `result.json`, with both models measured on the test split."""
        config, now = self.config, self.trainer.progress
        self._keep("last", now.history[-1])
        chosen = {"best": now.best_epoch, "last": now.epoch}
        report: dict[str, Any] = {}
        model = self.trainer.deliverable
        measured = self._measured(model, chosen) if config.validation.test else {}
        for name, epoch in chosen.items():
            entry = next(each for each in now.history if each["epoch"] == epoch)
            report[name] = dict(entry)
            if measured:
                report[name]["natural"], report[name]["pgd20"] = measured[epoch]
        images = self.batches.steps * config.batch_size * now.epoch
        result = {
            **record,
            "name": config.name,
            "host": config.host,
            "model": self.spec.name,
            "data": self.data.name,
            "topology_weight": self.trainer.topology.weight if self.trainer.topology is not None else 0.0,
            "epochs": now.epoch,
            "stopped": now.stopped or None,
            **report,
            "train_seconds": now.seconds,
            "seconds_per_epoch": now.seconds / max(now.epoch, 1),
            "images_per_second": images / max(now.seconds, 1e-9),
            "peak_memory_bytes": peak_memory(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        result = of_main(result, self.world)
        if self.run is not None:
            write_json(self.folder / "result.json", result)
        self._load(model, "best")
        barrier()  # none goes on to read what the main one still writes
        return Outcome(self.folder, result, model.eval().requires_grad_(True))  # an average asked for no gradient

    def _measured(self, model: Classifier, chosen: dict[str, int]) -> dict[int, tuple[float, float]]:
        """Natural and PGD-20 accuracy on the test split, by epoch: the best one is often the last."""
        split, found = self.data.test, {}
        with progress() as bar:
            task = None
            if self.run is not None:
                total = 2 * len(split) * len(set(chosen.values()))
                task = bar.add_task(f"{self.config.name}: test images, plain and under PGD-20", total=total)

            def advance(count: int) -> None:
                if task is not None:
                    bar.advance(task, count * self.world.size)  # as the others go on alike

            for name, epoch in chosen.items():
                if epoch not in found:
                    self._load(model, name)
                    found[epoch] = self._accuracies(model, split, 20, advance)
        return found

    def _load(self, model: Classifier, name: str) -> None:
        if self.run is not None:
            load_weights(model, load_tensors(self.folder / f"{name}.safetensors"), name)
        broadcast([model], self.world)
