"""What the training of any part of a drafter has in common: batches, clock, optimiser, metrics, checkpoints.

The target runs along and is never stored. Gradients are averaged over all processes, clipped, applied. Batches and
noise depend on seed and batch number alone, so a resumed run repeats an uninterrupted one to the bit.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from coral_spec.backbone import Backbone
from coral_spec.masks import chain_ancestors
from coral_spec.targets import Target
from coral_spec.training.batches import Batch, BatchPlan, group_by_length, make_batch, split_rows
from coral_spec.training.config import TrainConfig
from coral_spec.training.data import Answers
from coral_spec.training.generation import fused_kernels
from coral_spec.training.harmonised import draft_step
from coral_spec.training.replay import Replayed
from coral_spec.training.schedule import learning_rate
from expkit.checkpoint import Checkpoint
from expkit.device import to_device
from expkit.distributed import World, all_reduce_mean
from expkit.errors import UsageError


@dataclass
class Clock:
    """Where a run stands.

    Attributes:
        step: optimiser steps taken.
        seconds: time spent training, evaluations included, over all its starts.
        tokens: tokens that went through the target, padding left out, on all processes.
        best: best score of an evaluation so far.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    best: float = float("-inf")


class Scores(Protocol):
    """What an evaluation found."""

    @property
    def score(self) -> float:
        """What a better run has more of."""
        ...

    @property
    def figures(self) -> dict[str, float]:
        """By the names that `metrics.jsonl` has."""
        ...


class Loop(ABC):
    """A run in memory; files are the caller's.

    Attributes:
        module: what is trained, in fp32.
        chunk: positions whose logits exist at once.
        clock: progress so far.
        now: progress from 0 to 1 of the step under way.
        said: what the score is, as a format of one number.
    """

    said = "{:.3f}"

    def __init__(self, config: TrainConfig, target: Target, answers: Answers, world: World) -> None:
        self.config, self.target, self.answers, self.world = config, target, answers, world
        self.backbone = Backbone(target)
        self.head: Tensor = self.backbone.output.weight.detach()
        self.chunk = config.loss.positions(len(self.head))
        self.decoder: Any = self.backbone.decoder
        self.draft_step = draft_step
        self._features: Callable[[Tensor], Tensor] = self._decode
        if config.compile == "all":
            _compile_layers(self.decoder)
            self.draft_step = torch.compile(draft_step, dynamic=True)
            if self.head.is_cuda:
                room, like = max(config.batch.tokens, config.batch.max_length), self.head.new_empty(0)
                self._features = Replayed(self._decode_masked, room, like, self.backbone.hidden_size)
        self._plan()
        self.module = self.make()
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self.clock, self.now = Clock(), 0.0
        self._mark = time.perf_counter()
        self._sums: dict[str, Tensor] = {}
        self._summed = 0

    def _plan(self) -> None:
        config, answers = self.config, self.answers
        length = min(config.batch.max_length, self.target.context_length)
        try:
            rows, held = split_rows(answers, config.evaluation.prompts, length)
        except ValueError as error:
            raise UsageError(f"{config.data[0]}: {error}; lower evaluation.prompts or make more answers") from None
        self.training_rows = rows
        self.plan = BatchPlan(answers, rows, tokens=config.batch.tokens, max_length=length, seed=config.seed)
        held = held[: config.evaluation.rows]
        groups = group_by_length(answers.lengths.clamp(max=length), held, config.batch.tokens)
        if len(held) == 0:
            raise UsageError(
                f"none of the {config.evaluation.prompts} held-out prompts has a usable answer; hold out more"
            )
        self.held_out = [make_batch(answers, group, length) for group in groups]

    @abstractmethod
    def make(self) -> nn.Module:
        """The module to train, as it starts, on the target's device in fp32."""

    @abstractmethod
    def accumulate(self, number: int, batch: Batch, counts: list[int]) -> None:
        """Add the gradients of one batch.

        Args:
            number: of the batch, from 0 through all epochs.
            counts: positions of every harmonised step in all batches of this optimiser step: `world.size` over them is
                the scale at which the mean of gradients over processes is the mean over positions.
        """

    @abstractmethod
    def evaluate(self) -> Scores:
        """Scores on the held-out answers."""

    def keep(self, folder: Path) -> None:  # noqa: B027
        """Write what a resumed run needs beside its checkpoints into the run's folder, where it is not there yet."""

    def progress(self) -> float:
        """Share of the run that is done: by steps, or by the clock where the configuration has a time limit."""
        done = self.clock.step / self.config.steps
        if self.config.max_minutes > 0:
            done = max(done, self.clock.seconds / (60 * self.config.max_minutes))
            if self.world.size > 1:  # processes must agree, and their clocks do not
                done = float(all_reduce_mean(torch.tensor(done, device=self.target.device)))
        return min(1.0, done)

    def step(self) -> None:
        """One optimiser step."""
        config = self.config
        self.now = self.progress()
        first = self.clock.step * config.batch.accumulate * self.world.size
        numbers = range(first, first + config.batch.accumulate * self.world.size)
        batches = {number: self.plan.batch(number) for number in numbers}
        counts = [
            max(1, sum(batch.count(step) for batch in batches.values())) for step in range(1, config.align_steps + 1)
        ]
        self.optimizer.zero_grad(set_to_none=True)
        with fused_kernels():
            for number in numbers[self.world.rank :: self.world.size]:
                self.accumulate(number, batches[number], counts)
        self._apply(learning_rate(config.optimizer, self.now))
        self.clock.step += 1
        self.clock.tokens += sum(int((batch.last + 2).sum()) for batch in batches.values())
        self._summed += 1
        self.tick()

    def tick(self) -> None:
        """Add the time since the last tick to the clock. Waits for nothing, so only long stretches are exact."""
        now = time.perf_counter()
        self.clock.seconds += now - self._mark
        self._mark = now

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The target's features and the next tokens' embeddings, ``(rows, length, hidden)``, of tokens on the CPU.

        The features are valid until the next call.
        """
        tokens = to_device(tokens, self.target.device)
        features = self._features(tokens)
        following = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], dim=1)
        return features, self.backbone.embed(following)

    def _decode(self, tokens: Tensor) -> Tensor:
        return self.decoder(input_ids=tokens, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    def _decode_masked(self, tokens: Tensor) -> Tensor:
        """The same with a mask that is given.

        transformers makes one itself while a graph is captured and none otherwise: compiled layers would have to be
        compiled anew in the middle of a capture, which fails.
        """
        length = tokens.shape[1]
        positions, start = torch.arange(length, device=tokens.device)[None], tokens.new_zeros(1)
        mask = self.backbone.mask(chain_ancestors(1, length, tokens.device), positions, start)
        output = self.decoder(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False)
        return output.last_hidden_state  # type: ignore[no-any-return]

    def noisy(self, features: Tensor, number: int) -> Tensor:
        """Features with the configured noise, which depends on the batch's number."""
        if self.config.noise == 0:
            return features
        generator = torch.Generator(features.device).manual_seed((self.config.seed << 32) + number)
        amount = self.config.noise * min(1.0, 512 / features.shape[1])
        noise = torch.empty_like(features, dtype=torch.float32).uniform_(-0.5, 0.5, generator=generator)
        return (features.float() + amount * noise).to(features.dtype)

    def _apply(self, rate: float) -> None:
        parameters = list(self.module.parameters())
        for parameter in parameters:
            if parameter.grad is None:  # a batch without any position, on one of several processes
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.world.size > 1:
            flat = all_reduce_mean(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):  # type: ignore[no-untyped-call]
                gradient.copy_(part.view_as(gradient))
        settings = self.config.optimizer
        if settings.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        if settings.clip_value > 0:
            torch.nn.utils.clip_grad_value_(parameters, settings.clip_value)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def note(self, step: int, **figures: Tensor) -> None:
        """Add figures of a harmonised step to the means that :meth:`take_metrics` gives, under `name_step`."""
        for name, value in figures.items():
            key = f"{name}_{step}"
            self._sums[key] = self._sums[key] + value if key in self._sums else value.clone()

    def take_metrics(self) -> dict[str, float]:
        """Means since the last call, over steps and processes: `feature_1`, `soft_1`, `top_1`, `agreed_1`, ...

        Raises:
            RuntimeError: a loss is not finite.
        """
        if not self._sums:
            return {}
        values = all_reduce_mean(torch.stack(list(self._sums.values())) / self._summed).tolist()
        found = dict(zip(self._sums, values, strict=True))
        self._sums, self._summed = {}, 0
        broken = [name for name, value in found.items() if not math.isfinite(value)]
        if broken:
            raise RuntimeError(f"{broken[0]} is not finite at step {self.clock.step}; lower optimizer.lr")
        return found

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the weights."""
        clock = self.clock
        return {
            "optimizer": self.optimizer.state_dict(),
            "seconds": clock.seconds,
            "tokens": clock.tokens,
            "best": clock.best,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        self.module.load_state_dict(checkpoint.tensors)
        self.optimizer.load_state_dict(checkpoint.state["optimizer"])
        state = checkpoint.state
        self.clock = Clock(checkpoint.step, state["seconds"], state["tokens"], state["best"])
        self._mark = time.perf_counter()


def fit(trainer: Loop, on_step: Callable[[], None], on_evaluation: Callable[[Scores | None], None]) -> None:
    """Steps until the run's end; an evaluation every so often and after the last step.

    Args:
        on_step: called after every step.
        on_evaluation: called with what the main process found, and None on the others.
    """
    every = trainer.config.evaluation.every
    done = trainer.progress() >= 1
    while not done:
        trainer.step()
        on_step()
        done = trainer.progress() >= 1
        if done or trainer.clock.step % every == 0:
            on_evaluation(trainer.evaluate() if trainer.world.is_main else None)


def _compile_layers(decoder: nn.Module) -> None:
    """Compile a decoder's layers in place: one program serves all that are alike, a whole decoder takes minutes."""
    stacks = [each for each in decoder.modules() if isinstance(each, nn.ModuleList)]
    for layer in max(stacks, key=len, default=[decoder]):
        layer.compile(dynamic=True)


def require_plain_head(backbone: Backbone) -> None:
    """UsageError where the head is more than a product with its rows."""
    if not backbone.leaves_logits_alone or getattr(backbone.output, "bias", None) is not None:
        raise UsageError(
            f"{backbone.target.name} changes its logits after the head (cap, scale or bias): no training for it yet"
        )
