"""Products of a few rows with a large weight: bound by reading the weight once. Norm, gate and residual are fused in.

Each program owns some output columns for all rows and walks along the width; the weight is read exactly once, the
rows come from the cache. A norm between two products costs no launch of its own: the first product also writes its
rows multiplied by the norm's weight, and the sums of squares of its own columns; the second multiplies those rows and
divides its result by their size. Ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from coral_spec.kernels.launch import LINE, early, let_next_start, prefetch_rows, wait_for_inputs

MOST_LINES = 16  # of every row of a weight that are fetched ahead


class Rows(NamedTuple):
    """Rows on their way through a decoder.

    Attributes:
        states: ``(rows, width)``.
        scaled: the states times the weight of the norm that comes next; None when none does.
        squares: sums of squares ``(parts, rows)`` fp32, which add up to those of the whole rows.
    """

    states: Tensor
    scaled: Tensor | None = None
    squares: Tensor | None = None


@triton.jit
def _activate(gate, GELU: tl.constexpr):  # type: ignore[no-untyped-def]
    if GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(2.0 * inner)  # 0.5 * (1 + tanh(inner)) is sigmoid(2 * inner)
    return gate * tl.sigmoid(gate)


@triton.jit
def _row_sizes(squares_ptr, rows, row, parts, width, eps, BLOCK_P: tl.constexpr):  # type: ignore[no-untyped-def]
    """One over the root mean square of every row."""
    part = tl.arange(0, BLOCK_P)
    total = tl.zeros(row.shape, dtype=tl.float32)
    for first in range(0, parts, BLOCK_P):
        at = (first + part)[:, None] * rows + row[None, :]
        inside = (first + part < parts)[:, None] & (row < rows)[None, :]
        total += tl.sum(tl.load(squares_ptr + at, mask=inside, other=0.0), axis=0)
    return tl.rsqrt(total / width + eps)


@triton.jit(do_not_specialize=["rows", "parts"])
def _linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, bias_ptr, squares_ptr, residual_ptr, next_ptr, out_ptr, scaled_ptr, sums_ptr,
    rows, outputs, width, parts, eps,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NEXT: tl.constexpr, GATED: tl.constexpr,
    ACTIVE: tl.constexpr, GELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr, CAST: tl.constexpr, LINES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        prefetch_rows(w_ptr, tl.program_id(0) * BLOCK_N, outputs, width, BLOCK_N, LINES)
        if GATED:
            prefetch_rows(w_ptr, outputs + tl.program_id(0) * BLOCK_N, 2 * outputs, width, BLOCK_N, LINES)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_R)
    row_in, column_in = row < rows, column < outputs
    at = row[:, None] * outputs + column[None, :]
    inside = row_in[:, None] & column_in[None, :]
    # What the last steps need is asked for first, so that it has come when they begin.
    if BIAS:
        bias = tl.load(bias_ptr + column, mask=column_in, other=0.0).to(tl.float32)
        if GATED:
            up_bias = tl.load(bias_ptr + outputs + column, mask=column_in, other=0.0).to(tl.float32)
    if NEXT:
        next_weight = tl.load(next_ptr + column, mask=column_in, other=0.0)
    wait_for_inputs(EARLY)
    if NORM:
        size = _row_sizes(squares_ptr, rows, row, parts, width, eps, BLOCK_P)
    if RESIDUAL:
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0)
    result = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    up = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_in = k < width
        x = tl.load(x_ptr + row[:, None] * width + k[None, :], mask=row_in[:, None] & k_in[None, :], other=0.0)
        weight_at = column[None, :].to(tl.int64) * width + k[:, None]
        weight_in = k_in[:, None] & column_in[None, :]
        w = tl.load(w_ptr + weight_at, mask=weight_in, other=0.0)
        if CAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        result = tl.dot(x, w, result, input_precision="ieee")
        if GATED:
            u = tl.load(w_ptr + outputs.to(tl.int64) * width + weight_at, mask=weight_in, other=0.0)
            if CAST:
                u = u.to(tl.float32)
            up = tl.dot(x, u, up, input_precision="ieee")
    let_next_start(EARLY)
    if NORM:
        result *= size[:, None]
        up *= size[:, None]
    if BIAS:
        result += bias[None, :]
        if GATED:
            up += up_bias[None, :]
    if ACTIVE:
        result = _activate(result, GELU)
    if GATED:
        result *= up
    if RESIDUAL:
        result += residual.to(tl.float32)
    element = out_ptr.dtype.element_ty
    tl.store(out_ptr + at, result.to(element), mask=inside)
    if NEXT:
        stored = result.to(element).to(tl.float32)
        tl.store(scaled_ptr + at, (stored * next_weight[None, :]).to(element), mask=inside)
        sums = tl.sum(tl.where(inside, stored * stored, 0.0), axis=1)
        tl.store(sums_ptr + tl.program_id(0) * rows + row, sums, mask=row_in)


@triton.jit(do_not_specialize=["parts"])
def _row_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, bias_ptr, squares_ptr, residual_ptr, next_ptr, out_ptr, scaled_ptr, sums_ptr,
    outputs, width, parts, eps,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NEXT: tl.constexpr, GATED: tl.constexpr,
    ACTIVE: tl.constexpr, GELU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The same for one row: no matrix unit, so all threads share the walk along the width.

    Weights are loaded a step ahead, the first ones while the kernel before this one still runs.
    """
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_in = column < outputs
    k = tl.arange(0, BLOCK_K)
    weight_at = column[:, None].to(tl.int64) * width + k[None, :]
    weight_in = (k < width)[None, :] & column_in[:, None]
    up_at = outputs.to(tl.int64) * width + weight_at
    w = tl.load(w_ptr + weight_at, mask=weight_in, other=0.0)
    u = tl.load(w_ptr + up_at, mask=weight_in, other=0.0) if GATED else w
    if BIAS:
        bias = tl.load(bias_ptr + column, mask=column_in, other=0.0).to(tl.float32)
        if GATED:
            up_bias = tl.load(bias_ptr + outputs + column, mask=column_in, other=0.0).to(tl.float32)
    if NEXT:
        next_weight = tl.load(next_ptr + column, mask=column_in, other=0.0)
    wait_for_inputs(EARLY)
    if NORM:
        part = tl.arange(0, BLOCK_P)
        total = tl.zeros([BLOCK_P], dtype=tl.float32)
        for first in range(0, parts, BLOCK_P):
            total += tl.load(squares_ptr + first + part, mask=first + part < parts, other=0.0)
    if RESIDUAL:
        residual = tl.load(residual_ptr + column, mask=column_in, other=0.0)
    sums = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    ups = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        x = tl.load(x_ptr + start + k, mask=start + k < width, other=0.0).to(tl.float32)
        sums += w.to(tl.float32) * x[None, :]
        if GATED:
            ups += u.to(tl.float32) * x[None, :]
        next_in = (start + BLOCK_K + k < width)[None, :] & column_in[:, None]
        w = tl.load(w_ptr + start + BLOCK_K + weight_at, mask=next_in, other=0.0)
        u = tl.load(w_ptr + start + BLOCK_K + up_at, mask=next_in, other=0.0) if GATED else w
    let_next_start(EARLY)
    result = tl.sum(sums, axis=1)
    up = tl.sum(ups, axis=1) if GATED else result
    if NORM:
        size = tl.rsqrt(tl.sum(total, axis=0) / width + eps)
        result *= size
        up *= size
    if BIAS:
        result += bias
        if GATED:
            up += up_bias
    if ACTIVE:
        result = _activate(result, GELU)
    if GATED:
        result *= up
    if RESIDUAL:
        result += residual.to(tl.float32)
    element = out_ptr.dtype.element_ty
    tl.store(out_ptr + column, result.to(element), mask=column_in)
    if NEXT:
        stored = result.to(element).to(tl.float32)
        tl.store(scaled_ptr + column, (stored * next_weight).to(element), mask=column_in)
        tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.where(column_in, stored * stored, 0.0), axis=0))


@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, add_ptr, norm_ptr, next_ptr, out_ptr, scaled_ptr, sums_ptr, width, eps,
    NORM: tl.constexpr, ADD: tl.constexpr, NEXT: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    inside = k < width
    element = out_ptr.dtype.element_ty
    result = tl.load(x_ptr + row * width + k, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        weight = tl.load(norm_ptr + k, mask=inside, other=0.0)
        result = result * tl.rsqrt(tl.sum(result * result, axis=0) / width + eps) * weight
    if ADD:
        result = result.to(element).to(tl.float32)
        result += tl.load(add_ptr + row * width + k, mask=inside, other=0.0).to(tl.float32)
    let_next_start(EARLY)
    if NORM or ADD:
        tl.store(out_ptr + row * width + k, result.to(element), mask=inside)
    if NEXT:
        stored = result.to(element).to(tl.float32)
        scaled = stored * tl.load(next_ptr + k, mask=inside, other=0.0)
        tl.store(scaled_ptr + row * width + k, scaled.to(element), mask=inside)
        tl.store(sums_ptr + row, tl.sum(stored * stored, axis=0))


@dataclass(frozen=True)
class Tiles:
    """What one program of a product takes: output columns, its step along the width, warps, and loads in flight."""

    outputs: int
    width: int
    warps: int
    stages: int


def choose_tiles(rows: int, outputs: int, width: int, wide: bool) -> Tiles:
    """Tiles that measured well on an H100 (`benchmarks/linear_tiles.py`); ``wide``: products in fp32."""
    if rows == 1:
        if 1024 < width <= 2048 and outputs <= 4096:
            return Tiles(2, 2048, 4, 1)
        return Tiles(4, 1024, 4, 1) if outputs <= 4096 else Tiles(4 if outputs > 16384 else 8, 256, 4, 1)
    if wide:
        return Tiles(16, 32, 4, 2)
    if outputs > 16384:
        return Tiles(64, 64, 8 if rows > 32 else 4, 4 if rows > 32 else 3)
    if outputs > 4096:
        return Tiles(64, 128, 4, 4)
    if width > 1024:
        return Tiles(16, 256, 2 if rows <= 16 else 4, 4)
    return Tiles(16, 64, 2 if rows <= 16 else 4, 4)


def fit_tiles(tiles: Tiles, rows: int, gated: bool, itemsize: int, room: int) -> Tiles:
    """``tiles`` with fewer loads in flight, then shorter steps, until they fit ``room`` bytes of shared memory."""
    if rows == 1:
        return tiles  # in registers
    columns = max(16, triton.next_power_of_2(rows)) + tiles.outputs * (2 if gated else 1)
    while tiles.stages * columns * tiles.width * itemsize > room:
        if tiles.stages > 2:
            tiles = replace(tiles, stages=tiles.stages - 1)
        elif tiles.width > 32:
            tiles = replace(tiles, width=tiles.width // 2)
        else:
            break
    return tiles


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have; without a GPU, those of an H100."""
    if device.type != "cuda":
        return 227 * 1024
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 * 1024))


def linear(
    states: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    squares: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    next_norm: Tensor | None = None,
    cast: bool = False,
    tiles: Tiles | None = None,
) -> Rows:
    """``states @ weight.T``, and what comes before and behind it.

    Args:
        states: contiguous ``(rows, width)``, at most 64 rows.
        weight: contiguous ``(outputs, width)``; if ``gated``, gate and up ``(2 * outputs, width)``.
        bias: ``(outputs,)``, or as many as ``weight`` has rows.
        squares, eps: of :class:`Rows`, when ``states`` are rows scaled for a norm with this epsilon.
        residual: ``(rows, outputs)``, added last.
        activation: ``silu`` or ``gelu_pytorch_tanh``, of the product.
        gated: the result is ``activation(gate) * up``.
        next_norm: fp32 weight ``(outputs,)`` of the norm that comes next.
        cast: multiply in fp32, as Triton's interpreter must.
        tiles: chosen by the sizes when None.

    Returns:
        ``(rows, outputs)`` in the states' dtype, scaled for ``next_norm`` too.
    """
    rows, width = states.shape
    outputs = weight.shape[0] // (2 if gated else 1)
    if tiles is None:
        tiles = choose_tiles(rows, outputs, width, states.dtype == torch.float32 or cast)
        tiles = fit_tiles(tiles, rows, gated, states.element_size(), shared_memory(states.device))
    programs = triton.cdiv(outputs, tiles.outputs)
    out = _room(states, outputs, programs, next_norm is not None)
    flags = {
        "NORM": squares is not None,
        "BIAS": bias is not None,
        "RESIDUAL": residual is not None,
        "NEXT": next_norm is not None,
        "GATED": gated,
        "ACTIVE": activation is not None,
        "GELU": activation == "gelu_pytorch_tanh",
    }
    parts = 1 if squares is None else squares.shape[0]
    sizes = {"BLOCK_N": tiles.outputs, "BLOCK_K": tiles.width, "num_warps": tiles.warps, "num_stages": tiles.stages}
    pointers = states, weight, bias, squares, residual, next_norm, *out
    if rows == 1:
        _row_kernel[(programs,)](
            *pointers, outputs, width, parts, eps, **flags, **sizes, BLOCK_P=256, **early(states.device)
        )
    else:
        block_r = max(16, triton.next_power_of_2(rows))
        _linear_kernel[(programs,)](
            *pointers, rows, outputs, width, parts, eps, **flags, **sizes, BLOCK_R=block_r, BLOCK_P=32, CAST=cast,
            LINES=min(MOST_LINES, triton.next_power_of_2(triton.cdiv(width * weight.element_size(), LINE))),
            **early(states.device),
        )  # fmt: skip
    return out


def normed(
    states: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
    *,
    residual: Tensor | None = None,
    next_norm: Tensor | None = None,
) -> Rows:
    """Root mean square norm of ``states (rows, width)``, added to ``residual``, and scaled for the next norm.

    Without ``norm`` and ``residual`` the states are only scaled.
    """
    rows, width = states.shape
    out = _room(states, width, 1, next_norm is not None)
    if norm is None and residual is None:
        out = out._replace(states=states)
    _norm_kernel[(rows,)](
        states, residual, norm, next_norm, *out, width, eps,
        NORM=norm is not None, ADD=residual is not None, NEXT=next_norm is not None,
        BLOCK=triton.next_power_of_2(width), **early(states.device),
    )  # fmt: skip
    return out


def _room(states: Tensor, outputs: int, parts: int, scaled: bool) -> Rows:
    rows = states.shape[0]
    out = torch.empty(rows, outputs, dtype=states.dtype, device=states.device)
    if not scaled:
        return Rows(out)
    squares = torch.empty(parts, rows, dtype=torch.float32, device=states.device)
    return Rows(out, torch.empty_like(out), squares)
