"""Which groups of head rows a tree level reads, in one launch behind the router's own products. Ours."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from coral_spec.kernels.launch import early, let_next_start, wait_for_inputs
from coral_spec.kernels.top import key_index, to_key


@triton.jit(do_not_specialize=["nodes", "always", "active"])
def _choose_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, paths_ptr, scratch_ptr, chosen_ptr, mass_ptr, nodes, groups, always, active,
    PATHS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_A: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    node, group = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_G)
    node_in, group_in = node < nodes, group < groups
    inside = node_in[:, None] & group_in[None, :]
    at = node[:, None] * groups + group[None, :]
    logits = tl.load(logits_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
    highest = tl.where(node_in, tl.max(logits, axis=1), 0.0)
    total = tl.where(node_in, tl.sum(tl.exp(logits - highest[:, None]), axis=1), 1.0)
    log_probs = logits - (highest + tl.log(total))[:, None]
    tl.store(scratch_ptr + at, log_probs, mask=inside)
    weighted = log_probs
    if PATHS:
        weighted += tl.load(paths_ptr + node, mask=node_in, other=0.0)[:, None]
    weighted = tl.where(inside, weighted, float("-inf"))
    top = tl.where(group_in, tl.max(weighted, axis=0), 0.0)
    mass = top + tl.log(tl.sum(tl.exp(weighted - top[None, :]), axis=0))
    let_next_start(EARLY)
    free = group_in & (group >= always)
    best = tl.topk(tl.where(free, to_key(mass, group), -0x7FFFFFFFFFFFFFFF), BLOCK_A)
    place = tl.arange(0, BLOCK_A)
    index = tl.sort(tl.where(place < active, key_index(best), 0x7FFFFFFF))
    kept = place < active
    index = tl.where(kept, index, 0)
    width = always + active
    tl.store(chosen_ptr + always + place, index, mask=kept)
    tl.store(chosen_ptr + group, group.to(tl.int64), mask=group < always)
    tl.debug_barrier()  # the log-probabilities are read by other threads than wrote them
    gathered = tl.load(scratch_ptr + node[:, None] * groups + index[None, :], mask=node_in[:, None] & kept[None, :])
    tl.store(
        mass_ptr + node[:, None] * width + always + place[None, :], gathered, mask=node_in[:, None] & kept[None, :]
    )
    tl.store(mass_ptr + node[:, None] * width + group[None, :], log_probs, mask=inside & (group < always)[None, :])


def choose(logits: Tensor, paths: Tensor | None, always: int, active: int) -> tuple[Tensor, Tensor]:
    """The groups that a level reads, and their log-probabilities: see `coral_spec.router.choose_groups`.

    Args:
        logits: of all groups, contiguous ``(nodes, groups)``; one program holds them, so there are not to be many.
        paths: fp32 ``(nodes,)``, log-probabilities of the nodes' paths; None for equal weights.
        always: leading groups, which are read in any case.
        active: how many of the others, at least 1.

    Returns:
        int64 ``(always + active,)``, ascending, and fp32 ``(nodes, always + active)``.
    """
    nodes, groups = logits.shape
    device = logits.device
    scratch = torch.empty(nodes, groups, dtype=torch.float32, device=device)
    chosen = torch.empty(always + active, dtype=torch.int64, device=device)
    mass = torch.empty(nodes, always + active, dtype=torch.float32, device=device)
    block_a = max(2, triton.next_power_of_2(active))
    _choose_kernel[(1,)](
        logits, paths, scratch, chosen, mass, nodes, groups, always, active,
        PATHS=paths is not None, BLOCK_R=triton.next_power_of_2(nodes),
        BLOCK_G=max(2 * block_a, triton.next_power_of_2(groups)), BLOCK_A=block_a, num_warps=4, **early(device),
    )  # fmt: skip
    return chosen, mass
