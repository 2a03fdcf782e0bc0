"""Progressive domain expansion: pre-train, then K rounds of expanding and fine-tuning. Files are the caller's.

A step in a round, while its generator learns: the generator goes one step down its loss, with the task model fixed and
in eval mode; then the views are made anew by the updated generator, without a graph, and the task model goes one step
down its own. After that part of the round the gate judges the domain. If it is accepted, the generator stays as it is
and the task model alone goes on; if not, the task model is set back to the round's start, and the domain is learned
anew or dropped. Earlier domains are drawn uniformly, one for each step.

Every step draws its random numbers from a stream that its place in the run names, so a resumed run repeats an
uninterrupted one to the bit (on CUDA as far as its kernels do). Processes under torchrun each draw a part of the batch.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from expkit.device import synchronize, tf32
from expkit.distributed import World, gather
from expkit.errors import UsageError
from pden.baselines import build_baseline
from pden.data import Domain
from pden.evaluation.accuracy import evaluate
from pden.generators import Generator, default_width, draw_noise
from pden.models import TaskModel, build_model
from pden.training.averaging import new_average
from pden.training.clock import Best, Clock
from pden.training.config import OptimizerConfig, TrainConfig
from pden.training.gate import DomainReport, collapse_warning, two_draws
from pden.training.gatekeeper import Gatekeeper
from pden.training.learner import Learner
from pden.training.objectives import Expansion
from pden.training.require import require_fit
from pden.training.steps import Steps, uses_graphs
from pden.training.stream import Stream
from pden.training.views import augment_batch, draw_textures, draw_views

Event = Literal["none", "pretrained", "judged", "refused", "round"]
ALONE = World(rank=0, size=1, local_rank=0)
CPU = torch.device("cpu")


class Trainer:
    """A run in memory.

    Args:
        config: its settings.
        source: training images, fitted to the config's size and channels.
        validation: held-out images of the same kind; the gate and the selection see nothing else.
        world: the processes that train together.

    Attributes:
        task: the task model.
        average: its running average, or None.
        pool: generators of the accepted domains, frozen.
        best: selected on the validation images, by round.
        clock: where the run stands.

    Making one, and each of its steps, seeds torch's own generators: weights and dropout draw from them.

    Raises:
        UsageError: source and validation do not fit each other or the model.
    """

    def __init__(
        self,
        config: TrainConfig,
        source: Domain,
        validation: Domain,
        *,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        world: World = ALONE,
    ) -> None:
        require_fit(config, source, validation, world)
        self.config, self.device, self.dtype, self.world = config, device, dtype, world
        self.source, self.validation = source.to(device), validation.to(device)
        self.size = min(source.images.shape[-2:])
        self.baseline = build_baseline("erm" if config.method == "pden" else config.method)
        self.task = self._new_model("task")
        self.learner = Learner(self.task, config.optimizer, world)
        graphs = uses_graphs(config.engine, device)
        self.steps = Steps(config, self.task, self.learner, self.baseline, device, dtype, graphs)
        self.average = new_average(self.task, config.averaging)
        self.gatekeeper: Gatekeeper | None = None
        if self.expands and config.gate.mode != "off" and config.rounds > 0:
            judge = self._new_model("judge")
            self.gatekeeper = Gatekeeper(config.gate, judge, self.validation, world, seed=config.seed)
        self.expansion: Expansion | None = None
        self.expander: Learner | None = None
        self.pool: list[Generator] = []
        self.best, self.clock = Best(), Clock()
        self.grown: tuple[Tensor, Tensor] | None = None
        self.snapshot: dict[str, Any] | None = None
        self._sums: dict[tuple[str, ...], tuple[Tensor, int]] = {}
        self._warnings: list[str] = []
        self._mark = time.perf_counter()

    @property
    def expands(self) -> bool:
        """Whether domains are generated at all."""
        return self.config.method == "pden"

    @property
    def reports(self) -> list[DomainReport]:
        """The gate's reports so far."""
        return [] if self.gatekeeper is None else self.gatekeeper.reports

    @property
    def averaged(self) -> TaskModel | None:
        """The model of averaged weights, after the first round that is averaged; before, it is nothing's average."""
        ended = min(self.clock.round - (not self.done), self.config.rounds)
        if self.average is None or ended < self.config.averaging.from_round:
            return None
        model: TaskModel = self.average.module  # type: ignore[assignment]
        return model

    @property
    def done(self) -> bool:
        """Whether the run has ended."""
        return self.clock.stage == "done"

    @property
    def stopped(self) -> bool:
        """Whether it ended before its last round, as the last ones had brought nothing new."""
        return self.done and self.clock.round < self.config.rounds

    @property
    def planned_steps(self) -> int:
        """Steps of the whole run, as far as is known now: refused domains and early stops change it."""
        config = self.config
        if self.done:
            return self.clock.total
        refused = sum(not each.kept for each in self.reports)
        dropped = sum(each.verdict == "dropped" for each in self.reports)
        whole = config.pretrain_steps + config.rounds * config.round_steps
        judge = 0 if self.gatekeeper is None else config.gate.judge_steps
        return whole + judge + refused * config.learning_steps - dropped * config.round_steps

    @tf32(True)  # what is measured in between turns it off for itself
    def step(self) -> Event:
        """One step; what it brought to an end."""
        config, clock = self.config, self.clock
        place = (config.seed, clock.stage, clock.round, clock.attempt, clock.step, self.world.rank)
        stream = Stream(self.device, *place)
        stream.seed_layers()
        if clock.stage == "pretrain":
            self._plain_step(config.pretrain_batch, stream, clock.step / config.pretrain_steps)
        elif clock.stage == "judge":
            assert self.gatekeeper is not None
            images, labels = self._batch(config.batch, stream)
            self._note({"judge": self.gatekeeper.train_step(images, labels, stream, self.dtype)})
        elif self.expands:
            self._expanding_step(stream)
        else:
            self._plain_step(config.batch, stream, self._progress())
        clock.step += 1
        clock.total += 1
        return self._advance()

    def _progress(self) -> float:
        clock, config = self.clock, self.config
        return (clock.round - 1 + clock.step / config.round_steps) / max(1, config.rounds)

    def _plain_step(self, size: int, stream: Stream, progress: float) -> None:
        if self.clock.total in self.baseline.growth:
            self._grow()
        images, labels = self._batch(size, stream)
        with torch.no_grad():
            views = self.baseline.views(images, stream)
        self._update_task(*self.steps.plain(views, labels), progress)

    def _expanding_step(self, stream: Stream) -> None:
        config = self.config
        assert self.expansion is not None and self.expander is not None
        generator = self.expansion.generator
        images, labels = self._batch(config.batch, stream)
        if self.clock.step < config.learning_steps:
            noises = [draw_noise(images, generator.noise, stream.torch) for _ in range(2)]
            gradients, parts = self.steps.expand(self.expansion, self.expander, images, labels, noises)
            self.expander.apply(gradients)
            self._note(parts)
        earlier = stream.host.choice(self.pool) if self.pool else None
        draws = draw_views(images, generator, earlier, stream.torch, mix=config.loss.mix)
        textures = draw_textures(images, len(draws) + 1, config.data, stream)
        self._update_task(*self.steps.tune(generator, earlier, images, labels, draws, textures), self._progress())

    def _update_task(self, gradients: Sequence[Tensor | None], parts: dict[str, Tensor], progress: float) -> None:
        self.learner.apply(gradients, progress)
        self._note(parts)
        if self.average is not None and self.clock.stage == "round":
            if self.clock.round >= self.config.averaging.from_round:
                self.average.update_parameters(self.task)

    def _batch(self, size: int, stream: Stream) -> tuple[Tensor, Tensor]:
        """This process's part of a batch, drawn from the source and what a baseline added to it."""
        added = 0 if self.grown is None else len(self.grown[0])
        share = size // self.world.size
        index = torch.randint(len(self.source) + added, (share,), generator=stream.torch, device=self.device)
        images, labels = self.source.batch(index.clamp(max=len(self.source) - 1))
        if self.grown is not None:
            other, place = index >= len(self.source), (index - len(self.source)).clamp(min=0)
            images = torch.where(other[:, None, None, None], self.grown[0][place].float(), images)
            labels = torch.where(other, self.grown[1][place], labels)
        return augment_batch(images, labels, self.config.data, stream, in_round=self.clock.stage == "round")

    def _grow(self) -> None:
        """The baseline's own images of the whole pool join it, in half precision: its steps are finer than levels."""
        images, labels = self.source.images.half() / 255, self.source.labels
        if self.grown is not None:
            images, labels = torch.cat([images, self.grown[0]]), torch.cat([labels, self.grown[1]])
        added, count = self.baseline.grow(self.task, images, labels), len(self.source)
        self.grown = (torch.cat([images[count:], added]), torch.cat([labels[count:], labels]))

    def _advance(self) -> Event:
        """Move the clock on where a stage, a domain or a round has ended."""
        config, clock = self.config, self.clock
        if clock.stage == "pretrain" and clock.step == config.pretrain_steps:
            self._select(0)
            self.tick()  # here, as the time of the stage that follows is the gate's
            self.average = new_average(self.task, config.averaging)  # of what follows; until here it had no meaning
            if config.rounds == 0:
                clock.stage = "done"
            elif self.gatekeeper is not None:
                clock.stage, clock.step = "judge", 0
            else:
                self._begin_round(1)
            return "pretrained"
        if clock.stage == "judge" and clock.step == config.gate.judge_steps:
            self.tick()
            self._begin_round(1)
            return "judged"
        if clock.stage == "round" and self.expands and clock.step == config.learning_steps and not self._pass_gate():
            return "refused"
        if clock.stage == "round" and clock.step == config.round_steps:
            self._end_round()
            self.tick()
            return "round"
        return "none"

    def _begin_round(self, number: int, attempt: int = 0) -> None:
        clock = self.clock
        clock.stage, clock.round, clock.attempt, clock.step = "round", number, attempt, 0
        if self.expands:
            if attempt == 0 and self.config.gate.mode == "on":
                self.snapshot = copy.deepcopy(self.task_state())
            self.new_expansion()

    def _pass_gate(self) -> bool:
        """Judge the running domain; False where it was refused, and the clock set to what comes next."""
        assert self.expansion is not None
        if self.gatekeeper is None:
            self._warn_of_collapse()
            return True
        self.tick()
        clock = self.clock
        report = self.gatekeeper.decide(
            self.task, self.expansion.generator, round=clock.round, attempt=clock.attempt, kind=self.kind
        )
        if report.kept:
            self.snapshot = None
        else:
            assert self.snapshot is not None
            self.load_task_state(self.snapshot)
            if report.verdict == "retrain":
                self._begin_round(clock.round, clock.attempt + 1)
            else:
                self._next_round(productive=False)
        self.tick(gate=True)
        return report.kept

    def _warn_of_collapse(self) -> None:
        """What the gate warns of, where there is none."""
        assert self.expansion is not None
        generator, clock = self.expansion.generator, self.clock
        held = self.validation.spread(self.config.gate.images)
        images, _ = held.batch(torch.arange(len(held), device=self.device))
        stream = Stream(self.device, self.config.seed, "gate", clock.round, clock.attempt)
        warning = collapse_warning(two_draws(generator, images, stream), self.config.gate, clock.round)
        self._warnings += [warning] if warning else []

    def take_warnings(self) -> list[str]:
        """What has been warned of since the last call, besides what is in reports."""
        found, self._warnings = self._warnings, []
        return found

    def _end_round(self) -> None:
        if self.expansion is not None:
            self.pool.append(self.expansion.generator.eval().requires_grad_(False))
        self._select(self.clock.round)
        novelty = self.reports[-1].novelty if self.reports else None
        self._next_round(productive=novelty is None or novelty >= self.config.stop.novelty)

    def _next_round(self, productive: bool) -> None:
        clock, config = self.clock, self.config
        clock.unproductive = 0 if productive else clock.unproductive + 1
        self.expansion = self.expander = self.snapshot = None
        if clock.round == config.rounds or 0 < config.stop.patience <= clock.unproductive:
            clock.stage = "done"
        else:
            self._begin_round(clock.round + 1)

    def _select(self, round: int) -> None:
        """Keep these weights unless an earlier round's labelled the validation images better."""
        value = gather(evaluate(self.task, self.validation).value)[0]
        if value >= self.best.value:
            self.best = Best(value, round, copy.deepcopy(dict(self.task.state_dict())))

    @property
    def kind(self) -> str:
        """Of the running round's generator."""
        kinds = self.config.generator.kinds
        return kinds[(self.clock.round - 1) % len(kinds)]

    def new_expansion(self) -> None:
        """A new generator for the running round and attempt."""
        settings, clock = self.config.generator, self.clock
        torch.manual_seed(Stream(CPU, self.config.seed, "weights", clock.round, clock.attempt).seed)
        width = settings.width or default_width(self.size)
        channels, painting = self.source.images.shape[1], (settings.grid, settings.grid_share)
        expansion = Expansion(self.kind, channels, width, settings.noise, *painting)
        self.expansion = expansion.to(self.device)
        self.steps.forget()
        self.expander = Learner(self.expansion, OptimizerConfig(lr=settings.lr), self.world)

    def _new_model(self, purpose: str) -> TaskModel:
        settings, source = self.config.model, self.source
        torch.manual_seed(Stream(CPU, self.config.seed, "weights", purpose).seed)
        return build_model(
            settings.name,
            classes=len(source.classes),
            channels=source.images.shape[1],
            size=self.size,
            width=settings.width,
            embedding=settings.embedding,
        ).to(self.device)

    def task_state(self) -> dict[str, Any]:
        """Task model, its optimiser and its average; tensors are the live ones."""
        average = None if self.average is None else dict(self.average.state_dict())
        return {"learner": self.learner.state(), "average": average}

    def load_task_state(self, state: dict[str, Any]) -> None:
        """Set the task model, its optimiser and its average to `state`, which stays as it is."""
        state = copy.deepcopy(state)
        self.learner.load(state["learner"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def _note(self, values: dict[str, Tensor]) -> None:
        """Add a step's losses up, as one tensor for each set of names."""
        names, row = tuple(values), torch.stack([value.detach().float() for value in values.values()])
        total, count = self._sums.get(names, (None, 0))
        self._sums[names] = (row if total is None else total + row, count + 1)

    def take_metrics(self) -> dict[str, float]:
        """Means of this process's losses since the last call.

        Raises:
            UsageError: one is not finite.
        """
        found: dict[str, float] = {}
        for names, (total, count) in self._sums.items():
            found.update(zip(names, (total / count).tolist(), strict=True))
        self._sums = {}
        broken = [name for name, value in found.items() if not math.isfinite(value)]
        if broken:
            raise UsageError(f"{broken[0]} {self._no_number()}")
        return found

    def require_finite(self) -> None:
        """UsageError when a weight of the task model is no number: to be called before the weights are kept."""
        if not bool(torch.stack([each.isfinite().all() for each in self.learner.parameters]).all()):
            raise UsageError(f"a weight {self._no_number()}")

    def _no_number(self) -> str:
        rates = f"optimizer.lr ({self.config.optimizer.lr:g}) or generator.lr ({self.config.generator.lr:g})"
        anew = "train anew, under another name where checkpoints were kept"
        return f"is not finite at step {self.clock.total}; lower {rates} and {anew}"

    def tick(self, gate: bool = False) -> None:
        """Add the time since the last call to the clock, when the device has done its work."""
        synchronize(self.device)
        now = time.perf_counter()
        self.clock.seconds += now - self._mark
        if gate or self.clock.stage == "judge":
            self.clock.gate_seconds += now - self._mark
        self._mark = now

    def skip_time(self) -> None:
        """Leave the time since the last `tick` out: it went into reports, not into training."""
        self._mark = time.perf_counter()
