"""On what and in which precision a run computes, and how its kernels are chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from expkit.device import resolve_device, resolve_dtype
from expkit.errors import UsageError
from expkit.seed import capture_rng, restore_rng


def training_precision(device_name: str, dtype_name: str, *, deterministic: bool) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a training run; sets how cuDNN and the compiler choose their kernels, for the whole process.

    Args:
        device_name: auto, cpu, cuda or cuda:N.
        dtype_name: auto (bf16 on a GPU that computes in it, else fp32), bf16 or fp32.
        deterministic: kernels that sum in one order, chosen without timing them, for some speed.

    Raises:
        UsageError: no such device or dtype, or fp16.
    """
    device = resolve_device(device_name)
    if dtype_name == "auto":
        native = device.type == "cuda" and resolve_dtype("auto", device) == torch.bfloat16
        dtype_name = "bf16" if native else "fp32"
    dtype = resolve_dtype(dtype_name, device)
    if dtype == torch.float16:
        raise UsageError("training in float16 would need loss scaling and is not supported; use dtype bf16 or fp32")
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    compiler = _compiler()
    if compiler is not None:
        compiler.deterministic = deterministic
    return device, dtype


@contextmanager
def process_as_before() -> Iterator[None]:
    """Random generators, and how kernels are chosen, are the process's own again afterwards."""
    cudnn, compiler, generators = torch.backends.cudnn, _compiler(), capture_rng()
    flags = cudnn.benchmark, cudnn.deterministic, getattr(compiler, "deterministic", None)
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = flags[:2]
        if compiler is not None:
            compiler.deterministic = flags[2]
        restore_rng(generators)


def _compiler() -> Any:
    """The compiler's settings, where it times kernels and can be kept from it: older torch has no such setting."""
    settings = import_module("torch._inductor.config") if torch.cuda.is_available() else None
    return settings if hasattr(settings, "deterministic") else None
