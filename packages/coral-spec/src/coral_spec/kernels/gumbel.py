"""One sampled token for every node: noise, temperature and the largest sum of a chunk in one pass over the logits.

The noise of `coral_spec.sampling` depends on the position of a token alone, which all nodes of a level share: a program
makes a chunk of one level's noise once, in registers, and adds it to that level's rows. As operations of torch the
noise of seven levels, and 61 rows with it, are written and read several times. Ours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from coral_spec.kernels.launch import early, let_next_start, wait_for_inputs
from coral_spec.kernels.top import join_largest, to_key

CHUNK = 1024  # columns of one program
HOTTEST = 1e30  # a temperature above it draws uniformly as well, and its product with the noise is finite


@triton.jit
def _mix(state):  # type: ignore[no-untyped-def]
    """splitmix64's finaliser of uint64."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)


@triton.jit
def _gumbel(seed, position, index):  # type: ignore[no-untyped-def]
    """fp32 noise of the tokens `index`: `coral_spec.sampling.gumbel_noise`."""
    golden = tl.full((1,), 0x9E3779B97F4A7C15, tl.uint64)
    key = _mix(_mix(seed.to(tl.uint64) * golden) + position.to(tl.uint64) * golden)
    bits = _mix(key + index.to(tl.uint64) * golden) >> 32
    uniform = (bits.to(tl.int64).to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2**-32
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def _draw_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, depths_ptr, positions_ptr, seed_ptr, keys_ptr, rows, vocab, chunks, temperature,
    CHUNK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    chunk, level = tl.program_id(0), tl.program_id(1)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    noise = temperature * _gumbel(tl.load(seed_ptr), tl.load(positions_ptr + level), index)
    for row in range(rows):
        if tl.load(depths_ptr + row) == level:
            at = tl.cast(row, tl.int64) * vocab + index
            logits = tl.load(logits_ptr + at, mask=index < vocab, other=float("-inf"))
            keys = to_key(logits.to(tl.float32) + noise, index)
            tl.store(keys_ptr + row * chunks + chunk, tl.max(keys, axis=0))
    let_next_start(EARLY)


def draw(logits: Tensor, depths: Tensor, positions: Tensor, seed: Tensor, temperature: float) -> Tensor:
    """Where logits plus ``temperature`` times the noise are largest.

    Args:
        logits: ``(rows, vocab)``, contiguous; -inf where a token is never drawn.
        depths: int64 ``(rows,)``, index into ``positions``.
        positions: int64 ``(levels,)``, of the tokens to be drawn.
        seed: int64 ``(1,)``.
        temperature: above 0.

    Returns:
        token ids ``(rows,)``.
    """
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, CHUNK)
    keys = torch.empty(rows, chunks, dtype=torch.int64, device=logits.device)
    _draw_kernel[(chunks, len(positions))](
        logits, depths, positions, seed, keys, rows, vocab, chunks, min(temperature, HOTTEST),
        CHUNK=CHUNK, num_warps=4, **early(logits.device),
    )  # fmt: skip
    return join_largest(keys)
