from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expkit import device as module
from expkit.device import (
    Timer,
    autocast,
    peak_memory,
    reserved_memory,
    reset_peak_memory,
    resolve_device,
    resolve_dtype,
    to_device,
    visible_gpus,
)
from expkit.errors import UsageError

CPU = torch.device("cpu")


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def cpuinfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Let the code read this text as /proc/cpuinfo."""

    def write(text: str) -> None:
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(module, "_CPUINFO", tmp_path / "cpuinfo")

    return write


@pytest.mark.usefixtures("without_cuda")
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert resolve_device("auto") == CPU


@pytest.mark.usefixtures("without_cuda")
def test_a_gpu_that_is_not_there_is_wrong_use() -> None:
    with pytest.raises(UsageError, match=r'"cuda:1".*no CUDA'):
        resolve_device("cuda:1")


def test_an_unknown_device_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match='"gpu0"'):
        resolve_device("gpu0")


@pytest.mark.parametrize(
    ("line", "dtype"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 aes", torch.bfloat16),
        ("flags\t\t: fpu amx_bf16", torch.bfloat16),
        ("Features\t: fp asimd bf16", torch.bfloat16),
        ("flags\t\t: fpu avx2 avx512f", torch.float32),
        ("", torch.float32),
    ],
)
def test_auto_dtype_on_a_cpu_is_bf16_only_where_the_processor_has_it(
    cpuinfo: Callable[[str], None], line: str, dtype: torch.dtype
) -> None:
    cpuinfo(f"processor\t: 0\n{line}\n")
    assert resolve_dtype("auto", CPU) == dtype


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("float16", torch.float16), ("fp32", torch.float32)]
)
def test_a_dtype_has_a_short_and_a_long_name(name: str, dtype: torch.dtype) -> None:
    assert resolve_dtype(name, CPU) == dtype


def test_an_unknown_dtype_is_refused_with_the_known_names() -> None:
    with pytest.raises(UsageError, match=r'"int8".*bfloat16'):
        resolve_dtype("int8", CPU)


def test_autocast_changes_the_precision_of_a_product() -> None:
    x = torch.ones(2, 2)
    with autocast(CPU, torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
    with autocast(CPU, torch.float32):
        assert (x @ x).dtype == torch.float32


def test_the_timer_holds_the_seconds_of_its_block() -> None:
    with Timer(CPU) as timer:
        time.sleep(0.02)
    assert 0.02 <= timer.seconds < 2.0


def test_peak_memory_grows_with_a_large_tensor() -> None:
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    held = torch.ones(64 << 20, dtype=torch.uint8)
    grown = peak_memory(CPU) - before
    del held
    assert before > 1 << 20 and grown > 32 << 20


@pytest.mark.gpu
def test_on_a_gpu_auto_is_the_current_cuda_device_and_half_precision() -> None:
    device = resolve_device("auto")
    assert device == torch.device("cuda", torch.cuda.current_device())
    assert resolve_dtype("auto", device) in (torch.bfloat16, torch.float16)
    reset_peak_memory(device)
    held = torch.ones(8 << 20, dtype=torch.uint8, device=device)
    assert reserved_memory(device) >= peak_memory(device) >= held.numel()


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_tensor_arrives_on_a_device_as_it_was(name: str) -> None:
    sent = torch.arange(12).view(3, 4).T  # not contiguous
    arrived = to_device(sent, torch.device(name))
    assert arrived.device.type == name
    assert torch.equal(arrived.cpu(), sent)


@pytest.mark.parametrize(("named", "expected"), [("GPU-7,5,3", ["GPU-7", "5"]), (None, ["0", "1"])])
def test_gpus_for_children_are_the_visible_ones(
    named: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert visible_gpus(2) == expected
    with pytest.raises(UsageError, match="4 GPUs, but only 3 are visible"):
        visible_gpus(4)


def test_without_gpus_children_share_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for hidden in (True, False):  # there may be some, which are hidden, and stay so
        if hidden:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        else:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        names = visible_gpus(2)
        assert len(set(names)) == 2 and all(int(each) < 0 for each in names)
