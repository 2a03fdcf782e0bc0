"""Kernels that start before the one in front of them has ended (programmatic dependent launch, compute capability 9).

A launch costs about as much as what a small kernel does. Here a kernel that comes to its last steps lets the next one
start, which takes its place on the device, fetches its weights and waits until everything before it is done and
visible. Every kernel waits, so what a kernel has waited for has itself waited for all before it. (Letting the next one
start at once measured slower: kernels that only wait hold room that running ones need.) Ours.
"""

from __future__ import annotations

import inspect
from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LINE = 128  # bytes that a prefetch brings


@triton.jit
def let_next_start(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """The next kernel may take its place on the device."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Before anything is read that another kernel writes, or written at all."""
    if EARLY:
        gdc_wait()


@triton.jit
def prefetch_rows(ptr, first, rows, width, ROWS: tl.constexpr, LINES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bring ``ROWS`` rows from ``first`` on, of a matrix ``(rows, width)``, to the level-2 cache, ``LINES`` of each."""
    step: tl.constexpr = 1024 // ptr.dtype.element_ty.primitive_bitwidth  # elements of a line
    row = tl.maximum(tl.minimum(first + tl.arange(0, ROWS), rows - 1), 0).to(tl.int64)
    column = tl.minimum(tl.arange(0, LINES) * step, width - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [ptr + row[:, None] * width + column[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@cache
def early(device: torch.device) -> dict[str, bool]:
    """The launch options of such a kernel, or of an ordinary one where the device can't."""
    works = "_semantic" in inspect.signature(gdc_wait).parameters  # Triton 3.4's own do not compile
    if works and device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}
