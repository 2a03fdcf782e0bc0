"""Which device, which precision, how long and how much memory."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from expkit.errors import UsageError

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}
_CPUINFO = Path("/proc/cpuinfo")
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # as Linux names them; the last one is arm's


def resolve_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is the current CUDA device where there is one, else the CPU.

    Raises:
        UsageError: not a device name, or a CUDA device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f'unknown device "{name}"; use auto, cpu, cuda or cuda:N') from None
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise UsageError(f'device "{name}": no CUDA device is available; use cpu or auto')
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise UsageError(f'device "{name}": there are {count}; the last is cuda:{count - 1}')
    return torch.device("cuda", index)


def visible_gpus(count: int) -> list[str]:
    """The first `count` GPUs, each as the CUDA_VISIBLE_DEVICES of a process that is to see no other.

    Where none is visible, the names are such that none will be, and the processes share the CPU.

    Raises:
        UsageError: fewer are visible.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")  # a child's numbers count all GPUs of the machine
    if named is None:
        ids = [str(each) for each in range(torch.cuda.device_count())]
    else:
        ids = [each for each in named.split(",") if each]
    if not ids:
        return [str(-1 - each) for each in range(count)]  # no GPU has such a number
    if count > len(ids):
        raise UsageError(f"{count} GPUs, but only {len(ids)} are visible ({', '.join(ids)})")
    return ids[:count]


def described(tensor: Tensor) -> str:
    """Dtype and shape for a message: "float32 (2, 3)"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`, without waiting: from pinned memory to a GPU, as a copy from any other memory
    waits for all that the GPU has been given before."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`; "auto" is bfloat16 where `device` computes in it, else float16 on a GPU
    and float32 on a CPU (which has no fast float16).

    Raises:
        UsageError: not one of auto, bfloat16/bf16, float16/fp16, float32/fp32.
    """
    if name == "auto":
        if device.type == "cuda":
            with torch.cuda.device(device):
                # Emulated bfloat16 (before Ampere) is slower than float16, so it does not count.
                native = torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if native else torch.float16
        return torch.bfloat16 if _cpu_has_bf16() else torch.float32
    if name not in _DTYPES:
        raise UsageError(f'unknown dtype "{name}"; use auto, {", ".join(_DTYPES)}')
    return _DTYPES[name]


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies in bfloat16 (AVX512-BF16, AMX, arm's bf16); unknown counts as no."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return not _BF16_FLAGS.isdisjoint(value.split())
    return False


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision in `dtype` on `device`; nothing at all for float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was queued on it; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timer:
    """Wall-clock seconds of a `with` block, counting the device work that the block queued.

    Attributes:
        seconds: duration of the last finished block; 0.0 before.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device if device is not None else torch.device("cpu")
        self._start = 0.0
        self.seconds = 0.0

    def __enter__(self) -> Timer:
        synchronize(self._device)
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        synchronize(self._device)
        self.seconds = time.perf_counter() - self._start


def peak_memory(device: torch.device) -> int:
    """Most bytes held since the start or `reset_peak_memory`: CUDA's allocated ones, or the process's RSS."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows does not tell
        return 0
    unit = 1 if platform.system() == "Darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def reserved_memory(device: torch.device) -> int:
    """Most bytes that a CUDA device gave to this process, those that CUDA graphs keep for themselves among them; on a
    CPU `peak_memory`."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_memory(device)


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring the peak anew. On a CPU only Linux can; elsewhere the peak stays the process's own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # 5: reset the peak RSS (man 5 proc)
    except OSError:
        return


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Whether products and convolutions of fp32 tensors inside are in TF32 on a GPU; as it was afterwards.

    Torch's own default for convolutions is TF32, so what is measured says `tf32(False)`.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (cudnn.allow_tf32, matmul.allow_tf32)
    cudnn.allow_tf32 = matmul.allow_tf32 = on
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
