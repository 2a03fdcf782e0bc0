"""The bookkeeping of a draft tree, one launch a step: growing a level, choosing what is verified, following draws.

Each kernel is one program: a tree has a few hundred candidates. Ours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from coral_spec.kernels.launch import early, let_next_start, wait_for_inputs
from coral_spec.kernels.top import key_index, key_value, to_key


@triton.jit(do_not_specialize=["first", "slots"])
def _extend_kernel(  # type: ignore[no-untyped-def]
    log_probs_ptr, children_ptr, scores_ptr, chosen_ptr, ancestors_ptr,
    pool_tokens_ptr, pool_scores_ptr, pool_parents_ptr, first,
    next_tokens_ptr, next_scores_ptr, next_chosen_ptr, above_ptr, next_ancestors_ptr, slots,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_S: tl.constexpr, LAST: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    lane = tl.arange(0, BLOCK)
    inside = lane < WIDTH * WIDTH
    parent = lane // WIDTH
    totals = tl.load(log_probs_ptr + lane, mask=inside, other=0.0) + tl.load(
        scores_ptr + parent, mask=inside, other=0.0
    )
    tokens = tl.load(children_ptr + lane, mask=inside, other=0)
    let_next_start(EARLY)
    tl.store(pool_tokens_ptr + first + lane, tokens, mask=inside)
    tl.store(pool_scores_ptr + first + lane, totals, mask=inside)
    tl.store(pool_parents_ptr + first + lane, tl.load(chosen_ptr + parent, mask=inside, other=0), mask=inside)
    if not LAST:
        best = tl.topk(tl.where(inside, to_key(totals, lane), -0x7FFFFFFFFFFFFFFF), BLOCK_W)
        place = tl.arange(0, BLOCK_W)
        kept = place < WIDTH
        index = tl.where(kept, key_index(best), 0).to(tl.int32)
        above = index // WIDTH
        tl.store(next_tokens_ptr + place, tl.load(children_ptr + index, mask=kept, other=0), mask=kept)
        tl.store(next_scores_ptr + place, key_value(best), mask=kept)
        tl.store(next_chosen_ptr + place, (first + index).to(tl.int64), mask=kept)
        tl.store(above_ptr + place, above.to(tl.int64), mask=kept)
        slot = tl.arange(0, BLOCK_S)
        seen = tl.load(
            ancestors_ptr + above[:, None] * slots + slot[None, :],
            mask=kept[:, None] & (slot < slots)[None, :],
            other=0,
        )
        own = slot[None, :] == slots + place[:, None]
        tl.store(
            next_ancestors_ptr + place[:, None] * (slots + WIDTH) + slot[None, :],
            tl.where(own, 1, seen),
            mask=kept[:, None] & (slot < slots + WIDTH)[None, :],
        )


@triton.jit(do_not_specialize=["pool", "budget", "depth"])
def _rerank_kernel(  # type: ignore[no-untyped-def]
    tokens_ptr, scores_ptr, parents_ptr, root_ptr, slot_ptr,
    out_tokens_ptr, out_parents_ptr, depths_ptr, ancestors_ptr, pool, budget, depth,
    BLOCK_P: tl.constexpr, BLOCK_B: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    lane = tl.arange(0, BLOCK_P)
    scores = tl.load(scores_ptr + lane, mask=lane < pool, other=0.0)
    keys = tl.where(lane < pool, to_key(scores, lane), -0x7FFFFFFFFFFFFFFF)
    best = tl.topk(keys, BLOCK_B)
    place = tl.arange(0, BLOCK_B)
    kept = place < budget
    # The pool is ordered by level, so sorting by index puts parents before their children.
    index = tl.sort(tl.where(kept, key_index(best), 0x7FFFFFFF))
    index = tl.where(kept, index, 0)
    let_next_start(EARLY)
    tl.store(slot_ptr + index + 1, place + 1, mask=kept)
    tl.store(slot_ptr, 0)
    tl.debug_barrier()
    above = tl.load(parents_ptr + index, mask=kept, other=-1)
    parent = tl.load(slot_ptr + above + 1, mask=kept, other=0)
    tl.store(out_tokens_ptr + 1 + place, tl.load(tokens_ptr + index, mask=kept, other=0), mask=kept)
    tl.store(out_parents_ptr + 1 + place, parent.to(tl.int64), mask=kept)
    tl.store(out_tokens_ptr, tl.load(root_ptr))
    tl.store(out_parents_ptr, tl.zeros((), dtype=tl.int64))
    tl.debug_barrier()
    slot = tl.arange(0, BLOCK_B)
    width = budget + 1
    walker = tl.where(slot < width, slot, 0)
    other = tl.arange(0, BLOCK_B)
    seen = walker[:, None] == other[None, :]
    depths = tl.zeros([BLOCK_B], dtype=tl.int64)
    for _ in range(depth):
        depths += (walker > 0).to(tl.int64)
        walker = tl.load(out_parents_ptr + walker).to(tl.int32)
        seen = seen | (walker[:, None] == other[None, :])
    tl.store(depths_ptr + slot, depths, mask=slot < width)
    at = slot[:, None] * width + other[None, :]
    tl.store(ancestors_ptr + at, seen.to(tl.uint8), mask=(slot < width)[:, None] & (other < width)[None, :])


@triton.jit(do_not_specialize=["slots", "levels"])
def _accept_kernel(  # type: ignore[no-untyped-def]
    tokens_ptr, parents_ptr, depths_ptr, valid_ptr, draws_ptr, path_ptr, packed_ptr, slots, levels,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    slot = tl.arange(0, BLOCK)
    inside = slot < slots
    token = tl.load(tokens_ptr + slot, mask=inside, other=-1)
    parent = tl.load(parents_ptr + slot, mask=inside, other=0)
    wanted = tl.load(draws_ptr + parent, mask=inside, other=-2)
    matches = (slot == 0) | (inside & (token == wanted) & (tl.load(valid_ptr + slot, mask=inside, other=0) != 0))
    walker, accepted = slot, matches
    for _ in range(levels):
        walker = tl.load(parents_ptr + walker, mask=inside, other=0).to(tl.int32)
        up_token = tl.load(tokens_ptr + walker)
        up_parent = tl.load(parents_ptr + walker)
        up_valid = tl.load(valid_ptr + walker) != 0
        up = (walker == 0) | ((up_token == tl.load(draws_ptr + up_parent)) & up_valid)
        accepted = accepted & up
    depth = tl.load(depths_ptr + slot, mask=inside, other=0)
    level = tl.arange(0, BLOCK_D)
    # Siblings differ, so at most one accepted node stands at a level.
    on_path = accepted[None, :] & (depth[None, :] == level[:, None]) & inside[None, :]
    path = tl.sum(tl.where(on_path, slot[None, :], 0), axis=1)
    within = level <= levels
    let_next_start(EARLY)
    tl.store(path_ptr + level, path.to(tl.int64), mask=within)
    tl.store(packed_ptr + 1 + level, tl.load(draws_ptr + path, mask=within, other=0), mask=within)
    tl.store(packed_ptr, tl.sum((accepted & inside).to(tl.int64), axis=0))


def extend(
    log_probs: Tensor,
    children: Tensor,
    scores: Tensor,
    chosen: Tensor,
    ancestors: Tensor,
    pool: tuple[Tensor, Tensor, Tensor],
    first: int,
    last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Add a level to the pool and choose the nodes that are expanded next: see `coral_spec.tree.Pool.extend`.

    Args:
        log_probs, children: ``(width, width)``, of the frontier's children.
        scores, chosen: ``(width,)``, of the frontier: cumulative log-probabilities, indices in the pool.
        ancestors: bool ``(width, slots)``.
        pool: tokens, scores, parents ``(1, capacity)``, written from ``first`` on.
        last: nothing is expanded afterwards; what is returned is then undefined.
    """
    width, slots = ancestors.shape
    tokens, below, index, above = (torch.empty_like(chosen) for _ in range(4))
    below = torch.empty_like(scores)
    grown = torch.empty(width, slots + width, dtype=torch.bool, device=scores.device)
    _extend_kernel[(1,)](
        log_probs, children, scores, chosen, ancestors.view(torch.uint8), *pool, first,
        tokens, below, index, above, grown.view(torch.uint8), slots,
        WIDTH=width, BLOCK=max(2, triton.next_power_of_2(width * width)), BLOCK_W=max(2, triton.next_power_of_2(width)),
        BLOCK_S=triton.next_power_of_2(slots + width), LAST=last, num_warps=4,
        **early(scores.device),
    )  # fmt: skip
    return tokens, below, index, above, grown


def rerank(
    pool: tuple[Tensor, Tensor, Tensor], root: Tensor, budget: int, depth: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, parents, depths ``(1, budget + 1)`` and ancestors of the best candidates: see `Pool.rerank`."""
    device, size, width = root.device, pool[0].shape[1], budget + 1
    tokens, parents, depths = (torch.empty(1, width, dtype=torch.int64, device=device) for _ in range(3))
    ancestors = torch.empty(1, width, width, dtype=torch.bool, device=device)
    slot = torch.empty(size + 1, dtype=torch.int32, device=device)
    block = max(2, triton.next_power_of_2(width))
    _rerank_kernel[(1,)](
        *pool, root, slot, tokens, parents, depths, ancestors.view(torch.uint8), size, budget, depth,
        BLOCK_P=max(block, triton.next_power_of_2(size)), BLOCK_B=block, num_warps=4,
        **early(device),
    )  # fmt: skip
    return tokens, parents, depths, ancestors


def accept(
    tokens: Tensor, parents: Tensor, depths: Tensor, valid: Tensor, draws: Tensor, depth: int
) -> tuple[Tensor, Tensor]:
    """Path ``(1, depth + 1)``, and count and emitted tokens ``(1, depth + 2)``: see `coral_spec.tree.accept`."""
    slots = tokens.shape[1]
    path = torch.empty(1, depth + 1, dtype=torch.int64, device=tokens.device)
    packed = torch.empty(1, depth + 2, dtype=torch.int64, device=tokens.device)
    _accept_kernel[(1,)](
        tokens, parents, depths, valid.view(torch.uint8), draws, path, packed, slots, depth,
        BLOCK=max(2, triton.next_power_of_2(slots)), BLOCK_D=max(2, triton.next_power_of_2(depth + 1)), num_warps=1,
        **early(tokens.device),
    )  # fmt: skip
    return path, packed
