"""Training may round its products to TF32; no measured figure does."""

from __future__ import annotations

import torch

from expkit.device import tf32
from pden.evaluation.accuracy import evaluate
from pden.training.gate import measure
from pden.training.stream import Stream
from tiny_domains import finish, tiny_domain, tiny_trainer


def flags() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def test_flags_are_as_before_after_an_error():
    before = flags()
    try:
        with tf32(True):
            assert flags() == (True, True)
            raise KeyError
    except KeyError:
        assert flags() == before


def test_steps_run_in_tf32_and_measurements_in_fp32():
    seen: dict[str, set[tuple[bool, bool]]] = {"train": set(), "eval": set()}
    trainer = tiny_trainer(loss__safety=0.0, loss__adversarial=0.0)  # so that eval mode means measuring
    trainer.task.register_forward_hook(lambda module, *_: seen["train" if module.training else "eval"].add(flags()))
    full, mode = trainer.task.full, trainer.task
    trainer.task.full = lambda images: (seen["train" if mode.training else "eval"].add(flags()), full(images))[1]
    before = flags()
    finish(trainer)
    evaluate(trainer.task, tiny_domain())
    images, labels = trainer.validation.batch(torch.arange(4))
    measure(trainer.task.eval(), trainer.gatekeeper.judge.eval(), None, images, labels, Stream(torch.device("cpu"), 0))
    assert seen == {"train": {(True, True)}, "eval": {(False, False)}} and flags() == before
