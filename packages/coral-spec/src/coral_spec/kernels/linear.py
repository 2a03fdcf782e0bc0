"""Products of a few rows with a large weight: bound by reading the weight once. Norm, gate and residual are fused in.

Each program owns some output columns for all rows and walks along the width; the weight is read exactly once, the
rows come from the cache. The norm needs no pass of its own: its weight multiplies the row on the way in, and the
row's size, summed along the walk, divides the result. Ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _activate(gate, GELU: tl.constexpr):  # type: ignore[no-untyped-def]
    if GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(2.0 * inner)  # 0.5 * (1 + tanh(inner)) is sigmoid(2 * inner)
    return gate * tl.sigmoid(gate)


@triton.jit
def _linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, bias_ptr, norm_ptr, residual_ptr, out_ptr, rows, outputs, width, eps,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_R)
    row_in, column_in = row < rows, column < outputs
    result = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    up = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    squares = tl.zeros([BLOCK_R], dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_in = k < width
        x = tl.load(x_ptr + row[:, None] * width + k[None, :], mask=row_in[:, None] & k_in[None, :], other=0.0)
        weight_at = column[None, :].to(tl.int64) * width + k[:, None]
        weight_in = k_in[:, None] & column_in[None, :]
        w = tl.load(w_ptr + weight_at, mask=weight_in, other=0.0)
        if NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            scaled = wide * tl.load(norm_ptr + k, mask=k_in, other=0.0)[None, :]
            x = scaled.to(x_ptr.dtype.element_ty)
        if CAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        result = tl.dot(x, w, result, input_precision="ieee")
        if GATED:
            w = tl.load(w_ptr + outputs.to(tl.int64) * width + weight_at, mask=weight_in, other=0.0)
            if CAST:
                w = w.to(tl.float32)
            up = tl.dot(x, w, up, input_precision="ieee")
    if NORM:
        scale = tl.rsqrt(squares / width + eps)[:, None]
        result *= scale
        up *= scale
    if BIAS:
        result += tl.load(bias_ptr + column, mask=column_in, other=0.0).to(tl.float32)[None, :]
    if GATED:
        result = _activate(result, GELU) * up
    at = row[:, None] * outputs + column[None, :]
    inside = row_in[:, None] & column_in[None, :]
    if RESIDUAL:
        result += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _row_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, bias_ptr, norm_ptr, residual_ptr, out_ptr, outputs, width, eps,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same for one row: no matrix unit, so all threads share the walk along the width."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_in = column < outputs
    sums = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    ups = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    squares = tl.zeros([BLOCK_K], dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_in = k < width
        weight_at = column[:, None].to(tl.int64) * width + k[None, :]
        weight_in = k_in[None, :] & column_in[:, None]
        w = tl.load(w_ptr + weight_at, mask=weight_in, other=0.0, eviction_policy="evict_first")
        if GATED:
            u = tl.load(
                w_ptr + outputs.to(tl.int64) * width + weight_at, mask=weight_in, other=0.0,
                eviction_policy="evict_first",
            )  # fmt: skip
        x = tl.load(x_ptr + k, mask=k_in, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + k, mask=k_in, other=0.0)
        sums += w.to(tl.float32) * x[None, :]
        if GATED:
            ups += u.to(tl.float32) * x[None, :]
    result = tl.sum(sums, axis=1)
    up = tl.sum(ups, axis=1) if GATED else result
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
        result *= scale
        up *= scale
    if BIAS:
        result += tl.load(bias_ptr + column, mask=column_in, other=0.0).to(tl.float32)
    if GATED:
        result = _activate(result, GELU) * up
    if RESIDUAL:
        result += tl.load(residual_ptr + column, mask=column_in, other=0.0).to(tl.float32)
    tl.store(out_ptr + column, result.to(out_ptr.dtype.element_ty), mask=column_in)


@triton.jit
def _norm_kernel(x_ptr, add_ptr, norm_ptr, out_ptr, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    inside = k < width
    x = tl.load(x_ptr + row * width + k, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(norm_ptr + k, mask=inside, other=0.0)
    normed = (x * tl.rsqrt(tl.sum(x * x) / width + eps) * weight).to(out_ptr.dtype.element_ty)
    if ADD:
        normed = normed.to(tl.float32) + tl.load(add_ptr + row * width + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + k, normed.to(out_ptr.dtype.element_ty), mask=inside)


def linear(
    states: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    activation: str | None = None,
    cast: bool = False,
    tiles: Tiles | None = None,
) -> Tensor:
    """``norm(states) @ weight.T``, and what comes before and behind it.

    Args:
        states: contiguous ``(rows, width)``, at most 64 rows.
        weight: contiguous ``(outputs, width)``; with ``activation``, gate and up ``(2 * outputs, width)``.
        bias: ``(outputs,)``.
        norm, eps: weight ``(width,)`` in fp32 and epsilon of a root mean square norm.
        residual: ``(rows, outputs)``, added.
        activation: ``silu`` or ``gelu_pytorch_tanh``: the result is ``activation(gate) * up``.
        cast: multiply in fp32, as Triton's interpreter must.
        tiles: chosen by the sizes when None.

    Returns:
        ``(rows, outputs)`` in the states' dtype.
    """
    rows, width = states.shape
    outputs = weight.shape[0] // (2 if activation else 1)
    out = torch.empty(rows, outputs, dtype=states.dtype, device=states.device)
    flags = {
        "NORM": norm is not None,
        "BIAS": bias is not None,
        "RESIDUAL": residual is not None,
        "GATED": activation is not None,
        "GELU": activation == "gelu_pytorch_tanh",
    }
    tiles = tiles or choose_tiles(rows, outputs, width, states.dtype == torch.float32 or cast)
    grid = (triton.cdiv(outputs, tiles.outputs),)
    sizes = {"BLOCK_N": tiles.outputs, "BLOCK_K": tiles.width, "num_warps": tiles.warps, "num_stages": tiles.stages}
    pointers = states, weight, bias, norm, residual, out
    if rows == 1:
        _row_kernel[grid](*pointers, outputs, width, eps, **flags, **sizes)
    else:
        block_r = max(16, triton.next_power_of_2(rows))
        _linear_kernel[grid](*pointers, rows, outputs, width, eps, **flags, **sizes, BLOCK_R=block_r, CAST=cast)
    return out


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
        return Tiles(4 if outputs <= 8192 else 8, min(1024, triton.next_power_of_2(width)), 4, 1)
    if wide:
        return Tiles(16, 32, 4, 2)
    if outputs > 8192:
        return Tiles(64, 64, 4, 4)
    return Tiles(16, 64 if rows > 32 else 128, 4, 4)


def norm(states: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Root mean square norm of ``states (rows, width)``, added to ``residual`` if there is one."""
    rows, width = states.shape
    out = torch.empty_like(states)
    _norm_kernel[(rows,)](
        states, residual, weight, out, width, eps, ADD=residual is not None, BLOCK=triton.next_power_of_2(width)
    )
    return out
