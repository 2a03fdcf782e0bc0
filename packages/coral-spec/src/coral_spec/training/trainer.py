"""Training a drafter against its target, which runs along and is never stored.

One optimiser step: for each batch the target's features, then for each harmonised step a forward, a loss and a
backward of its own, so that one graph lives at a time. Gradients are averaged over all processes, clipped, applied.
Batches and noise depend on seed and batch number alone, so a resumed run repeats an uninterrupted one to the bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coral_spec.backbone import Backbone
from coral_spec.targets import Target
from coral_spec.training.batches import Batch, BatchPlan, group_by_length, make_batch, split_rows
from coral_spec.training.config import TrainConfig
from coral_spec.training.data import Answers
from coral_spec.training.evaluate import Acceptance, simulate
from coral_spec.training.generation import fused_kernels
from coral_spec.training.harmonised import draft_step, harmonised_mask, shift
from coral_spec.training.initialise import new_drafter
from coral_spec.training.losses import draft_loss
from coral_spec.training.schedule import learning_rate, loss_weights
from expkit.checkpoint import Checkpoint
from expkit.device import autocast
from expkit.distributed import World, all_reduce_mean
from expkit.errors import UsageError


@dataclass
class Clock:
    """Where a run stands.

    Attributes:
        step: optimiser steps taken.
        seconds: time spent training, evaluations included, over all its starts.
        tokens: tokens that went through the target, padding left out, on all processes.
        best: best simulated acceptance length so far.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    best: float = 0.0


class Trainer:
    """A run in memory; files are the caller's.

    Attributes:
        drafter: fp32 master weights.
        clock: progress so far.
    """

    def __init__(self, config: TrainConfig, target: Target, answers: Answers, world: World) -> None:
        self.config, self.target, self.answers, self.world = config, target, answers, world
        if target.dtype == torch.float16:
            raise UsageError("training in float16 is not supported; use dtype bf16 or fp32")
        self.backbone = Backbone(target)
        _require_plain_head(self.backbone, target)
        self.head: Tensor = self.backbone.output.weight.detach()
        self.decoder: Any = self.backbone.decoder
        if config.compile == "all":
            self.decoder = torch.compile(self.decoder, dynamic=True)
        self.drafter = new_drafter(target, config.init, config.seed)
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.drafter.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )
        length = min(config.batch.max_length, target.context_length)
        try:
            rows, held = split_rows(answers, config.evaluation.prompts, length, config.seed)
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
        self.clock = Clock()
        self._mark = time.perf_counter()
        self._sums: dict[str, Tensor] = {}
        self._summed = 0

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
        config, progress = self.config, self.progress()
        weights = loss_weights(config.loss, progress)
        first = self.clock.step * config.batch.accumulate * self.world.size
        numbers = range(first, first + config.batch.accumulate * self.world.size)
        batches = {number: self.plan.batch(number) for number in numbers}
        counts = [
            max(1, sum(batch.count(step) for batch in batches.values())) for step in range(1, config.align_steps + 1)
        ]
        self.optimizer.zero_grad(set_to_none=True)
        with fused_kernels():
            for number in numbers[self.world.rank :: self.world.size]:
                self._accumulate(number, batches[number], weights, counts)
        self._apply(learning_rate(config.optimizer, progress))
        self.clock.step += 1
        self.clock.tokens += sum(int((batch.last + 2).sum()) for batch in batches.values())
        self._summed += 1
        self.tick()

    def tick(self) -> None:
        """Add the time since the last tick to the clock. Waits for nothing, so only long stretches are exact."""
        now = time.perf_counter()
        self.clock.seconds += now - self._mark
        self._mark = now

    def _accumulate(self, number: int, batch: Batch, weights: tuple[float, float, float], counts: list[int]) -> None:
        """Gradients of one batch; the scale makes their mean over processes the mean over positions."""
        config = self.config
        features, embeddings = self.forward(batch.tokens)
        labels = features.flatten(0, 1)
        inputs = [self._noisy(features, number)]
        known: Tensor | None = None  # the target's most likely tokens by flat index, found in the first step
        for step in range(1, config.align_steps + 1):
            mask = harmonised_mask(features.shape[1], step, features.dtype, features.device)
            with autocast(features.device, self.target.dtype):
                predicted = draft_step(self.drafter, embeddings, inputs, mask)
            where = batch.positions(step).to(features.device, non_blocking=True)
            parts = draft_loss(
                predicted.flatten(0, 1)[where],
                labels[where + 1],
                self.head,
                weights=weights,
                top_k=config.loss.top_k,
                scale=self.world.size / counts[step - 1],
                chunk=config.loss.chunk,
                top_ids=None if known is None else known[where],
                compiled=config.compile != "none",
            )
            if known is None and parts.top_ids is not None:
                known = parts.top_ids.new_zeros(len(labels), parts.top_ids.shape[1])
                known[where] = parts.top_ids
            parts.total.backward()  # type: ignore[no-untyped-call]
            inputs.append(shift(predicted, inputs[0]).to(features.dtype))
            self._note(step, parts.feature, parts.soft, parts.top, parts.agreed)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The target's features and the next tokens' embeddings, ``(rows, length, hidden)``, of tokens on the CPU."""
        tokens = tokens.to(self.target.device, non_blocking=True)
        features = self.decoder(input_ids=tokens, use_cache=False).last_hidden_state
        following = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], dim=1)
        return features, self.backbone.embed(following)

    def _noisy(self, features: Tensor, number: int) -> Tensor:
        if self.config.noise == 0:
            return features
        generator = torch.Generator(features.device).manual_seed((self.config.seed << 32) + number)
        amount = self.config.noise * min(1.0, 512 / features.shape[1])
        noise = torch.empty_like(features, dtype=torch.float32).uniform_(-0.5, 0.5, generator=generator)
        return (features.float() + amount * noise).to(features.dtype)

    def _apply(self, rate: float) -> None:
        parameters = list(self.drafter.parameters())
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

    def _note(self, step: int, feature: Tensor, soft: Tensor, top: Tensor, agreed: Tensor) -> None:
        for name, value in (("feature", feature), ("soft", soft), ("top", top), ("agreed", agreed)):
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

    def evaluate(self) -> Acceptance:
        """Simulated acceptance on the held-out answers."""
        settings = self.config.evaluation
        with fused_kernels(), autocast(self.target.device, self.target.dtype):
            found = simulate(
                self.drafter, self.forward, self.head, self.held_out, depth=settings.depth, chunk=self.config.loss.chunk
            )
        self.tick()
        return found

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the drafter's weights."""
        clock = self.clock
        return {
            "optimizer": self.optimizer.state_dict(),
            "seconds": clock.seconds,
            "tokens": clock.tokens,
            "best": clock.best,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        self.drafter.load_state_dict(checkpoint.tensors)
        self.optimizer.load_state_dict(checkpoint.state["optimizer"])
        state = checkpoint.state
        self.clock = Clock(checkpoint.step, state["seconds"], state["tokens"], state["best"])
        self._mark = time.perf_counter()


def fit(trainer: Trainer, on_step: Callable[[], None], on_evaluation: Callable[[Acceptance | None], None]) -> None:
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


def _require_plain_head(backbone: Backbone, target: Target) -> None:
    probe = torch.full((1,), 2.0)
    if not torch.equal(backbone.finish_logits(probe), probe) or getattr(backbone.output, "bias", None) is not None:
        raise UsageError(
            f"{target.name} changes its logits after the head (cap, scale or bias): no training for it yet"
        )
