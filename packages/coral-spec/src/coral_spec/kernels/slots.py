"""Commit of an accepted path: all layers' keys and values in one launch. Ours."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from coral_spec.kernels.launch import early, let_next_start, wait_for_inputs


@triton.jit
def _move_kernel(  # type: ignore[no-untyped-def]
    pointers_ptr, lengths_ptr, path_ptr, capacity, count, like_ptr,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    states = tl.load(pointers_ptr + tl.program_id(0)).to(tl.pointer_type(like_ptr.dtype.element_ty))
    length = tl.load(lengths_ptr)
    place = tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    mask = (place < count)[:, None] & (d < SIZE)[None, :]
    source = tl.load(path_ptr + place, mask=place < count, other=0)
    row = (tl.program_id(1) * capacity + length) * SIZE
    moved = tl.load(states + row + source[:, None] * SIZE + d[None, :], mask=mask, other=0.0)
    let_next_start(EARLY)
    tl.debug_barrier()  # every row is read before one is overwritten
    tl.store(states + row + place[:, None] * SIZE + d[None, :], moved, mask=mask)


def move(pointers: Tensor, like: Tensor, lengths: Tensor, path: Tensor) -> None:
    """Copy slots ``lengths + path`` to ``lengths + 0, 1, ...`` in every buffer, in place.

    Args:
        pointers: int64 addresses ``(buffers,)`` of tensors that look like ``like``.
        like: ``(1, kv_heads, capacity, head_dim)``.
        lengths: ``(1,)`` int64.
        path: ``(count,)`` int64, rising.
    """
    _, heads, capacity, size = like.shape
    _move_kernel[(pointers.numel(), heads)](
        pointers, lengths, path, capacity, path.numel(), like,
        SIZE=size, BLOCK_D=triton.next_power_of_2(size), BLOCK_P=triton.next_power_of_2(path.numel()), num_warps=2,
        **early(like.device),
    )  # fmt: skip
