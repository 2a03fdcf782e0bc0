"""Products of a few rows with a large weight: bound by reading the weight once. Norm, gate and residual are fused in.

Each program owns some output columns for all rows and walks along the width; the weight is read exactly once, the
rows come from the cache. The norm needs no pass of its own: its weight multiplies the row on the way in, and the
row's size, summed along the walk, divides the result. Ours.
"""

from __future__ import annotations

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

    Returns:
        ``(rows, outputs)`` in the states' dtype.
    """
    rows, width = states.shape
    outputs = weight.shape[0] // (2 if activation else 1)
    out = torch.empty(rows, outputs, dtype=states.dtype, device=states.device)
    block_r = max(16, triton.next_power_of_2(rows))
    # Enough programs to fill the machine, each with a long run of the weight in flight.
    block_n = 16 if outputs <= 4096 else 64
    wide = states.dtype == torch.float32 or cast
    block_k = 32 if wide else 64 if block_n == 64 or block_r == 64 else 128
    _linear_kernel[(triton.cdiv(outputs, block_n),)](
        states, weight, bias, norm, residual, out, rows, outputs, width, eps,
        NORM=norm is not None, BIAS=bias is not None, RESIDUAL=residual is not None,
        GATED=activation is not None, GELU=activation == "gelu_pytorch_tanh",
        BLOCK_R=block_r, BLOCK_N=block_n, BLOCK_K=block_k, CAST=cast,
        num_warps=4, num_stages=2 if wide else 4,
    )  # fmt: skip
    return out


def norm(states: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Root mean square norm of ``states (rows, width)``, added to ``residual`` if there is one."""
    rows, width = states.shape
    out = torch.empty_like(states)
    _norm_kernel[(rows,)](
        states, residual, weight, out, width, eps, ADD=residual is not None, BLOCK=triton.next_power_of_2(width)
    )
    return out
