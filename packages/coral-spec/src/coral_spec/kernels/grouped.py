"""The best tokens among some groups of head rows: two launches, and no row is read twice.

The head is permuted once, so that a group is one slab ``(rows, width)``. A program multiplies a tile of a slab that is
read with all nodes of a tree level at once - every weight that is read is read once - and writes the tile's logits to
scratch, once, with their largest and the sum of their exponentials. The second launch finds the best tiles of a node by
what is largest in each, and looks for the best tokens in those alone. The logits are few beside the weights and stay in
the level-2 cache; to keep only the best of every tile takes each program a round of maxima for every one of them, while
it loads nothing. Ours, for CORAL's grouped head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from coral_spec.kernels.launch import early, let_next_start, wait_for_inputs
from coral_spec.kernels.top import key_index, key_value, to_key

MANY = 2048 * 64  # rows that are read; with more of them tiles are larger, because one program looks at every tile
MISSING = tl.constexpr(-0x7FFFFFFFFFFFFFFF)  # smaller than every key
ROUNDS = tl.constexpr(16)  # of so many maxima a sort is not quicker


@triton.jit(do_not_specialize=["nodes", "tiles"])
def _tile_kernel(  # type: ignore[no-untyped-def]
    x_ptr, slabs_ptr, active_ptr, ids_ptr, logits_ptr, sums_ptr, nodes, rows, width, tiles,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IDS: tl.constexpr, CAST: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    tile, place = tl.program_id(0), tl.program_id(1)
    group = tl.load(active_ptr + place)
    node, column = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    row = tile * BLOCK_N + column
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
    tl.store(logits_ptr + at[:, None] * BLOCK_N + column[None, :], logits, mask=node_in[:, None])
    highest = tl.max(logits, axis=1)
    # A tile of empty places has no best one; its sum is 0 then, not exp(inf - inf).
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    tl.store(sums_ptr + 2 * at, highest, mask=node_in)
    tl.store(sums_ptr + 2 * at + 1, tl.sum(tl.exp(logits - shift[:, None]), axis=1), mask=node_in)


@triton.jit
def _best(keys, COUNT: tl.constexpr, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """``[K]`` of the keys in descending order, of which the first ``COUNT`` are the largest."""
    keys = tl.reshape(keys, [keys.numel])
    if COUNT <= ROUNDS:
        found = tl.full([K], MISSING, dtype=tl.int64)
        for place in range(COUNT):
            best = tl.max(keys, axis=0)
            found = tl.where(tl.arange(0, K) == place, best, found)
            keys = tl.where(keys == best, MISSING, keys)
    else:
        found = tl.topk(keys, K)
    return found


@triton.jit
def _index(keys):  # type: ignore[no-untyped-def]
    """The index in every key; -1 where it is missing."""
    return tl.where(keys == MISSING, -1, key_index(keys)).to(tl.int32)


@triton.jit(do_not_specialize=["tiles", "groups"])
def _join_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, sums_ptr, mass_ptr, active_ptr, ids_ptr, log_probs_ptr, tokens_ptr, rows, tiles, groups,
    COUNT: tl.constexpr, K: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    MASS: tl.constexpr, IDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    node = tl.program_id(0).to(tl.int64)
    group, tile = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_T)
    index = group[:, None] * tiles + tile[None, :]
    there = (group < groups)[:, None] & (tile < tiles)[None, :]
    at = node * groups * tiles + index
    highest = tl.load(sums_ptr + 2 * at, mask=there, other=float("-inf"))
    total = tl.load(sums_ptr + 2 * at + 1, mask=there, other=0.0)
    # From logits to log-probabilities, by what they are normalised with.
    top = tl.max(highest, axis=1)
    if not MASS:
        top = tl.full([BLOCK_G], tl.max(top, axis=0), dtype=tl.float32)
    sums = tl.sum(tl.where(total > 0, total * tl.exp(highest - top[:, None]), 0.0), axis=1)
    if MASS:
        mass = tl.load(mass_ptr + node * groups + group, mask=group < groups, other=0.0)
        offsets = mass - (top + tl.log(sums))
    else:
        offsets = -(top + tl.log(tl.sum(sums, axis=0)))
    # The COUNT best tiles hold the COUNT best places: what is largest in each of them comes before anything in the
    # other tiles. So it does where they are equal, because tiles are in the order of their places, and because adding
    # the same offset keeps the order of a tile.
    keys = tl.where(total > 0, to_key(highest + offsets[:, None], index), MISSING)
    chosen = _index(_best(keys, COUNT, K))
    offset = tl.sum(tl.where((chosen // tiles)[:, None] == group[None, :], offsets[None, :], 0.0), axis=1)
    place = chosen[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    first = node * groups * tiles * BLOCK_N
    logits = tl.load(logits_ptr + first + place, mask=(chosen >= 0)[:, None], other=float("-inf"))
    let_next_start(EARLY)
    best = _best(tl.where(logits > float("-inf"), to_key(logits + offset[:, None], place), MISSING), COUNT, K)
    chosen = _index(best)
    inside, span = tl.maximum(chosen, 0), tiles * BLOCK_N
    token = tl.load(active_ptr + inside // span) * rows + inside % span
    if IDS:
        token = tl.load(ids_ptr + token, mask=chosen >= 0, other=0)
    order = tl.arange(0, K)
    tl.store(log_probs_ptr + node * COUNT + order, key_value(best), mask=order < COUNT)
    tl.store(tokens_ptr + node * COUNT + order, token, mask=order < COUNT)


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


def choose_tiles(nodes: int, width: int, places: int, wide: bool) -> Tiles:
    """Tiles for an H100 (`benchmarks/grouped_head.py --tiles` tries others), two programs on a multiprocessor.

    Args:
        places: rows that are read.
        wide: products in fp32.
    """
    if wide:
        return Tiles(64, 32, 4, 2)
    if places > MANY:
        return Tiles(128, 64, 4, 4)
    return Tiles(64, 128, 4, 3) if nodes <= 32 and width >= 512 else Tiles(64, 64, 4, 4)


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
    chosen = tiles or choose_tiles(nodes, width, groups * rows, wide)
    slab_tiles = triton.cdiv(rows, chosen.rows)  # tiles of a slab
    logits = torch.empty(nodes, groups, slab_tiles, chosen.rows, dtype=torch.float32, device=device)
    sums = torch.empty(nodes, groups, slab_tiles, 2, dtype=torch.float32, device=device)
    _tile_kernel[(slab_tiles, groups)](
        features, slabs, active, ids, logits, sums, nodes, rows, width, slab_tiles,
        BLOCK_R=max(16, triton.next_power_of_2(nodes)), BLOCK_N=chosen.rows, BLOCK_K=chosen.depth,
        IDS=ids is not None, CAST=cast, num_warps=chosen.warps, num_stages=chosen.stages, **early(device),
    )  # fmt: skip
    log_probs = torch.empty(nodes, count, dtype=torch.float32, device=device)
    tokens = torch.empty(nodes, count, dtype=torch.int64, device=device)
    size, block_g = max(2, triton.next_power_of_2(count)), triton.next_power_of_2(groups)
    warps = 4 if count <= ROUNDS.value else 8  # with fewer, a sort takes most registers and long to compile
    _join_kernel[(nodes,)](
        logits, sums, log_mass, active, ids, log_probs, tokens, rows, slab_tiles, groups,
        COUNT=count, K=size, BLOCK_G=block_g, BLOCK_T=max(triton.next_power_of_2(slab_tiles), 2 * size // block_g),
        BLOCK_N=chosen.rows, MASS=log_mass is not None, IDS=ids is not None, num_warps=warps, **early(device),
    )  # fmt: skip
    return log_probs, tokens
