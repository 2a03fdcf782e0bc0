"""The gate over a whole run: its judge, the domains measured so far, and all reports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expkit.device import autocast
from expkit.distributed import World, gather
from pden.baselines import RandConv
from pden.data import Domain
from pden.generators import Generator
from pden.losses import safety_loss
from pden.models import TaskModel
from pden.training.config import GateConfig, OptimizerConfig
from pden.training.gate import DomainReport, Measures, judge_domain, measure
from pden.training.learner import Learner
from pden.training.stream import Stream


class Gatekeeper:
    """Trains the judge and decides on domains.

    Args:
        gate: its settings; the mode is not "off".
        judge: a new model like the task model, of another seed.
        validation: held-out source images; `gate.images` of them are measured.
        seed: of the run.

    Attributes:
        reports: one for each attempt at a domain.
    """

    def __init__(self, gate: GateConfig, judge: TaskModel, validation: Domain, world: World, *, seed: int) -> None:
        self.gate, self.seed = gate, seed
        self.judge = judge
        self.learner = Learner(judge, OptimizerConfig(lr=gate.judge_lr), world)
        measured = validation.spread(gate.images)
        self.images, self.labels = measured.batch(torch.arange(len(measured), device=measured.images.device))
        self.reports: list[DomainReport] = []
        self._disguise = RandConv()
        self._accepted: list[Measures] = []
        self._source: Measures | None = None  # of the judge, which no longer changes once it decides

    def train_step(self, images: Tensor, labels: Tensor, stream: Stream, dtype: torch.dtype) -> Tensor:
        """One step of the judge, on source images, half of them as they are and half in random disguise; its loss.

        A model of the plain source alone calls any inverted or recoloured digit wrong, however legible it is.
        """
        plain, rest = images.tensor_split(2)
        disguised = self._disguise.convolved(invert_some(rest, stream.torch), stream)
        self.judge.train()
        with autocast(images.device, dtype):
            loss = safety_loss(self.judge(torch.cat([plain, disguised])), labels)
        self.learner.update(loss)
        return loss

    def decide(self, task: TaskModel, generator: Generator, *, round: int, attempt: int, kind: str) -> DomainReport:
        """Measure a domain, report on it, and remember it unless it is refused."""
        found = self._measure(task, generator, round, attempt)
        if self._source is None:
            self._source = self._measure(task, None, 0, 0)
        made = judge_domain(
            found,
            self._source,
            self._accepted,
            self.gate,
            round=round,
            attempt=attempt,
            kind=kind,
        )
        report = DomainReport.from_plain(gather(made.plain())[0])  # all processes follow the first one's verdict
        self.reports.append(report)
        if report.kept:
            self._accepted.append(found)
        return report

    def _measure(self, task: TaskModel, generator: Generator | None, round: int, attempt: int) -> Measures:
        task.eval()
        self.judge.eval()
        stream = Stream(self.images.device, self.seed, "gate", round, attempt)
        return measure(task, self.judge, generator, self.images, self.labels, stream)

    def state(self) -> dict[str, Any]:
        """Judge and reports; tensors are the live ones."""
        return {"judge": self.learner.state(), "reports": [each.plain() for each in self.reports]}

    def load(self, state: dict[str, Any], task: TaskModel, generators: list[Generator]) -> None:
        """Go on from `state`. What the judge saw of the accepted domains is computed anew.

        Args:
            generators: of the domains that were kept, in order; the running one among them once it has passed.
        """
        self.learner.load(state["judge"])
        self.reports = [DomainReport.from_plain(each) for each in state["reports"]]
        kept = [each for each in self.reports if each.kept]
        self._accepted = [
            self._measure(task, generator, report.round, report.attempt)
            for report, generator in zip(kept, generators, strict=True)
        ]


def invert_some(images: Tensor, rng: torch.Generator) -> Tensor:
    """Half of the images in [0, 1], drawn at random, as negatives."""
    draw = torch.rand(len(images), 1, 1, 1, generator=rng, device=images.device)
    return torch.where(draw < 0.5, 1 - images, images)
