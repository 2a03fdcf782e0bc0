"""Second-stage training: the router or a low-rank head, with the drafter frozen.

The features of every harmonised step are taken, so that what is trained sees what the drafter makes of its own features
too. The target's distribution at a position is computed once and serves all steps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from coral_spec.drafter import Drafter
from coral_spec.grouping import EMPTY, Grouping
from coral_spec.grouping import FILE as GROUPING
from coral_spec.heads.low_rank import LowRankFactors
from coral_spec.router import Router
from coral_spec.targets import Target
from coral_spec.training.batches import Batch
from coral_spec.training.config import TrainConfig
from coral_spec.training.data import Answers
from coral_spec.training.generation import fused_kernels
from coral_spec.training.harmonised import harmonised_mask, shift
from coral_spec.training.loop import Loop
from expkit.device import autocast, to_device
from expkit.distributed import World


@dataclass(frozen=True)
class HeldOut:
    """Scores of an evaluation.

    Attributes:
        score: what a better run has more of.
        figures: by the names that `metrics.jsonl` has.
        curves: lists of figures that `result.json` has.
    """

    score: float
    figures: dict[str, float]
    curves: dict[str, list[float]]


class SecondStage(Loop):
    """What both have in common: drafted features of the answer positions, step by step."""

    def __init__(self, config: TrainConfig, target: Target, answers: Answers, world: World, drafter: Drafter) -> None:
        self.drafter = drafter.float().requires_grad_(False)
        super().__init__(config, target, answers, world)

    @torch.no_grad()
    def drafted(self, batch: Batch, number: int | None) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """For each step: its number, drafted features, the target's features and where both stand.

        Args:
            number: of a training batch, whose noise is added; None for an evaluation.

        Returns:
            step, ``(positions, hidden)`` in the target's dtype twice, and the flat indices ``(positions,)``.
        """
        features, embeddings = self.forward(batch.tokens)
        labels = features.flatten(0, 1)
        inputs = [features if number is None else self.noisy(features, number)]
        for step in range(1, self.config.align_steps + 1):
            mask = harmonised_mask(features.shape[1], step, features.dtype, features.device)
            with autocast(features.device, self.target.dtype):
                predicted = self.draft_step(self.drafter, embeddings, inputs, mask)
            inputs.append(shift(predicted, inputs[0]).to(features.dtype))
            where = to_device(batch.positions(step), features.device)
            yield step, predicted.flatten(0, 1)[where].to(features.dtype), labels[where + 1], where

    def evaluate(self) -> HeldOut:
        """Scores on the held-out answers, over features of every step."""
        with torch.no_grad(), fused_kernels():
            found = self.score()
        self.tick()
        return found

    @abstractmethod
    def score(self) -> HeldOut:
        """See :meth:`evaluate`."""


class RouterTrainer(SecondStage):
    """Cross-entropy between the router's groups and the target's probability of each group. CORAL; details ours.

    Logged per step: `router` (the loss), `recall` (the target's most likely token is in a group that is read) and
    `mass` (the target's probability of the groups that are read), each node choosing for itself.
    """

    said = "{:.3f} of the mass"

    def __init__(
        self,
        config: TrainConfig,
        target: Target,
        answers: Answers,
        world: World,
        drafter: Drafter,
        grouping: Grouping,
    ) -> None:
        self.grouping = grouping
        super().__init__(config, target, answers, world, drafter)
        self.slabs = grouping.slabs(self.head)
        self.empty = (grouping.slots == EMPTY).to(self.head.device)

    def make(self) -> nn.Module:
        """See `Loop`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            router = Router(self.backbone.hidden_size, self.grouping.groups)
        return router.to(self.target.device)

    def keep(self, folder: Path) -> None:
        """See `Loop`: groups could come out otherwise on another kind of machine."""
        if not (folder / GROUPING).is_file():
            self.grouping.save(folder)

    @torch.no_grad()
    def masses(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The target's probability of every group ``(positions, groups)``, and its likeliest token's group."""
        masses, groups = [], []
        for part in features.split(self.chunk):  # type: ignore[no-untyped-call]
            logits = functional.linear(part, self.slabs.flatten(0, 1)).view(len(part), *self.empty.shape)
            logits = logits.masked_fill_(self.empty, float("-inf")).flatten(1)
            masses.append(logits.softmax(-1, dtype=torch.float32).view(len(part), *self.empty.shape).sum(-1))
            groups.append(logits.argmax(-1) // self.grouping.rows)
        return torch.cat(masses), torch.cat(groups)

    def accumulate(self, number: int, batch: Batch, counts: list[int]) -> None:
        """See `Loop`."""
        mass, group = None, None
        for step, features, labels, where in self.drafted(batch, number):
            if mass is None or group is None:  # later steps have fewer of the same positions
                size = batch.tokens.numel()
                own, likeliest = self.masses(labels)
                mass = own.new_zeros(size, own.shape[1]).index_copy_(0, where, own)
                group = likeliest.new_zeros(size).index_copy_(0, where, likeliest)
            scale = self.world.size / counts[step - 1]
            log_probs = self.module(features.float())
            loss = -(mass[where] * log_probs).sum() * scale
            loss.backward()
            ranks, caught = self._caught(log_probs.detach(), mass[where], group[where])
            read = ranks < self.config.router.active
            self.note(step, router=loss.detach(), recall=read.sum() * scale, mass=caught.sum() * scale)

    def _caught(self, log_probs: Tensor, mass: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Rank of the likeliest token's group among those chosen from (-1: always read), and the mass that is read."""
        always, active = self.grouping.always, self.config.router.active
        order = log_probs[:, always:].argsort(dim=1, descending=True) + always
        ranks = (order == group[:, None]).int().argmax(1)
        ranks = torch.where(group < always, -1, ranks)
        caught = mass[:, :always].sum(1) + mass.gather(1, order[:, :active]).sum(1)
        return ranks, caught

    def score(self) -> HeldOut:
        """See `SecondStage`. The curves have an entry for every number of active groups from 1 on."""
        always, steps = self.grouping.always, self.config.align_steps
        most = self.grouping.groups - always
        recall, mass = (torch.zeros(steps, most, device=self.head.device) for _ in range(2))
        count = torch.zeros(steps, device=self.head.device)
        for batch in self.held_out:
            for step, features, labels, _ in self.drafted(batch, None):
                log_probs = self.module(features.float())
                own, group = self.masses(labels)
                ranks, _ = self._caught(log_probs, own, group)
                order = log_probs[:, always:].argsort(dim=1, descending=True) + always
                mass[step - 1] += (own[:, :always].sum(1, keepdim=True) + own.gather(1, order).cumsum(1)).sum(0)
                recall[step - 1] += (ranks[:, None] < torch.arange(1, most + 1, device=ranks.device)).sum(0)
                count[step - 1] += len(features)
        recall, mass = recall / count.clamp(min=1)[:, None], mass / count.clamp(min=1)[:, None]
        at = self.config.router.active - 1
        figures = {"held_out_mass": float(mass[:, at].mean()), "held_out_recall": float(recall[:, at].mean())}
        for step in range(1, steps + 1):
            figures[f"held_out_mass_{step}"] = float(mass[step - 1, at])
            figures[f"held_out_recall_{step}"] = float(recall[step - 1, at])
        curves = {"mass_by_active": mass.mean(0).tolist(), "recall_by_active": recall.mean(0).tolist()}
        return HeldOut(figures["held_out_mass"], figures, curves)


class LowRankTrainer(SecondStage):
    """Cross-entropy of the low-rank head's distribution over drafted features against the target's. Ours.

    Logged per step: `soft` (the loss) and `agreed` (its likeliest token is the target's).
    """

    said = "{:.3f} agree"

    def make(self) -> nn.Module:
        """See `Loop`; begins as the head's truncated singular value decomposition."""
        rank = self.config.low_rank.rank or max(1, self.backbone.hidden_size // 4)
        return LowRankFactors.of_head(self.head, rank)

    def _losses(self, features: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Sums of cross-entropy and of agreements, chunk by chunk."""
        chunk = self.chunk
        for part, wanted in zip(features.split(chunk), labels.split(chunk), strict=True):  # type: ignore[no-untyped-call]
            logits = functional.linear(wanted, self.head)
            with autocast(part.device, self.target.dtype):
                drafted = self.module(part.float())
            target = logits.softmax(-1, dtype=torch.float32)
            agreed = (logits.argmax(-1) == drafted.argmax(-1)).sum().float()
            yield -(target * drafted.log_softmax(-1, dtype=torch.float32)).sum(), agreed

    def accumulate(self, number: int, batch: Batch, counts: list[int]) -> None:
        """See `Loop`."""
        for step, features, labels, _ in self.drafted(batch, number):
            scale = self.world.size / counts[step - 1]
            soft, agreed = (torch.zeros((), device=features.device) for _ in range(2))
            for loss, same in self._losses(features, labels):
                (scale * loss).backward()  # type: ignore[no-untyped-call]
                soft, agreed = soft + scale * loss.detach(), agreed + scale * same
            self.note(step, soft=soft, agreed=agreed)

    def score(self) -> HeldOut:
        """See `SecondStage`."""
        agreed, count = [0.0] * self.config.align_steps, [0] * self.config.align_steps
        for batch in self.held_out:
            for step, features, labels, _ in self.drafted(batch, None):
                agreed[step - 1] += sum(float(same) for _, same in self._losses(features, labels))
                count[step - 1] += len(features)
        shares = [found / max(1, of) for found, of in zip(agreed, count, strict=True)]
        figures = {f"held_out_agreed_{step}": share for step, share in enumerate(shares, start=1)}
        mean = sum(shares) / len(shares)
        return HeldOut(mean, {"held_out_agreed": mean, **figures}, {})
