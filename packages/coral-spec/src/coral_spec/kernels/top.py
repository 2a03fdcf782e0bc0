"""The best tokens of each row of logits, and their log-probabilities, in two launches; the best alone in two as well.

A logit and its index are one 64-bit key that sorts by logit, ties to the smaller index: so sorting moves both at once.
Ours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from coral_spec.kernels.launch import early, let_next_start, wait_for_inputs

CHUNK, SHORT_CHUNK = 2048, 512  # columns of one program; the second where there are at most SHORT of them
SHORT = 16384


@triton.jit
def to_key(values, index):  # type: ignore[no-untyped-def]
    """int64 keys of fp32 values: larger value first, then smaller index."""
    bits = values.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def key_index(key):  # type: ignore[no-untyped-def]
    """The index in a key."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


@triton.jit
def key_value(key):  # type: ignore[no-untyped-def]
    """The fp32 value in a key."""
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _chunk_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, keys_ptr, sums_ptr, vocab, chunks, K: tl.constexpr, CHUNK: tl.constexpr, EARLY: tl.constexpr
):
    wait_for_inputs(EARLY)
    chunk, row = tl.program_id(0), tl.program_id(1)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logits_ptr + row.to(tl.int64) * vocab + index, mask=index < vocab, other=float("-inf"))
    logits = logits.to(tl.float32)
    keys = to_key(logits, index)
    let_next_start(EARLY)
    at = row * chunks + chunk
    if K == 1:
        tl.store(keys_ptr + at, tl.max(keys, axis=0))
    else:
        tl.store(keys_ptr + at * K + tl.arange(0, K), tl.topk(keys, K))
        best = tl.max(logits, axis=0)
        tl.store(sums_ptr + 2 * at, best)
        tl.store(sums_ptr + 2 * at + 1, tl.sum(tl.exp(logits - best), axis=0))


@triton.jit
def _join_kernel(  # type: ignore[no-untyped-def]
    keys_ptr, sums_ptr, ids_ptr, log_probs_ptr, tokens_ptr, chunks, count,
    K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, IDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    keys = tl.load(keys_ptr + row * chunks * K + lane, mask=lane < chunks * K, other=-0x7FFFFFFFFFFFFFFF)
    let_next_start(EARLY)
    if K == 1:
        tl.store(tokens_ptr + row, key_index(tl.max(keys, axis=0)))
    else:
        best = tl.topk(keys, K)
        chunk = tl.arange(0, BLOCK_C)
        highest = tl.load(sums_ptr + 2 * (row * chunks + chunk), mask=chunk < chunks, other=float("-inf"))
        sums = tl.load(sums_ptr + 2 * (row * chunks + chunk) + 1, mask=chunk < chunks, other=0.0)
        top = tl.max(highest, axis=0)
        total = top + tl.log(tl.sum(sums * tl.exp(highest - top), axis=0))
        place = tl.arange(0, K)
        token = key_index(best)
        if IDS:
            token = tl.load(ids_ptr + token)
        tl.store(log_probs_ptr + row * count + place, key_value(best) - total, mask=place < count)
        tl.store(tokens_ptr + row * count + place, token, mask=place < count)


def top_log_probs(logits: Tensor, count: int, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The ``count`` best of every row.

    Args:
        logits: ``(rows, vocab)``, contiguous.
        count: at most 64, and at most the vocabulary.
        ids: token id of every column, int64 ``(vocab,)``; the column itself when None.

    Returns:
        fp32 log-probabilities and int64 token ids, ``(rows, count)`` each, best first.
    """
    rows, vocab = logits.shape
    size = max(2, triton.next_power_of_2(count))
    chunk = SHORT_CHUNK if vocab <= SHORT else CHUNK
    chunks = triton.cdiv(vocab, chunk)
    device = logits.device
    keys = torch.empty(rows, chunks, size, dtype=torch.int64, device=device)
    sums = torch.empty(rows, chunks, 2, dtype=torch.float32, device=device)
    log_probs = torch.empty(rows, count, dtype=torch.float32, device=device)
    tokens = torch.empty(rows, count, dtype=torch.int64, device=device)
    _chunk_kernel[(chunks, rows)](logits, keys, sums, vocab, chunks, K=size, CHUNK=chunk, num_warps=4, **early(device))
    _join_kernel[(rows,)](
        keys, sums, ids, log_probs, tokens, chunks, count,
        K=size, BLOCK=triton.next_power_of_2(chunks * size), BLOCK_C=triton.next_power_of_2(chunks),
        IDS=ids is not None, num_warps=4, **early(device),
    )  # fmt: skip
    return log_probs, tokens


def largest(logits: Tensor) -> Tensor:
    """Index of the first largest logit of every row ``(rows, vocab)``: int64 ``(rows,)``."""
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, CHUNK)
    keys = torch.empty(rows, chunks, dtype=torch.int64, device=logits.device)
    launch = early(logits.device)
    _chunk_kernel[(chunks, rows)](logits, keys, None, vocab, chunks, K=1, CHUNK=CHUNK, num_warps=4, **launch)
    return join_largest(keys)


def join_largest(keys: Tensor) -> Tensor:
    """Index in the largest of every row's keys ``(rows, chunks)``: int64 ``(rows,)``."""
    rows, chunks = keys.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=keys.device)
    _join_kernel[(rows,)](
        keys, None, None, None, tokens, chunks, 1,
        K=1, BLOCK=triton.next_power_of_2(chunks), BLOCK_C=triton.next_power_of_2(chunks), IDS=False, num_warps=1,
        **early(keys.device),
    )  # fmt: skip
    return tokens
