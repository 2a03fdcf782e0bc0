"""What a drafter reads, in one launch: embeddings beside features, and positions. Ours."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from coral_spec.kernels.launch import early, let_next_start, wait_for_inputs


@triton.jit(do_not_specialize=["depth", "limit"])
def _inputs_kernel(  # type: ignore[no-untyped-def]
    tokens_ptr, table_ptr, features_ptr, above_ptr, lengths_ptr, out_ptr, positions_ptr, depth, limit, width, stride,
    scale, ABOVE: tl.constexpr, CHAIN: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    inside = k < width
    source = tl.load(above_ptr + row) if ABOVE else row.to(tl.int64)
    features = tl.load(features_ptr + source * stride + k, mask=inside)
    embedding = tl.load(table_ptr + tl.load(tokens_ptr + row) * width + k, mask=inside)
    if SCALED:
        embedding = (embedding.to(tl.float32) * scale).to(embedding.dtype)
    let_next_start(EARLY)
    tl.store(out_ptr + row * 2 * width + k, embedding, mask=inside)
    tl.store(out_ptr + row * 2 * width + width + k, features, mask=inside)
    position = tl.load(lengths_ptr) + depth + (row if CHAIN else 0)
    tl.store(positions_ptr + row, tl.minimum(position, limit - 1))


def gather_inputs(
    tokens: Tensor,
    table: Tensor,
    features: Tensor,
    above: Tensor | None,
    lengths: Tensor,
    *,
    depth: int | None,
    limit: int,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``cat([scale * table[tokens], features[above]])`` and positions.

    Args:
        tokens: ``(n,)`` int64.
        table: ``(vocab, width)``, contiguous.
        features: ``(m, width)``, rows contiguous; with ``m`` 1 and ``above`` None, the same for all tokens.
        above: ``(n,)`` int64, rows of ``features``; row by row when None.
        lengths: ``(1,)`` int64.
        depth: positions are ``lengths + depth``; None: ``lengths + 0, 1, ...``.
        limit: positions stay below it.
        scale: of the embeddings, a number of the table's dtype.

    Returns:
        ``(n, 2 * width)`` in the table's dtype, and int64 ``(n,)``.
    """
    count, width = tokens.numel(), table.shape[1]
    out = torch.empty(count, 2 * width, dtype=table.dtype, device=table.device)
    positions = torch.empty(count, dtype=torch.int64, device=table.device)
    stride = 0 if above is None and features.shape[0] == 1 else features.stride(0)
    _inputs_kernel[(count,)](
        tokens, table, features, above, lengths, out, positions, depth or 0, limit, width, stride, scale,
        ABOVE=above is not None, CHAIN=depth is None, SCALED=scale != 1.0, BLOCK=triton.next_power_of_2(width),
        **early(table.device),
    )  # fmt: skip
    return out, positions
