"""One training run in memory: batches, host, TRAIN, AWP, averaging. Files are the caller's (`train_adv.training.run`).

Random numbers depend on seed, epoch, step and process alone; the rest of the state is in `state` and `tensors`, so a
run restored from them repeats an uninterrupted one to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from expkit.device import autocast
from expkit.distributed import World
from expkit.errors import UsageError
from expkit.graphs import Beside, Captured
from expkit.norms import kept_statistics
from expkit.seed import capture_rng, restore_rng
from train_adv.averaging import WeightAverage
from train_adv.awp import AWP
from train_adv.data.batches import Batches, to_float
from train_adv.data.dataset import stream_seed
from train_adv.hosts.host import Host
from train_adv.models.classifier import Classifier, Output
from train_adv.modes import eval_mode, natural_statistics
from train_adv.topology.calibrate import gradient_norm, weight_for_ratio
from train_adv.topology.regularizer import TopologyRegularizer
from train_adv.training.climber import Climber, Engine
from train_adv.training.config import TrainConfig
from train_adv.training.reduce import average_gradients, average_statistics, total
from train_adv.training.schedule import learning_rate

T = TypeVar("T")


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        epoch: whole epochs done.
        number: steps done within the present one.
        seconds: spent in training steps, over all starts.
        best_epoch, best_score: by validation; epochs count from 1, and 0 is none yet.
        history: one entry a validation.
        stopped: why training ended early, or "".
    """

    epoch: int = 0
    number: int = 0
    seconds: float = 0.0
    best_epoch: int = 0
    best_score: float = -1.0
    history: list[dict[str, float]] = field(default_factory=list)
    stopped: str = ""


class StepLoss(NamedTuple):
    """One evaluation of the whole loss.

    Attributes:
        total: scalar.
        attacked: logits (batch, classes) of the adversarial images.
        topology: L_topo, a scalar; 0 where the loss has no such term.
    """

    total: Tensor
    attacked: Tensor
    topology: Tensor


class Diverged(UsageError):
    """A loss was not a number."""


class Trainer:
    """Runs steps; see the module's docstring.

    Attributes:
        model: fp32 weights in training.
        average: the weight average, or None.
        progress: where the run stands.
        batches: the training data.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Classifier,
        host: Host,
        topology: TopologyRegularizer | None,
        batches: Batches,
        *,
        device: torch.device,
        dtype: torch.dtype,
        engine: Engine,
        world: World,
    ) -> None:
        self.config, self.batches, self.device, self.dtype, self.world = config, batches, device, dtype, world
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.host, self.topology = host.to(device).to(memory_format=torch.channels_last), topology
        self.forward: Callable[[Tensor], Output] = self.model.with_features
        self.l_topo: Callable[[Tensor, Tensor], Tensor] | None = topology.loss if topology is not None else None
        if engine != "eager":
            self.forward = torch.compile(self.model.with_features, dynamic=False)
            if topology is not None:
                reference: Any = topology.reference
                compiled: Callable[[Tensor], Output] = torch.compile(reference.with_features, dynamic=False)
                topology.read_reference = lambda images: compiled(images).features
                if world.size == 1:  # several gather their features
                    self.l_topo = torch.compile(topology.loss, dynamic=False)
        # One that learns has a backward too, which stays where the rest is.
        apart = topology is not None and topology.kind != "co-trained" and device.type == "cuda"
        self._beside = Beside(device if apart else None)
        self.climber = Climber(host, self.model, engine, device, dtype)
        self.awp = AWP(self.model, config.awp.gamma, self._learning()[1:]) if config.awp.gamma > 0 else None
        averaging = config.averaging
        self.average = None
        if averaging.kind != "none":
            self.average = WeightAverage(self.model, averaging.kind, averaging.decay)
        optimizer = config.optimizer
        self.optimizer = torch.optim.SGD(
            [parameter for module in self._learning() for parameter in module.parameters()],
            lr=optimizer.lr,
            momentum=optimizer.momentum,
            nesterov=optimizer.nesterov,
            weight_decay=optimizer.weight_decay,
            fused=device.type == "cuda",
        )
        # A loss within which processes speak to one another is not recorded.
        speaks = world.size > 1 and (config.topology.active or self.awp is not None)
        graphs = engine == "graphs" and not speaks
        self._ascent = Captured(self._weight_moves, graphs)
        self._descent = Captured(self._backward, graphs, self._learning())
        self.progress = Progress()
        self._sums = torch.zeros(5, device=device)  # loss, attacked right, samples, topology, losses that are no number

    @property
    def deliverable(self) -> Classifier:
        """What is validated and kept: the average, where there is one."""
        if self.average is not None and self.average.updates:
            return self.average.model
        return self.model

    def epoch(self) -> Iterator[int]:
        """Train to the end of the present epoch; yields the number of each step done."""
        progress = self.progress
        for module in self._learning():
            module.train()
        for images, labels in self.batches.epoch(progress.epoch, progress.number):
            self._step(images.contiguous(memory_format=torch.channels_last), labels)
            progress.number += 1
            if progress.number % self.config.log_every == 0:
                self.require_finite()
            yield progress.number
        self.require_finite()
        if self.average is not None and self.config.averaging.kind == "swa":
            if progress.epoch + 1 > self.config.averaging.start * self.config.epochs:
                self.average.update(self.model)
        progress.epoch, progress.number = progress.epoch + 1, 0

    def take_sums(self) -> dict[str, float]:
        """Means since the last call, over all processes."""
        loss, right, samples, topology, _ = total(self._sums, self.world).tolist()
        self._sums.zero_()
        figures = {"loss": loss / max(samples, 1), "train_robust": right / max(samples, 1)}
        if self.topology is not None and self.config.topology.active:
            figures["topology"] = topology / max(samples, 1)
            figures["weight"] = self.topology.current_weight()
            figures.update({name: float(self.topology.last[name]) for name in NORMS if name in self.topology.last})
        return figures

    def adversarial_batches(self, count: int) -> Iterator[Tensor]:
        """Adversarial training images against the average, for its running statistics."""
        assert self.average is not None
        climber = Climber(self.host, self.average.model, "eager", self.device, self.dtype)
        for number, (images, labels) in enumerate(self.batches.epoch(self.progress.epoch)):
            if number == count:
                break
            start = self.host.start(images, self._generator("recompute", number))
            yield climber(start, images, labels)

    def tensors(self) -> dict[str, Tensor]:
        """Every weight that changes, for a checkpoint."""
        named: dict[str, nn.Module] = {"model": self.model, "host": self.host}
        if self.average is not None:
            named["average"] = self.average.model
        if self.topology is not None and self.topology.kind != "frozen":
            named["reference"] = self.topology.reference
        return {
            f"{part}.{name}": value for part, module in named.items() for name, value in module.state_dict().items()
        }

    def state(self) -> dict[str, Any]:
        """Everything else, for a checkpoint. Every process must call it: sums are those of all."""
        topology = self.topology
        return {
            "progress": {**vars(self.progress), "history": [dict(entry) for entry in self.progress.history]},
            "optimizer": self.optimizer.state_dict(),
            "rng": capture_rng(),
            "sums": total(self._sums.clone(), self.world).cpu(),
            "updates": self.average.updates if self.average is not None else 0,
            "topology": {} if topology is None else self._topology_state(topology),
        }

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from what `tensors` and `state` gave."""
        parts: dict[str, nn.Module] = {"model": self.model, "host": self.host}
        if self.average is not None:
            parts["average"] = self.average.model
            self.average.updates = state["updates"]
        if self.topology is not None:
            self.topology.weight = state["topology"]["weight"]
            self.topology.steps = state["topology"]["steps"]
            self.topology.last.update(state["topology"]["norms"])
            if self.topology.kind != "frozen":
                parts["reference"] = self.topology.reference
        for part, module in parts.items():
            prefix = f"{part}."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        self._sums.copy_(state["sums"] if self.world.is_main else torch.zeros_like(state["sums"]))
        restore_rng(state["rng"])

    def _step(self, images: Tensor, labels: Tensor) -> None:
        progress, config = self.progress, self.config
        done = (progress.epoch + progress.number / self.batches.steps) / config.epochs
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, done)
        start = self.host.start(images, self._generator("attack", progress.number))
        adversarial = self.climber(start, images, labels)
        if progress.number == 0 and self.topology is not None and config.topology.active:
            self._measure_norms(images, adversarial, labels)
        weight = self.topology.current_weight() if self.topology is not None else 0.0
        batch = images, adversarial, labels, torch.full((), weight, device=self.device)
        on = self.awp is not None and done * config.epochs >= config.awp.warmup
        with self.awp.moved(self._ascent(*batch)) if self.awp is not None and on else nullcontext():
            loss = self._descent(*batch)
            self._apply()
        self._after(loss, labels)

    def _backward(self, images: Tensor, adversarial: Tensor, labels: Tensor, weight: Tensor) -> StepLoss:
        """The whole loss; its gradients are left in the parameters' `.grad`."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._whole_loss(images, adversarial, labels, weight)
        loss.total.backward()  # type: ignore[no-untyped-call]
        return StepLoss(*(each.detach() for each in loss))

    def _weight_moves(self, images: Tensor, adversarial: Tensor, labels: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """AWP's, up the whole loss."""
        assert self.awp is not None
        return self.awp.direction(lambda: self._whole_loss(images, adversarial, labels, weight).total)

    def _whole_loss(self, images: Tensor, adversarial: Tensor, labels: Tensor, weight: Tensor) -> StepLoss:
        """The host's loss and weight * L_topo, at the weights as they are."""
        settings, topology = self.config.topology, self.topology
        with autocast(self.device, self.dtype):
            reference: tuple[Tensor, Tensor | float] | None = None
            if topology is not None:
                reference = self._beside(topology.reference_features, images, labels)
            found = self.host.loss(self.forward, images, adversarial, labels)
            natural = found.natural
            seen = topology is not None and settings.inputs != "adversarial"
            if natural is None and (seen or settings.control):
                with natural_statistics(self.model, settings.statistics):
                    natural = self.forward(images)
            self._beside.join()
            logits = found.attacked.logits
            if reference is None:
                return StepLoss(found.total, logits, torch.zeros_like(found.total))
            assert self.l_topo is not None
            features, extra = reference
            shown = self._shown(natural, found.attacked)
            value = torch.stack([self.l_topo(each.features, features) for each in shown if each is not None]).mean()
            return StepLoss(found.total + weight * value + extra, logits, value)

    def _shown(self, natural: T, adversarial: T) -> list[T]:
        """Those of the two whose features are compared with the reference's of the natural images."""
        chosen = {"natural": [natural], "adversarial": [adversarial], "both": [natural, adversarial]}
        return chosen[self.config.topology.inputs]

    def _measure_norms(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> None:
        """Gradient norms of both losses on this batch, and lambda where it follows their ratio."""
        topology, settings = self.topology, self.config.topology
        assert topology is not None
        parameters = list(self.model.parameters())
        with kept_statistics(*self._learning()), autocast(self.device, self.dtype):
            # A forward for each: compiled graphs can be walked once only.
            found = self.host.loss(self.forward, images, adversarial, labels)
            host = float(gradient_norm(found.total, parameters))
            with torch.no_grad():
                reference, _ = topology.reference_features(images, labels)

            def read(shown: Tensor) -> Tensor:
                own = shown is images and found.natural is None  # as in the loss
                with natural_statistics(self.model, settings.statistics) if own else nullcontext():
                    return self.forward(shown).features

            values = [topology.loss(read(each), reference) for each in self._shown(images, adversarial)]
            other = float(gradient_norm(torch.stack(values).mean(), parameters))
        topology.last.update(norm_host=host, norm_topology=other)
        if settings.ratio > 0:
            topology.weight = weight_for_ratio(host, other, settings.ratio)

    def _apply(self) -> None:
        modules = self._learning()
        if self.world.size > 1:
            average_gradients(modules)
            average_statistics(modules)
        limit = self.config.optimizer.clip_norm
        if limit > 0:
            nn.utils.clip_grad_norm_([p for module in modules for p in module.parameters()], limit)
        self.optimizer.step()

    def _after(self, loss: StepLoss, labels: Tensor) -> None:
        with torch.no_grad():
            count = len(labels)
            right = (loss.attacked.argmax(1) == labels).sum()
            bad = ~torch.isfinite(loss.total)
            self._sums += torch.stack(
                [loss.total * count, right, torch.full_like(right, count), loss.topology * count, bad]
            ).float()
        if self.topology is not None:
            self.topology.step()
        if self.average is not None and self.config.averaging.kind == "ema":
            self.average.update(self.model)

    def _learning(self) -> list[nn.Module]:
        """Modules whose parameters the optimiser moves."""
        learning: list[nn.Module] = [self.model, self.host]
        if self.topology is not None and self.config.topology.active and self.topology.kind == "co-trained":
            learning.append(self.topology.reference)
        return learning

    def require_finite(self) -> None:
        """Diverged, on every process, when a loss of one of them was not a number since the epoch began."""
        if float(total(self._sums[4].clone(), self.world)) == 0:
            return
        progress = self.progress
        weight = f", topology weight {self.topology.current_weight():g}" if self.topology is not None else ""
        raise Diverged(
            f"the loss is not a number in epoch {progress.epoch + 1}, by step {progress.number} (learning rate "
            f"{self.optimizer.param_groups[0]['lr']:.3g}{weight}): {self._advice()}"
        )

    @torch.no_grad()
    def require_numbers(self, images: Tensor) -> None:
        """Diverged, on every process, where the last steps left a model that gives none for uint8 images."""
        model = self.deliverable
        with eval_mode(model):
            logits = model(to_float(images.to(self.device)))
        if not bool(logits.isfinite().all()):
            raise Diverged(f"the model of epoch {self.progress.epoch} gives no numbers: {self._advice()}")

    def _advice(self) -> str:
        """What to do about a loss or a model that is no number."""
        lower = "topology.weight or optimizer.lr" if self.config.topology.active else "optimizer.lr"
        return f"lower {lower} and train anew, under another name where checkpoints were kept"

    def _topology_state(self, topology: TopologyRegularizer) -> dict[str, Any]:
        norms = {name: float(topology.last[name]) for name in NORMS if name in topology.last}
        return {"weight": topology.weight, "steps": topology.steps, "norms": norms}

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        seed = stream_seed(self.config.seed, purpose, self.progress.epoch, number, self.world.rank)
        return torch.Generator(self.device).manual_seed(seed)


NORMS = ("norm_host", "norm_topology")
