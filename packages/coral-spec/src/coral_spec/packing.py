"""Linear layers in oneDNN's own layout, on a CPU: fp32, and bf16 where the processor multiplies in it.

torch's stock product repacks the weights whenever more than one row is multiplied, so verifying three tokens costs
nearly twice as much as decoding one. Packed once, several rows cost little more than one (RESULTS.md has the table).
It is the layout that torch's compiler uses; model classes stay as they are, a copy of the module tree shares all
parameters, and the model that the user sees is untouched. The packed weights take their size once more.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expkit.device import resolve_dtype

MEMORY_SHARE = 0.25  # of the memory that is free: larger models stay as they are


def pack(weight: Tensor) -> Tensor:
    """``weight (outputs, width)`` in oneDNN's layout, for :func:`multiply`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())  # type: ignore[no-any-return]


def multiply(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(..., width)`` by a packed weight: ``(..., outputs)``."""
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class PackedLinear(nn.Module):
    """Stands in for `nn.Linear`: same parameters, same result up to the order of sums."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._packed: Any = pack(linear.weight)

    def forward(self, states: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        return multiply(states, self._packed, self.bias)


def packed(module: nn.Module) -> Any:
    """A copy of ``module`` with packed linear layers where that pays and fits, else ``module`` itself.

    The copy shares parameters and buffers with the original, which stays as it is.
    """
    if not pays(module):
        return module
    if type(module) is nn.Linear:
        return PackedLinear(module)
    shared = {id(tensor): tensor for tensor in itertools.chain(module.parameters(), module.buffers())}
    twin = copy.deepcopy(module, shared)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
    return twin


def pays(module: nn.Module) -> bool:
    """Whether all linear layers of ``module`` can be packed, and there is memory for it."""
    weights = [each.weight for each in module.modules() if type(each) is nn.Linear]
    size = sum(weight.nbytes for weight in weights)
    return bool(weights) and all(map(_packable, weights)) and size <= MEMORY_SHARE * _free_memory()


def _packable(weight: Tensor) -> bool:
    operations = all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    return (
        weight.device.type == "cpu"
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and multiplies_bf16()))
        and not weight.requires_grad
        and bool(torch._C._has_mkldnn)
        and operations
    )


def multiplies_bf16() -> bool:
    """Whether this processor has bf16 products of its own; emulated ones gain nothing from packing."""
    return resolve_dtype("auto", torch.device("cpu")) == torch.bfloat16


def _free_memory() -> float:
    """Bytes that can be had without swapping; without limit where the system does not say."""
    found = [float("inf")]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
        found.append(float(Path("/sys/fs/cgroup/memory.max").read_text()))  # a container's limit, or "max"
    except (OSError, ValueError):
        pass
    return min(found)
