"""The named attacks of `train-adv eval`: which images are still classified rightly afterwards.

Attacks may run in bf16 or TF32; whether an image counts as broken is always decided by the model in fp32, on fp32
adversarial images inside ball and box.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from expkit.device import autocast, tf32
from expkit.errors import UsageError
from expkit.graphs import Captured
from train_adv.attacks.apgd import APGD, Result, likely_targets
from train_adv.attacks.gradient import logits_of, right
from train_adv.attacks.losses import cross_entropy, cw_margin, targeted_dlr
from train_adv.attacks.norms import make_norm
from train_adv.attacks.pgd import PGD, fgsm
from train_adv.data.dataset import stream_seed
from train_adv.modes import attack_twin

NAMES = ("natural", "fgsm", "pgd20", "pgd100", "cw", "apgd-ce", "apgd-t", "apgd", "autoattack")
DEFAULT = ("natural", "fgsm", "pgd20", "cw", "apgd")


@dataclass
class Evaluator:
    """Runs attacks against one model.

    Attributes:
        model: in eval mode, fp32.
        epsilon, norm: of every attack.
        size: images of one batch.
        device: of the model.
        dtype: in which attacks run the model.
        tf32: whether attacks may multiply in TF32 (a GPU's shorter fp32).
        compiled: compile the model for the attacks, and record APGD as CUDA graphs; pays for many images.
        seed: of every random start, together with the chunk's number.
    """

    model: nn.Module
    epsilon: float
    norm: str
    size: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    tf32: bool = False
    compiled: bool = False
    seed: int = 0
    _fast: nn.Module = field(init=False)
    _runs: dict[str, Captured] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        twin = attack_twin(self.model)
        self._fast = torch.compile(twin, dynamic=False) if self.compiled else twin  # type: ignore[assignment]

    def survivors(self, name: str, images: Tensor, labels: Tensor, chunk: int) -> Tensor:
        """Boolean (n,) on the CPU: which of the images are still classified rightly.

        Args:
            name: one of `NAMES`.
            images: fp32 (n, channels, height, width) in [0, 1], on the device.
            labels: (n,), on the device.
            chunk: number of this part of the data, so that every part has random starts of its own.
        """
        generator = torch.Generator(self.device).manual_seed(stream_seed(self.seed, "evaluate", name, chunk))
        standing = self._right(images, labels)
        for attack in self._attacks(name):
            standing = attack(images, labels, standing, generator)
        return standing.cpu()

    def _attacks(self, name: str) -> list[Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]]:
        step = self.epsilon / 4  # 2/255 for 8/255
        norm = make_norm(self.norm)
        plain = {
            "fgsm": (fgsm(self.epsilon, norm), cross_entropy),
            "pgd20": (PGD(self.epsilon, step, 20, norm), cross_entropy),
            "pgd100": (PGD(self.epsilon, step, 100, norm), cross_entropy),
            "cw": (PGD(self.epsilon, step, 30, norm), cw_margin),
        }
        if name in plain:
            attack, loss = plain[name]

            def climb(points: Tensor, images: Tensor, labels: Tensor) -> Tensor:
                with self._precision():
                    return attack.climb(self._fast, points, images, labels, loss)[None]

            return [lambda x, y, s, g: self._batched(name, climb, attack.draw, x, y, s, g)]
        if name == "natural":
            return []
        if name == "autoattack":
            return [self._autoattack]
        parts = {"apgd-ce": [self._apgd_ce], "apgd-t": [self._apgd_t], "apgd": [self._apgd_ce, self._apgd_t]}
        if name not in parts:
            raise UsageError(f"unknown attack {name!r}; use some of {', '.join(NAMES)}")
        return list(parts[name])

    def _apgd_ce(self, images: Tensor, labels: Tensor, standing: Tensor, generator: torch.Generator) -> Tensor:
        attack = APGD(self.epsilon, norm=make_norm(self.norm))

        def run(points: Tensor, images: Tensor, labels: Tensor) -> Tensor:
            with self._precision():
                return _candidates(attack.search(self._fast, points, images, labels, cross_entropy))

        return self._batched("apgd-ce", run, attack.draw, images, labels, standing, generator)

    def _apgd_t(self, images: Tensor, labels: Tensor, standing: Tensor, generator: torch.Generator) -> Tensor:
        attack = APGD(self.epsilon, norm=make_norm(self.norm))
        logits = torch.cat([self._logits(part) for part in torch.split(images, self.size)])

        def run(points: Tensor, images: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
            with self._precision():
                return _candidates(attack.search(self._fast, points, images, labels, targeted_dlr(targets)))

        for targets in likely_targets(logits):
            standing = self._batched("apgd-t", run, attack.draw, images, labels, standing, generator, targets)
        return standing

    def _batched(
        self,
        name: str,
        run: Callable[..., Tensor],
        draw: Callable[[Tensor, torch.Generator], Tensor],
        images: Tensor,
        labels: Tensor,
        standing: Tensor,
        generator: torch.Generator,
        *more: Tensor,
    ) -> Tensor:
        """Attack what still stands, in batches of one size (the last is filled up), and see in fp32 what fell.

        `run` gives candidates (k, batch, ...): an image stands if it is classified rightly at all of them.
        """
        captured = self._runs.setdefault(name, Captured(run, self.compiled and self.device.type == "cuda"))
        standing = standing.clone()
        left = standing.nonzero().squeeze(1)
        for chosen in torch.split(left, self.size) if len(left) else ():
            filled = chosen[torch.arange(min(self.size, len(images)), device=chosen.device) % len(chosen)]
            inputs = [images[filled], labels[filled], *(each[filled] for each in more)]
            found = captured(draw(inputs[0], generator), *inputs)
            for points in found:  # whole batches, as every new size costs a search for kernels
                standing[chosen] &= self._right(points, inputs[1])[: len(chosen)]
        return standing

    def _autoattack(self, images: Tensor, labels: Tensor, standing: Tensor, generator: torch.Generator) -> Tensor:
        """The standard AutoAttack of its authors' own code, in fp32 or TF32; its bundled weights are never loaded.

        In TF32 an image that falls there but not in fp32 is not tried further, and counts as standing.
        """
        try:
            from pyautoattack import AutoAttack
        except ImportError:
            raise UsageError("AutoAttack is not installed; pip install 'train-adv[autoattack]'") from None
        logging.getLogger("auto-attack").setLevel(logging.ERROR)
        attack = AutoAttack(
            self.model, eps=self.epsilon, norm=self.norm, seed=self.seed, device=self.device, version="standard"
        )
        classes = self._logits(images[:1]).shape[1]
        attack.apgd_targeted.n_target_classes = min(attack.apgd_targeted.n_target_classes, classes - 1)
        attack.fab.n_target_classes = min(attack.fab.n_target_classes, classes - 1)
        # Its code views gradients as flat rows, which channels-last images would not allow.
        with tf32(self.tf32), _for_foreign_code(self.model):
            found, _ = attack.run_standard_evaluation(images.contiguous(), labels, batch_size=self.size)
        return standing & self._right(found, labels)

    def _right(self, images: Tensor, labels: Tensor) -> Tensor:
        """In fp32, batch by batch."""
        parts = zip(torch.split(images, self.size), torch.split(labels, self.size), strict=True)
        found = [right(self._logits(part), label) for part, label in parts]
        return torch.cat(found) if found else labels.new_zeros(0, dtype=torch.bool)

    @torch.no_grad()
    def _logits(self, images: Tensor) -> Tensor:
        with tf32(False):  # torch's own default for convolutions is TF32
            return logits_of(self.model, images)

    def _precision(self) -> AbstractContextManager[None]:
        if self.dtype != torch.float32:
            return autocast(self.device, self.dtype)
        return tf32(self.tf32)


def _candidates(result: Result) -> Tensor:
    """The point of the highest loss and the last one that was wrong, (2, batch, ...): either may be wrong in fp32."""
    return torch.stack([result.best, result.adversarial])


@contextmanager
def _for_foreign_code(model: nn.Module) -> Iterator[None]:
    """No gradients for weights, and no search for kernels at each of its many sizes of a batch."""
    learning = [each for each in model.parameters() if each.requires_grad]
    searched = torch.backends.cudnn.benchmark
    for each in learning:
        each.requires_grad_(False)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = searched
        for each in learning:
            each.requires_grad_(True)
