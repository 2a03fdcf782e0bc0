"""Random state: set it once, carry it through a checkpoint."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch

from expkit.errors import UsageError


def seed_everything(seed: int) -> None:
    """Seed python, numpy (where it is imported) and torch on every device.

    Raises:
        UsageError: a negative seed or one of 64 bits or more.
    """
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed {seed} is out of range; use 0 <= seed < 2**63")
    random.seed(seed)
    if "numpy" in sys.modules:
        import numpy

        numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture_rng() -> dict[str, Any]:
    """The state of every global generator, as plain values and tensors that `weights_only=True` loads."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        import numpy

        kind, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
        keys_tensor = torch.tensor([int(key) for key in keys], dtype=torch.int64)
        state["numpy"] = (str(kind), keys_tensor, int(position), int(has_gauss), float(gauss))
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Continue from a state of `capture_rng`. Devices that are no longer there are skipped."""
    random.setstate(_as_tuple(state["python"]))
    torch.set_rng_state(state["torch"].cpu())
    if "numpy" in state:
        import numpy

        kind, keys, position, has_gauss, gauss = state["numpy"]
        array = numpy.array(keys.tolist(), dtype=numpy.uint32)
        numpy.random.set_state((kind, array, position, has_gauss, gauss))
    if torch.cuda.is_available():
        for index, each in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(each.cpu(), index)


def _as_tuple(value: Any) -> Any:
    """Lists to tuples, all the way down: `random.setstate` takes nothing else."""
    return tuple(_as_tuple(each) for each in value) if isinstance(value, (list, tuple)) else value
