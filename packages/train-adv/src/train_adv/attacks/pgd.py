"""PGD and its short forms: FGSM is one step of it, CW a PGD on the margin, TRADES' attack a PGD on a KL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from expkit.errors import UsageError
from train_adv.attacks.gradient import ascend, logits_of
from train_adv.attacks.losses import AttackLoss, cross_entropy, targeted_cross_entropy
from train_adv.attacks.norms import Linf, Norm, check_epsilon, check_images
from train_adv.modes import eval_mode, frozen_weights

Start = Literal["random", "gaussian", "none"]


@dataclass(frozen=True)
class PGD:
    """Projected gradient ascent (Madry et al. 2018), always against the model in eval mode.

    Attributes:
        epsilon: radius, for images in [0, 1].
        step_size: length of a step in the norm.
        steps: their number; 0 gives the start.
        norm: Linf(), L2() or L1().
        start: "random" in the ball, "gaussian" (images + 0.001 N(0, 1), TRADES') or "none".
        restarts: independent starts. The first point that is misclassified is kept, else that of the highest loss.
    """

    epsilon: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10
    norm: Norm = Linf()  # noqa: RUF009  (it has no state)
    start: Start = "random"
    restarts: int = 1

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon, self.norm.name)
        if self.steps < 0 or self.restarts < 1 or self.step_size < 0:
            raise UsageError(f"steps {self.steps}, restarts {self.restarts}, step size {self.step_size}: out of range")

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A start for each image."""
        if self.start == "none":
            return images.clone()
        if self.start == "gaussian":
            noise = torch.empty_like(images).normal_(generator=generator)
            return self.norm.project(images + 0.001 * noise, images, self.epsilon)
        return self.norm.start(images, self.epsilon, generator)

    def climb(
        self, model: nn.Module, points: Tensor, images: Tensor, labels: Tensor, loss: AttackLoss = cross_entropy
    ) -> Tensor:
        """All steps from the given points. Draws nothing and waits for nothing, so a CUDA graph can hold it."""
        for _ in range(self.steps):
            gradient, _, _ = ascend(model, points, labels, loss)
            points = self.norm.project(points + self.step_size * self.norm.step(gradient), images, self.epsilon)
        return points.detach()

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        loss: AttackLoss | None = None,
        *,
        generator: torch.Generator | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Adversarial images, fp32, within epsilon of `images` and in [0, 1].

        Args:
            images: (batch, ...) in [0, 1].
            labels: (batch,) true classes.
            loss: what is climbed; cross-entropy by default, of the targets where there are any.
            generator: of the starts, on the device of the images; the global one otherwise.
            targets: (batch,) classes to reach; a sample counts as broken once the model gives its target.
        """
        check_images(images)
        images = images.detach().float()
        if loss is None:
            loss = cross_entropy if targets is None else targeted_cross_entropy(targets)
        with eval_mode(model), frozen_weights(model):
            best = self.climb(model, self.draw(images, generator), images, labels, loss)
            for _ in range(self.restarts - 1):
                again = self.climb(model, self.draw(images, generator), images, labels, loss)
                best = _better(model, best, again, labels, loss, targets)
        return best


@torch.no_grad()
def _better(
    model: nn.Module, first: Tensor, second: Tensor, labels: Tensor, loss: AttackLoss, targets: Tensor | None
) -> Tensor:
    """For each sample the point that breaks the model, else that of the higher loss."""
    ranks = []
    for points in (first, second):
        logits = logits_of(model, points)
        broken = logits.argmax(1) == targets if targets is not None else logits.argmax(1) != labels
        ranks.append((broken, loss(logits, labels)))
    take = (ranks[1][0] & ~ranks[0][0]) | ((ranks[1][0] == ranks[0][0]) & (ranks[1][1] > ranks[0][1]))
    return torch.where(take.view(-1, *[1] * (first.ndim - 1)), second, first)


def fgsm(epsilon: float, norm: Norm | None = None) -> PGD:
    """The fast gradient sign method (Goodfellow et al. 2015): one whole step from the image itself."""
    return PGD(epsilon=epsilon, step_size=epsilon, steps=1, norm=norm if norm is not None else Linf(), start="none")


Attack = Callable[..., Tensor]
