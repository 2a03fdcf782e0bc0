"""Module modes, changed for the length of a block and then put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Literal

from torch import nn

from expkit.norms import batch_norm_eval, kept_statistics

NaturalStatistics = Literal["shared", "dual", "frozen"]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode; afterwards each is back in the mode it had of its own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def frozen_weights(model: nn.Module) -> Iterator[None]:
    """No parameter asks for gradient, so that a backward to the input computes none."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def attack_twin(model: nn.Module) -> nn.Module:
    """A copy of `model` for attacks: always in eval mode, without weight gradients, and with the very same storage.

    In-place changes of the model (an optimiser's step, running statistics, `load_state_dict`) are seen at once, so
    that compiled code and CUDA graphs of the twin stay valid while the model trains.
    """
    twin = deepcopy(model)
    for source, target in zip(model.modules(), twin.modules(), strict=True):
        for name, parameter in source._parameters.items():
            if parameter is not None:
                target._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)
        for name, buffer in source._buffers.items():
            target._buffers[name] = buffer
    return twin.eval()


@contextmanager
def natural_statistics(model: nn.Module, policy: NaturalStatistics) -> Iterator[None]:
    """What the extra natural forward of TRAIN does with BatchNorm.

    shared: as any forward in train mode: normalised by the batch, running statistics move.
    dual: normalised by the batch; running statistics stay those of the adversarial samples alone.
    frozen: normalised by the running statistics, which stay as they are.
    """
    if policy == "dual":
        with kept_statistics(model):
            yield
    elif policy == "frozen":
        with batch_norm_eval(model):
            yield
    else:
        yield
