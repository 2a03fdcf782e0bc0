"""The best tokens among some groups of head rows, whose logits are never written: two launches.

The head is permuted once, so that a group is one slab ``(rows, width)``. A program multiplies a tile of a slab that is
read with all nodes of a tree level at once - every weight that is read is read once - and keeps the best of its tile
and their log-sum-exp; the second launch joins the tiles of a node. Ours, for CORAL's grouped head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from coral_spec.kernels.launch import early, let_next_start, wait_for_inputs
from coral_spec.kernels.top import key_index, key_value, to_key

JOINED = 2048  # keys that one program joins


@triton.jit
def _keep_best(keys, out_ptr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The ``COUNT`` largest of every row of ``keys [rows, columns]``, to ``out_ptr[:, None] + 0, 1, ...``."""
    for place in tl.static_range(COUNT):
        best = tl.max(keys, axis=1)
        tl.store(out_ptr + place, best)
        keys = tl.where(keys == best[:, None], -0x7FFFFFFFFFFFFFFF, keys)


@triton.jit(do_not_specialize=["nodes", "tiles"])
def _tile_kernel(  # type: ignore[no-untyped-def]
    x_ptr, slabs_ptr, active_ptr, ids_ptr, keys_ptr, sums_ptr, nodes, rows, width, tiles,
    COUNT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IDS: tl.constexpr,
    CAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    tile, place = tl.program_id(0), tl.program_id(1)
    group = tl.load(active_ptr + place)
    node = tl.arange(0, BLOCK_R)
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    node_in, row_in = node < nodes, row < rows
    if IDS:
        row_in = row_in & (tl.load(ids_ptr + group * rows + row, mask=row_in, other=-1) >= 0)
    logits = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    slab_ptr = slabs_ptr + group * rows * width
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_in = k < width
        x = tl.load(x_ptr + node[:, None] * width + k[None, :], mask=node_in[:, None] & k_in[None, :], other=0.0)
        w = tl.load(
            slab_ptr + row[None, :].to(tl.int64) * width + k[:, None],
            mask=k_in[:, None] & (row < rows)[None, :],
            other=0.0,
        )
        if CAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        logits = tl.dot(x, w, logits, input_precision="ieee")
    let_next_start(EARLY)
    logits = tl.where(row_in[None, :], logits, float("-inf"))
    at = (node * tl.num_programs(1) + place) * tiles + tile
    highest = tl.max(logits, axis=1)
    # A tile of empty places has no best one; its sum is 0 then, not 0 * exp(inf).
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    tl.store(sums_ptr + 2 * at, shift, mask=node_in)
    tl.store(sums_ptr + 2 * at + 1, tl.sum(tl.exp(logits - shift[:, None]), axis=1), mask=node_in)
    keys = tl.where(row_in[None, :], to_key(logits, (place * rows + row)[None, :]), -0x7FFFFFFFFFFFFFFF)
    # Rows behind the last node write to a node's place that is thrown away.
    spare = tl.where(node_in, at, nodes * tl.num_programs(1) * tiles)
    _keep_best(keys, keys_ptr + spare * COUNT, COUNT)


@triton.jit(do_not_specialize=["tiles", "groups", "held"])
def _join_kernel(  # type: ignore[no-untyped-def]
    keys_ptr, sums_ptr, mass_ptr, active_ptr, ids_ptr, joined_ptr, log_probs_ptr, tokens_ptr,
    rows, tiles, groups, held, share,
    COUNT: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr,
    MASS: tl.constexpr, IDS: tl.constexpr, SCALED: tl.constexpr, LAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    node, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    place = part * share + lane
    inside = (lane < share) & (place < held)
    keys = tl.load(keys_ptr + node * held + place, mask=inside, other=-0x7FFFFFFFFFFFFFFF)
    if SCALED:
        # From logits to log-probabilities, by what they are normalised with.
        group, tile = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_T)
        at = 2 * ((node * groups + group[:, None]) * tiles + tile[None, :])
        there = (group < groups)[:, None] & (tile < tiles)[None, :]
        shift = tl.load(sums_ptr + at, mask=there, other=float("-inf"))
        total = tl.load(sums_ptr + at + 1, mask=there, other=0.0)
        shift = tl.where(total > 0, shift, float("-inf"))
        top = tl.max(shift, axis=1)
        if MASS:
            sums = tl.sum(tl.where(total > 0, total * tl.exp(shift - top[:, None]), 0.0), axis=1)
            mass = tl.load(mass_ptr + node * groups + group, mask=group < groups, other=0.0)
            offsets = mass - (top + tl.log(sums))
            offset = tl.zeros([BLOCK], dtype=tl.float32)
            for one in range(groups):
                its = tl.sum(tl.where(group == one, offsets, 0.0), axis=0)
                offset = tl.where(place // (tiles * COUNT) == one, its, offset)
        else:
            highest = tl.max(top, axis=0)
            sums = tl.sum(tl.where(total > 0, total * tl.exp(shift - highest), 0.0), axis=1)
            offset = tl.zeros([BLOCK], dtype=tl.float32) - (highest + tl.log(tl.sum(sums, axis=0)))
        keys = tl.where(keys == -0x7FFFFFFFFFFFFFFF, keys, to_key(key_value(keys) + offset, key_index(keys)))
    let_next_start(EARLY)
    best = tl.topk(keys, K)
    order = tl.arange(0, K)
    kept = order < COUNT
    if LAST:
        index = key_index(best)
        if IDS:
            slab = tl.load(active_ptr + index // rows, mask=kept, other=0)
            token = tl.load(ids_ptr + slab * rows + index % rows, mask=kept, other=0)
        else:
            token = tl.load(active_ptr + index // rows, mask=kept, other=0) * rows + index % rows
        tl.store(log_probs_ptr + node * COUNT + order, key_value(best), mask=kept)
        tl.store(tokens_ptr + node * COUNT + order, token, mask=kept)
    else:
        tl.store(joined_ptr + (node * tl.num_programs(1) + part) * COUNT + order, best, mask=kept)


@dataclass(frozen=True)
class Tiles:
    """What one program of the product takes.

    Attributes:
        rows: of a slab.
        depth: of the width, a step.
        warps, stages: of the program; loads in flight.
    """

    rows: int
    depth: int
    warps: int
    stages: int


def choose_tiles(nodes: int, width: int, count: int, wide: bool) -> Tiles:
    """Tiles that fit; ``wide``: fp32."""
    rows = 64 if wide or nodes > 32 or count > 16 else 128
    return Tiles(rows, 32 if wide else 128 if width >= 1024 else 64, 4, 2 if wide else 4)


def grouped_top(
    features: Tensor,
    slabs: Tensor,
    active: Tensor,
    count: int,
    *,
    ids: Tensor | None = None,
    log_mass: Tensor | None = None,
    tiles: Tiles | None = None,
    cast: bool = False,
) -> tuple[Tensor, Tensor]:
    """The best tokens among the active slabs.

    Log-probabilities are over all rows that were read, or, with ``log_mass``, those of the group and of the row within
    it together. Ties go to the smaller place.

    Args:
        features: contiguous ``(nodes, width)``, at most 64 nodes.
        slabs: contiguous ``(groups, rows, width)``, the permuted head.
        active: int64 ``(k,)``, distinct groups.
        count: at most 64, and at most the tokens of the active slabs.
        ids: int64 ``(groups, rows)``: the token of every place, -1 where it is empty; without it places are tokens,
            counted through all slabs.
        log_mass: fp32 ``(nodes, k)``, log-probabilities of the active groups.
        tiles: chosen by the sizes when None.
        cast: multiply in fp32, as Triton's interpreter must.

    Returns:
        fp32 log-probabilities and int64 token ids, ``(nodes, count)`` each, best first.
    """
    nodes, width = features.shape
    rows, groups = slabs.shape[1], active.numel()
    device, wide = features.device, cast or features.dtype == torch.float32
    size = max(2, triton.next_power_of_2(count))
    chosen = tiles or choose_tiles(nodes, width, count, wide)
    slab_tiles = triton.cdiv(rows, chosen.rows)  # tiles of a slab
    held = groups * slab_tiles * count  # keys of a node
    keys = torch.empty(nodes * held + count, dtype=torch.int64, device=device)
    sums = torch.empty(nodes, groups * slab_tiles, 2, dtype=torch.float32, device=device)
    _tile_kernel[(slab_tiles, groups)](
        features, slabs, active, ids, keys, sums, nodes, rows, width, slab_tiles,
        COUNT=count, BLOCK_R=max(16, triton.next_power_of_2(nodes)), BLOCK_N=chosen.rows, BLOCK_K=chosen.depth,
        IDS=ids is not None, CAST=cast, num_warps=chosen.warps, num_stages=chosen.stages, **early(device),
    )  # fmt: skip
    log_probs = torch.empty(nodes, count, dtype=torch.float32, device=device)
    tokens = torch.empty(nodes, count, dtype=torch.int64, device=device)
    options = {
        "COUNT": count, "K": size, "BLOCK_G": triton.next_power_of_2(groups), "IDS": ids is not None,
        "BLOCK_T": triton.next_power_of_2(slab_tiles), **early(device),
    }  # fmt: skip
    parts = triton.cdiv(held, JOINED)
    if parts == 1:
        _join_kernel[(nodes, 1)](
            keys, sums, log_mass, active, ids, None, log_probs, tokens, rows, slab_tiles, groups, held, held,
            BLOCK=max(2 * size, triton.next_power_of_2(held)), MASS=log_mass is not None, SCALED=True, LAST=True,
            **options,
        )  # fmt: skip
        return log_probs, tokens
    joined = torch.empty(nodes, parts, count, dtype=torch.int64, device=device)
    _join_kernel[(nodes, parts)](
        keys, sums, log_mass, active, ids, joined, None, None, rows, slab_tiles, groups, held, JOINED,
        BLOCK=JOINED, MASS=log_mass is not None, SCALED=True, LAST=False, **options,
    )  # fmt: skip
    held = parts * count
    _join_kernel[(nodes, 1)](
        joined, sums, log_mass, active, ids, None, log_probs, tokens, rows, slab_tiles, groups, held, held,
        BLOCK=max(2 * size, triton.next_power_of_2(held)), MASS=False, SCALED=False, LAST=True, **options,
    )  # fmt: skip
    return log_probs, tokens
