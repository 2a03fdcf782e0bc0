"""APGD (Croce & Hein 2020, algorithm 1; for L1 Croce & Hein 2021): PGD that sets its own step size.

Written in tensor operations without a look at the device, so that one attack is one queue of kernels. It follows the
published code point for point (tests compare every point in fp32 against `pyautoattack`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from expkit.errors import UsageError
from train_adv.attacks.gradient import ascend, logits_of
from train_adv.attacks.losses import AttackLoss, cross_entropy, targeted_dlr
from train_adv.attacks.norms import L2, Linf, Norm, check_epsilon, check_images, flat_norm, project_l1_box
from train_adv.modes import eval_mode, frozen_weights


class Result(NamedTuple):
    """What a run found, for each sample.

    Attributes:
        best: the point of the highest loss.
        adversarial: the last misclassified point, else `best`'s start.
        broken: (batch,) whether there was one.
        loss: (batch,) highest loss.

    An attack that ran in less than fp32 should have both points judged: the last one may be wrong by rounding only.
    """

    best: Tensor
    adversarial: Tensor
    broken: Tensor
    loss: Tensor


@dataclass(frozen=True)
class APGD:
    """The attack; `search` attacks from given points, calling it does random starts and restarts.

    Attributes:
        epsilon: radius, for images in [0, 1].
        steps: gradient steps of a run.
        norm: Linf(), L2() or L1().
        restarts: random starts, each against what is still classified rightly.
        rho: share of rising steps below which the step size is halved.
    """

    epsilon: float = 8 / 255
    steps: int = 100
    norm: Norm = Linf()  # noqa: RUF009  (it has no state)
    restarts: int = 1
    rho: float = 0.75

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon, self.norm.name)
        if self.steps < 1 or self.restarts < 1:
            raise UsageError(f"steps {self.steps}, restarts {self.restarts}: needed at least 1")

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A start on the sphere (Linf: the largest coordinate is at epsilon; L1: that of `search`), as published."""
        if isinstance(self.norm, Linf):
            noise = torch.empty_like(images).uniform_(-1, 1, generator=generator)
            return (images + self.epsilon * noise / (flat_norm(noise, torch.inf) + 1e-12)).clamp(0, 1)
        noise = torch.empty_like(images).normal_(generator=generator)
        if isinstance(self.norm, L2):
            return (images + self.epsilon * self.norm.step(noise)).clamp(0, 1)
        return (images + project_l1_box(noise, images, self._radii()[0][0])).clamp(0, 1)

    def search(self, model: nn.Module, points: Tensor, images: Tensor, labels: Tensor, loss: AttackLoss) -> Result:
        """From what `draw` gave: one run; for L1 the published three, at 3, 2 and 1 epsilon, each from the last's best.

        The L1 ball is so small in high dimension that few points of it are near the best ones of a larger ball's.
        """
        if self.norm.name != "L1":
            return self.run(model, points, images, labels, loss)
        for epsilon, steps in self._radii():
            stage = replace(self, epsilon=epsilon, steps=steps)
            points = images + project_l1_box(points - images, images, epsilon)
            result = stage.run(model, points, images, labels, loss, drawn=False)
            points = result.best
        return result

    def _radii(self) -> list[tuple[float, int]]:
        """Radius and steps of each of L1's runs."""
        share = math.ceil(0.3 * self.steps)
        if self.steps - 2 * share < 1:  # too few to be shared out
            return [(self.epsilon, self.steps)]
        return [(3 * self.epsilon, share), (2 * self.epsilon, share), (self.epsilon, self.steps - 2 * share)]

    def run(
        self, model: nn.Module, points: Tensor, images: Tensor, labels: Tensor, loss: AttackLoss, *, drawn: bool = True
    ) -> Result:
        """One published run from `points`, at one radius. `drawn`: a random start (L1 then begins with wide steps)."""
        rule = _SparseRule(self, points, images, drawn) if self.norm.name == "L1" else _HalvingRule(self, images)
        gradient, values, logits = ascend(model, points, labels, loss)
        broken = logits.argmax(1) != labels
        state = _State(points, points, gradient, points, gradient, values, points, broken)
        for index in range(self.steps):
            moved = rule.move(state, images, first=index == 0)
            gradient, values, logits = ascend(model, moved, labels, loss)
            state = state.observe(moved, gradient, values, logits.argmax(1) != labels)
            state = rule.check(index, values, state, images)
        return Result(state.best, state.adversarial, state.broken, state.best_value)

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        loss: AttackLoss = cross_entropy,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Adversarial images where they were found, the natural ones elsewhere; always in eval mode."""
        check_images(images)
        images = images.detach().float()
        with eval_mode(model), frozen_weights(model):
            found = images.clone()
            with torch.no_grad():
                standing = logits_of(model, images).argmax(1) == labels
            for _ in range(self.restarts):
                chosen = standing.nonzero().squeeze(1)
                if len(chosen) == 0:
                    break
                start = self.draw(images[chosen], generator)
                result = self.search(model, start, images[chosen], labels[chosen], loss)
                hit = chosen[result.broken]
                found[hit] = result.adversarial[result.broken]
                standing[hit] = False
        return found


def likely_targets(logits: Tensor, count: int = 9) -> list[Tensor]:
    """The targets (batch,) of APGD-T, from logits (batch, classes): the second most likely class first.

    For images that are labelled rightly, as the attacked ones are, these are the other classes.

    Raises:
        UsageError: fewer than four classes, for which the loss is not defined.
    """
    classes = logits.shape[1]
    if classes < 4:
        raise UsageError(f"APGD-T needs at least 4 classes, and the model has {classes}; use APGD-CE")
    ranking = logits.argsort(dim=1)
    return [ranking[:, -place] for place in range(2, min(count, classes - 1) + 2)]


def apgd_targeted(
    attack: APGD,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    classes: int = 9,
    generator: torch.Generator | None = None,
) -> Tensor:
    """APGD-T: the targeted DLR loss towards the most likely other classes, one after the other.

    Args:
        attack: its radius, steps and norm.
        classes: how many targets (at most classes of the model less one).

    Raises:
        UsageError: a model of fewer than four classes, for which the loss is not defined.
    """
    check_images(images)
    images = images.detach().float()
    with eval_mode(model), frozen_weights(model):
        found = images.clone()
        with torch.no_grad():
            logits = logits_of(model, images)
        standing = logits.argmax(1) == labels
        for targets in likely_targets(logits, classes):
            for _ in range(attack.restarts):
                chosen = standing.nonzero().squeeze(1)
                if len(chosen) == 0:
                    return found
                start = attack.draw(images[chosen], generator)
                aim = targeted_dlr(targets[chosen])
                result = attack.search(model, start, images[chosen], labels[chosen], aim)
                hit = chosen[result.broken]
                found[hit] = result.adversarial[result.broken]
                standing[hit] = False
    return found


class _State(NamedTuple):
    """Where a run stands: x, x_{k-1}, the gradient at x, and what was best so far."""

    point: Tensor
    before: Tensor
    gradient: Tensor
    best: Tensor
    best_gradient: Tensor
    best_value: Tensor
    adversarial: Tensor
    broken: Tensor

    def observe(self, moved: Tensor, gradient: Tensor, values: Tensor, wrong: Tensor) -> _State:
        better = values > self.best_value
        return _State(
            point=moved,
            before=self.point,
            gradient=gradient,
            best=_pick(better, moved, self.best),
            best_gradient=_pick(better, gradient, self.best_gradient),
            best_value=torch.where(better, values, self.best_value),
            adversarial=_pick(wrong, moved, self.adversarial),
            broken=self.broken | wrong,
        )

    def back_to_best(self, where: Tensor) -> _State:
        """Continue from the best point where asked; x_{k-1} stays what it was, as published."""
        return self._replace(
            point=_pick(where, self.best, self.point), gradient=_pick(where, self.best_gradient, self.gradient)
        )


class _HalvingRule:
    """Linf and L2: momentum, and halving the step size at checkpoints that come ever closer."""

    def __init__(self, attack: APGD, images: Tensor) -> None:
        self.attack = attack
        self.length = max(int(0.22 * attack.steps), 1)
        self.shortest = max(int(0.06 * attack.steps), 1)
        self.shrink = max(int(0.03 * attack.steps), 1)
        self.since = 0
        self.size = images.new_full((len(images), *[1] * (images.ndim - 1)), 2 * attack.epsilon)
        self.history: list[Tensor] = []
        self.value_then: Tensor | None = None
        self.halved_then = torch.ones(len(images), dtype=torch.bool, device=images.device)

    def move(self, state: _State, images: Tensor, first: bool) -> Tensor:
        norm, epsilon = self.attack.norm, self.attack.epsilon
        if self.value_then is None:
            self.value_then = state.best_value
        a = 1.0 if first else 0.75
        ahead = norm.project(state.point + self.size * norm.step(state.gradient), images, epsilon)
        mixed = state.point + (ahead - state.point) * a + (state.point - state.before) * (1 - a)
        return norm.project(mixed, images, epsilon)

    def check(self, index: int, values: Tensor, state: _State, images: Tensor) -> _State:
        self.history.append(values)
        self.since += 1
        if self.since < self.length:
            return state
        assert self.value_then is not None
        # At the first checkpoint the published code compares the oldest value with an entry that is not yet
        # written, a 0 at the end of its table.
        table = self.history[-(self.length + 1) :]
        if len(table) == self.length:
            table = [torch.zeros_like(values) if self.length < self.attack.steps else values, *table]
        rises = torch.stack([later > earlier for earlier, later in pairwise(table)]).sum(0)
        stuck = rises <= self.length * self.attack.rho
        stuck |= ~self.halved_then & (self.value_then >= state.best_value)
        self.halved_then, self.value_then = stuck, state.best_value
        self.size = _pick(stuck, self.size / 2, self.size)
        self.length = max(self.length - self.shrink, self.shortest)
        self.since = 0
        return state.back_to_best(stuck)


class _SparseRule:
    """L1: steps over the largest gradient entries only; how many follows how sparse the best point has become."""

    def __init__(self, attack: APGD, points: Tensor, images: Tensor, drawn: bool) -> None:
        self.epsilon = attack.epsilon
        self.every = max(int(0.04 * attack.steps), 1)
        self.since = 0
        self.count = images[0].numel()
        self.size = images.new_full((len(images), *[1] * (images.ndim - 1)), attack.epsilon)
        if drawn:
            self.share = images.new_full((len(images),), 0.2)
            self.support = images.new_full((len(images),), float(self.count))
        else:
            self.support = _support(points - images)
            self.share = self.support / self.count / 1.5

    def move(self, state: _State, images: Tensor, first: bool) -> Tensor:
        ordered = state.gradient.abs().flatten(1).sort(dim=1).values
        place = ((1 - self.share) * self.count).clamp(0, self.count - 1).long()
        threshold = ordered.gather(1, place[:, None]).view(-1, *[1] * (images.ndim - 1))
        signs = (state.gradient * (state.gradient.abs() >= threshold)).sign()
        delta = state.point + self.size * signs / (flat_norm(signs, 1) + 1e-10) - images
        return images + project_l1_box(delta, images, self.epsilon)

    def check(self, index: int, values: Tensor, state: _State, images: Tensor) -> _State:
        self.since += 1
        if self.since < self.every:
            return state
        support = _support(state.best - images)
        sparser = support / self.support < 0.95
        self.share = support / self.count / 1.5
        reduced = (self.size / 1.5).clamp(self.epsilon / 10, self.epsilon)
        self.size = _pick(sparser, torch.full_like(self.size, self.epsilon), reduced)
        self.support = support
        self.since = 0
        return state.back_to_best(sparser)


def _support(delta: Tensor) -> Tensor:
    return (delta != 0).flatten(1).sum(1).float()


def _pick(where: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`yes` for the samples where `where` (batch,) holds, `no` for the others."""
    return torch.where(where.view(-1, *[1] * (yes.ndim - 1)), yes, no)
