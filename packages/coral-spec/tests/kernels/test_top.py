"""The best tokens of a row: what torch finds, ties to the smaller index."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("rows", "vocab", "count"), [(1, 259, 1), (3, 2048, 4), (4, 5000, 10), (2, 300, 3)])
def test_top_log_probs_are_those_of_torch(rows, vocab, count):
    from coral_spec.kernels.top import top_log_probs

    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)).to(DEVICE) * 5
    log_probs, tokens = top_log_probs(logits, count)
    best = logits.log_softmax(dim=-1).topk(count, dim=-1)
    torch.testing.assert_close(log_probs, best.values)
    assert torch.equal(tokens, best.indices)


def test_columns_of_a_reduced_head_become_token_ids():
    from coral_spec.kernels.top import top_log_probs

    logits, ids = torch.tensor([[0.0, 3.0, -1.0, 2.0]], device=DEVICE), torch.tensor([70, 10, 40, 20], device=DEVICE)
    assert top_log_probs(logits, 2, ids)[1].tolist() == [[10, 20]]


def test_the_largest_is_the_first_of_equals_and_may_be_negative():
    from coral_spec.kernels.top import largest

    logits = torch.full((2, 5000), -7.5, device=DEVICE)
    logits[1, [4000, 4321]] = -2.25
    assert largest(logits).tolist() == [0, 4000]
