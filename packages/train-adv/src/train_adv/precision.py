"""On what and in which precision a run computes."""

from __future__ import annotations

import torch

from expkit.device import resolve_device, resolve_dtype
from expkit.errors import UsageError


def training_precision(device_name: str, dtype_name: str, *, deterministic: bool) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a training run; sets how cuDNN chooses its kernels.

    Args:
        device_name: auto, cpu, cuda or cuda:N.
        dtype_name: auto (bf16 on a GPU that computes in it, else fp32), bf16 or fp32.
        deterministic: bit-identical runs, for some speed.

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
    return device, dtype
