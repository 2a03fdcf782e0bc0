"""Triton kernels of the engine, for one text at a time on CUDA. Each has a torch reference that runs everywhere else.

Triton is imported when a kernel is first needed: without it, or on a GPU that it does not serve, the torch path is
taken, which is said once.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from coral_spec.cache import SlotStore
    from coral_spec.layers import Layer, Nodes, Norm

MAX_CANDIDATES = 2048  # of a tree, sorted by one program
MAX_ROUTED = 16384  # nodes of one forward times groups of head rows
MAX_ROWS = 64  # nodes of one forward; more of them, and batches of texts, take the torch path
DTYPES = (torch.bfloat16, torch.float32)
_FAILED: list[str] = []  # errors for which kernels were given up in this process


def serve(states: Tensor) -> bool:
    """Whether kernels take ``states (batch, nodes, width)``."""
    return (
        states.is_cuda
        and states.dim() == 3
        and states.shape[0] == 1
        and states.shape[1] <= MAX_ROWS
        and states.dtype in (*DTYPES, torch.bool)  # the last for the bookkeeping of trees
        and available(states.device)
    )


def available(device: torch.device) -> bool:
    """Whether Triton is there and compiles for this GPU (compute capability 8.0 and newer)."""
    return not _FAILED and _served(device)


def give_up(error: BaseException) -> bool:
    """After a kernel could not be compiled or launched: the torch path is taken from now on, which a warning says.

    Returns:
        whether ``error`` comes from Triton; if not, nothing was done.
    """
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_globals.get("__name__", "").partition(".")[0] != "triton":
        frame = frame.tb_next
    if frame is None:
        return False
    _FAILED.append(type(error).__name__)
    reason = (str(error).strip().splitlines() or [""])[-1]
    warnings.warn(f"Triton failed ({type(error).__name__}: {reason}): the slower torch path is taken", stacklevel=3)
    return True


@cache
def _served(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    if importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reason = f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    elif device.index not in (None, torch.cuda.current_device()):
        reason = f"{device} is not the current device (CUDA_VISIBLE_DEVICES={device.index} makes it the first)"
    else:
        return True
    warnings.warn(f"{reason}: the slower torch path is taken", stacklevel=2)
    return False


def decode(
    layers: Sequence[Layer], final: Norm | None, states: Tensor, nodes: Nodes, stores: Sequence[SlotStore]
) -> Tensor:
    """See `coral_spec.layers.run`; for states that are served."""
    from coral_spec.kernels.layer import run_layers

    return run_layers(layers, final, states, nodes, stores)


def project(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``states (1, nodes, width)`` by ``weight (outputs, width)``."""
    from coral_spec.kernels.linear import linear

    return linear(states[0].contiguous(), weight, bias=bias).states[None]


def multiply(linear: nn.Module, states: Tensor) -> Tensor:
    """``linear(states)``; by a kernel where it serves the states, and the module is a linear layer and no more."""
    if type(linear) is nn.Linear and not linear._forward_hooks and serve(states):
        return project(states, linear.weight, linear.bias)
    return linear(states)  # type: ignore[no-any-return]


def residual_block(linear: nn.Linear, states: Tensor) -> Tensor:
    """``silu(linear(states)) + states``, in one launch where a kernel serves the states."""
    if not serve(states):
        return functional.silu(linear(states)) + states
    from coral_spec.kernels.linear import linear as launch

    rows = states[0].contiguous()
    return launch(rows, linear.weight, bias=linear.bias, activation="silu", residual=rows).states[None]


def gather_inputs(
    tokens: Tensor,
    table: tuple[Tensor, float],
    features: Tensor,
    above: Tensor | None,
    lengths: Tensor,
    level: int | None,
    limit: int,
) -> tuple[Tensor, Tensor]:
    """A drafter's inputs ``(1, nodes, 2 * width)`` and positions: see `coral_spec.kernels.inputs.gather_inputs`."""
    from coral_spec.kernels.inputs import gather_inputs as launch

    chosen = None if above is None else above[0]
    inputs, positions = launch(
        tokens[0].contiguous(), table[0], features[0], chosen, lengths, depth=level, limit=limit, scale=table[1]
    )
    return inputs[None], positions[None]


def best(logits: Tensor, count: int, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities and tokens ``(1, nodes, count)``: see `coral_spec.kernels.top.top_log_probs`."""
    from coral_spec.kernels.top import top_log_probs

    log_probs, tokens = top_log_probs(logits[0].contiguous(), count, ids)
    return log_probs[None], tokens[None]


def choose_groups(logits: Tensor, paths: Tensor | None, always: int, active: int) -> tuple[Tensor, Tensor]:
    """Groups of rows for ``logits (1, nodes, groups)``: see `coral_spec.kernels.routing.choose`."""
    from coral_spec.kernels.routing import choose

    return choose(logits[0].contiguous(), None if paths is None else paths[0].contiguous(), always, active)


def grouped_best(
    features: Tensor, slabs: Tensor, active: Tensor, count: int, ids: Tensor, log_mass: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and tokens ``(1, nodes, count)``: see `coral_spec.kernels.grouped.grouped_top`."""
    from coral_spec.kernels.grouped import grouped_top

    log_probs, tokens = grouped_top(features[0].contiguous(), slabs, active, count, ids=ids, log_mass=log_mass)
    return log_probs[None], tokens[None]


def largest(logits: Tensor) -> Tensor:
    """Index of the first largest logit: ``(1, nodes)``."""
    from coral_spec.kernels.top import largest as launch

    return launch(logits[0].contiguous())[None]


def draw(logits: Tensor, depths: Tensor, positions: Tensor, seeds: Tensor, temperature: float) -> Tensor:
    """Sampled tokens ``(1, nodes)``: see `coral_spec.kernels.gumbel.draw`."""
    from coral_spec.kernels.gumbel import draw as launch

    rows = logits[0].contiguous(), depths[0].contiguous(), positions[0].contiguous()
    return launch(*rows, seeds, temperature)[None]


def commit(addresses: Tensor, like: Tensor, lengths: Tensor, path: Tensor) -> None:
    """Commit ``path (count,)`` in all buffers: see `coral_spec.kernels.slots.move`."""
    from coral_spec.kernels.slots import move as launch

    launch(addresses, like, lengths, path)
