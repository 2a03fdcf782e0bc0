"""Tree attention of one layer: head norms, rotary embedding, cache write and masked attention in one launch.

The filled prefix is read for up to 64 rows at once - nodes times query heads of a key's head -, only as far as it is
filled (the length is read on the device, so one captured graph serves every length), split over programs; the one of
the prefix's end takes the new nodes too, whose keys it writes to the cache. The last program of a head to finish joins
the partial results in a fixed order, so the result does not depend on which one that is. Ours, after flash-decoding
(Dao et al., 2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from coral_spec.kernels.launch import LINE, early, let_next_start, prefetch_rows, wait_for_inputs


@triton.jit
def _load_heads(  # type: ignore[no-untyped-def]
    qkv_ptr, base, inside, positions, cos_ptr, sin_ptr, SIZE: tl.constexpr, HALF: tl.constexpr
):
    """Both halves ``[rows, HALF]`` of heads at ``base``, and what they are turned by."""
    d = tl.arange(0, HALF)
    at = base[:, None] + d[None, :]
    mask = inside[:, None] & (d < SIZE // 2)[None, :]
    first = tl.load(qkv_ptr + at, mask=mask, other=0.0)
    second = tl.load(qkv_ptr + at + SIZE // 2, mask=mask, other=0.0)
    turn = positions[:, None] * SIZE + d[None, :]
    cos = tl.load(cos_ptr + turn, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + turn + SIZE // 2, mask=mask, other=0.0)
    return first, second, cos, sin


@triton.jit
def _turn_heads(  # type: ignore[no-untyped-def]
    first, second, cos, sin, norm_ptr, eps, SIZE: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr
):
    """The halves normed and turned, in fp32."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        d = tl.arange(0, HALF)
        scale = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / SIZE + eps)[:, None]
        first *= scale * tl.load(norm_ptr + d, mask=d < SIZE // 2, other=0.0)[None, :]
        second *= scale * tl.load(norm_ptr + SIZE // 2 + d, mask=d < SIZE // 2, other=0.0)[None, :]
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _accumulate(scores, seen, value, best, total, result):  # type: ignore[no-untyped-def]
    """One step of the online softmax, base 2; rows that see nothing stay empty."""
    scores = tl.where(seen, scores, -1.0e30)
    higher = tl.maximum(best, tl.max(scores, axis=1))
    weights = tl.where(seen, tl.exp2(scores - higher[:, None]), 0.0)
    shrink = tl.exp2(best - higher)
    result = result * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return higher, total * shrink + tl.sum(weights, axis=1), result


@triton.jit(do_not_specialize=["rows", "offset", "splits", "least"])
def _attention_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr, cos_ptr, sin_ptr, query_norm_ptr, key_norm_ptr, positions_ptr, lengths_ptr, ancestors_ptr,
    keys_ptr, values_ptr, part_ptr, stats_ptr, counter_ptr, out_ptr, rows, offset, capacity, splits, least,
    scale, eps,
    GROUPS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, WINDOW: tl.constexpr,
    NORM: tl.constexpr, TREE: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, CAST: tl.constexpr, LINES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    # At short prefixes this kernel waits for memory alone, so everything is asked for as soon as its place is known.
    length = tl.load(lengths_ptr).to(tl.int32)
    head, split, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    blocks = tl.num_programs(2)
    stride: tl.constexpr = (GROUPS + 2) * KV_HEADS * SIZE
    dtype = tl.float32 if CAST else keys_ptr.dtype.element_ty
    query = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    node, query_in = query // GROUPS, query < rows * GROUPS
    own_head = head * GROUPS + query % GROUPS
    position = tl.load(positions_ptr + node, mask=query_in, other=0)
    new = tl.arange(0, BLOCK_S)
    new_position = tl.load(positions_ptr + new, mask=new < rows, other=0)
    width = offset + rows
    d, half = tl.arange(0, 2 * HALF), tl.arange(0, HALF)
    filled = length + offset
    low = tl.maximum(length - WINDOW + 1, 0) if WINDOW > 0 else length * 0
    # A short prefix takes few programs, since joining their results costs more than it brings.
    chunk = tl.maximum(tl.cdiv(tl.cdiv(filled - low, splits), BLOCK_N), least) * BLOCK_N
    active = tl.maximum(tl.cdiv(filled - low, chunk), 1)
    if split < active:
        begin = low + split * chunk
        end = tl.minimum(begin + chunk, filled)
        if EARLY:
            prefetch_rows(keys_ptr, head * capacity + begin, head * capacity + end, SIZE, BLOCK_N, LINES)
            prefetch_rows(values_ptr, head * capacity + begin, head * capacity + end, SIZE, BLOCK_N, LINES)
        q_first, q_second, q_cos, q_sin = _load_heads(
            qkv_ptr, node * stride + own_head * SIZE, query_in, position, cos_ptr, sin_ptr, SIZE, HALF
        )
        last = split == active - 1
        new_in = new < tl.where(last, rows, 0)
        base = new * stride + (GROUPS * KV_HEADS + head) * SIZE
        new_first, new_second, new_cos, new_sin = _load_heads(
            qkv_ptr, base, new_in, new_position, cos_ptr, sin_ptr, SIZE, HALF
        )
        value_mask = new_in[:, None] & (d < SIZE)[None, :]
        new_value = tl.load(qkv_ptr + base[:, None] + KV_HEADS * SIZE + d[None, :], mask=value_mask, other=0.0)
        pair_in = query_in[:, None] & new_in[None, :]
        new_seen = tl.load(ancestors_ptr + node[:, None] * width + offset + new[None, :], mask=pair_in, other=0)

        q_first, q_second = _turn_heads(q_first, q_second, q_cos, q_sin, query_norm_ptr, eps, SIZE, HALF, NORM)
        q_first, q_second = (q_first * scale).to(dtype), (q_second * scale).to(dtype)
        best = tl.full([BLOCK_Q], -1.0e30, dtype=tl.float32)
        total = tl.zeros([BLOCK_Q], dtype=tl.float32)
        result = tl.zeros([BLOCK_Q, 2 * HALF], dtype=tl.float32)
        for start in range(begin, end, BLOCK_N):
            slot = start + tl.arange(0, BLOCK_N)
            slot_in = slot < end
            at = (head * capacity + slot) * SIZE
            k_mask = slot_in[None, :] & (half < SIZE // 2)[:, None]
            k_first = tl.load(keys_ptr + at[None, :] + half[:, None], mask=k_mask, other=0.0)
            k_second = tl.load(keys_ptr + at[None, :] + SIZE // 2 + half[:, None], mask=k_mask, other=0.0)
            value = tl.load(
                values_ptr + at[:, None] + d[None, :], mask=slot_in[:, None] & (d < SIZE)[None, :], other=0.0
            )
            seen = slot_in[None, :] & query_in[:, None]
            if TREE:
                behind = slot - length
                own = tl.load(
                    ancestors_ptr + node[:, None] * width + behind[None, :],
                    mask=seen & (behind >= 0)[None, :], other=0,
                )  # fmt: skip
                seen = seen & ((behind < 0)[None, :] | (own != 0))
            scores = tl.dot(q_first, k_first.to(dtype), input_precision="ieee")
            scores = tl.dot(q_second, k_second.to(dtype), scores, input_precision="ieee")
            if WINDOW > 0:
                seen = seen & (position[:, None] - slot[None, :] < WINDOW)
            best, total, result = _accumulate(scores, seen, value.to(dtype), best, total, result)
        if last:
            k_first, k_second = _turn_heads(
                new_first, new_second, new_cos, new_sin, key_norm_ptr, eps, SIZE, HALF, NORM
            )
            if block == 0:
                at = (head * capacity + filled + new) * SIZE
                k_mask = new_in[:, None] & (half < SIZE // 2)[None, :]
                element = keys_ptr.dtype.element_ty
                tl.store(keys_ptr + at[:, None] + half[None, :], k_first.to(element), mask=k_mask)
                tl.store(keys_ptr + at[:, None] + SIZE // 2 + half[None, :], k_second.to(element), mask=k_mask)
                tl.store(values_ptr + at[:, None] + d[None, :], new_value, mask=value_mask)
            scores = tl.dot(q_first, tl.trans(k_first.to(dtype)), input_precision="ieee")
            scores = tl.dot(q_second, tl.trans(k_second.to(dtype)), scores, input_precision="ieee")
            seen = pair_in & (new_seen != 0)
            if WINDOW > 0:
                seen = seen & (position[:, None] - new_position[None, :] < WINDOW)
            best, total, result = _accumulate(scores, seen, new_value.to(dtype), best, total, result)

        let_next_start(EARLY)
        pair = head * blocks + block
        lane = tl.arange(0, BLOCK_Q)
        complete = active == 1
        if active > 1:
            part = (pair * splits + split) * BLOCK_Q
            tl.store(part_ptr + (part + lane)[:, None] * (2 * HALF) + d[None, :], result)
            tl.store(stats_ptr + 2 * part + lane, best)
            tl.store(stats_ptr + 2 * part + BLOCK_Q + lane, total)
            tl.debug_barrier()  # all of this program's stores come before its count
            if tl.atomic_add(counter_ptr + pair, 1) == active - 1:
                best = tl.full([BLOCK_Q], -1.0e30, dtype=tl.float32)
                total = tl.zeros([BLOCK_Q], dtype=tl.float32)
                result = tl.zeros([BLOCK_Q, 2 * HALF], dtype=tl.float32)
                for one in range(active):
                    its = (pair * splits + one) * BLOCK_Q
                    its_best = tl.load(stats_ptr + 2 * its + lane, cache_modifier=".cg")
                    its_total = tl.load(stats_ptr + 2 * its + BLOCK_Q + lane, cache_modifier=".cg")
                    its_result = tl.load(
                        part_ptr + (its + lane)[:, None] * (2 * HALF) + d[None, :], cache_modifier=".cg"
                    )
                    higher = tl.maximum(best, its_best)
                    mine, theirs = tl.exp2(best - higher), tl.exp2(its_best - higher)
                    total = total * mine + its_total * theirs
                    result = result * mine[:, None] + its_result * theirs[:, None]
                    best = higher
                tl.store(counter_ptr + pair, 0)  # ready for the next launch
                complete = active > 1
        if complete:
            result = result / tl.where(total > 0.0, total, 1.0)[:, None]
            out_at = (node * (GROUPS * KV_HEADS) + own_head) * SIZE
            out_mask = query_in[:, None] & (d < SIZE)[None, :]
            tl.store(out_ptr + out_at[:, None] + d[None, :], result.to(out_ptr.dtype.element_ty), mask=out_mask)


@dataclass(frozen=True)
class Blocks:
    """What one program of the attention takes.

    Attributes:
        queries: rows: nodes times query heads of a key's head.
        keys: a step along the prefix.
        warps, stages: of the program; loads in flight.
        least: steps that a program takes at least, since joining results costs more than a short walk.
        splits: most programs over a prefix.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    least: int
    splits: int


def choose_blocks(rows: int, kv_heads: int, size: int, capacity: int, wide: bool) -> Blocks:
    """Blocks that measured well on an H100 (`benchmarks/tree_attention.py`); ``wide``: fp32."""
    # Few queries a program are soonest done; over a long prefix reading the keys for many at once pays.
    queries = 16
    if kv_heads * triton.cdiv(rows, queries) * capacity > 110_000:
        queries = min(64, max(16, triton.next_power_of_2(rows)))
    programs = kv_heads * triton.cdiv(rows, queries)
    most = triton.next_power_of_2(triton.cdiv(capacity, 128))
    splits = max(1, min(64, most, max(8, triton.next_power_of_2(264 // programs))))
    return Blocks(queries, 32 if size > 128 or wide else 64, 4, 2, 2, splits)


def attend(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    lengths: Tensor,
    ancestors: Tensor,
    keys: Tensor,
    values: Tensor,
    counter: Tensor,
    *,
    offset: int,
    scaling: float,
    window: int | None = None,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
    blocks: Blocks | None = None,
    cast: bool = False,
) -> Tensor:
    """Attended heads ``(nodes, heads * head_dim)``; the nodes' keys and values are written to the cache.

    Args:
        qkv: ``(nodes, (heads + 2 * kv_heads) * head_dim)``, as projected.
        cos, sin: rotary tables ``(positions, head_dim)`` of `coral_spec.layers.Rope`.
        positions: ``(nodes,)`` int64.
        lengths: ``(1,)`` int64: filled prefix.
        ancestors: bool ``(nodes, offset + nodes)``, contiguous.
        keys, values: ``(1, kv_heads, capacity, head_dim)``.
        counter: int32 zeros ``(1024,)``, left as zeros; one for each stream of launches.
        offset: slots behind the prefix held by earlier nodes of the same tree.
        scaling: of the scores.
        window: a query sees keys fewer than this many positions back.
        query_norm, key_norm, eps: head norms, fp32 weights ``(head_dim,)``.
        blocks: chosen by the sizes when None.
        cast: multiply in fp32, as Triton's interpreter must.
    """
    kv_heads, capacity, size = keys.shape[1:]
    nodes = qkv.shape[0]
    heads = qkv.shape[1] // size - 2 * kv_heads
    groups = heads // kv_heads
    half = max(16, triton.next_power_of_2(size // 2))
    if blocks is None:
        blocks = choose_blocks(nodes * groups, kv_heads, size, capacity, qkv.dtype == torch.float32)
    programs = kv_heads, blocks.splits, triton.cdiv(nodes * groups, blocks.queries)
    parts = math.prod(programs)
    device = qkv.device
    part = torch.empty(parts, blocks.queries, 2 * half, dtype=torch.float32, device=device)
    stats = torch.empty(parts, 2, blocks.queries, dtype=torch.float32, device=device)
    out = torch.empty(nodes, heads * size, dtype=qkv.dtype, device=device)
    _attention_kernel[programs](
        qkv, cos, sin, query_norm, key_norm, positions, lengths, ancestors.view(torch.uint8),
        keys, values, part, stats, counter, out, nodes, offset, capacity,
        blocks.splits, blocks.least, scaling * 1.4426950408889634, eps,
        GROUPS=groups, KV_HEADS=kv_heads, SIZE=size, HALF=half, WINDOW=window or 0,
        NORM=query_norm is not None, TREE=offset > 0,
        BLOCK_Q=blocks.queries, BLOCK_N=blocks.keys,
        BLOCK_S=max(16, triton.next_power_of_2(nodes)), CAST=cast,
        LINES=triton.next_power_of_2(triton.cdiv(size * keys.element_size(), LINE)),
        num_warps=blocks.warps, num_stages=blocks.stages, **early(device),
    )  # fmt: skip
    return out
