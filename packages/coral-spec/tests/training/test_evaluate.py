"""Simulated acceptance equals what drafting position by position would accept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coral_spec.drafter import Drafter
from coral_spec.training import evaluate
from coral_spec.training.batches import Batch
from coral_spec.training.evaluate import count_accepted, simulate
from coral_spec.training.initialise import new_drafter
from tiny import tiny_target

DEPTH = 3


def setup() -> tuple[Drafter, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    drafter = new_drafter(tiny_target(), "random", 0)
    with torch.no_grad():
        drafter.fc.weight.copy_(torch.cat([torch.zeros(32, 32), torch.eye(32)], dim=1) + 0.2 * torch.randn(32, 64))
    features = torch.randn(2, 1, 32).expand(-1, 12, -1) + 0.1 * torch.randn(2, 12, 32)  # neighbours alike
    return drafter, features, torch.randn(2, 12, 32), torch.randn(6, 32)  # few head rows: some drafts are right


@torch.no_grad()
def one_by_one(drafter: Drafter, features: Tensor, embeddings: Tensor, head: Tensor, row: int, start: int) -> int:
    length = features.shape[1]
    fed = features[row : row + 1, : start + 1].clone()
    accepted = 0
    for node in range(start, min(start + DEPTH, length - 1)):
        keys = node + 1
        mask = torch.full((keys, keys), -torch.inf).triu(1)[None, None]
        positions = torch.arange(keys)[None]
        predicted = drafter(embeddings[row : row + 1, :keys], fed, positions, mask)[:, -1:]
        if int((predicted @ head.T).argmax()) != int((features[row, node + 1] @ head.T).argmax()):
            break
        accepted += 1
        fed = torch.cat([fed, predicted], dim=1)
    return accepted


def test_accepted_counts_equal_drafting_one_by_one() -> None:
    drafter, features, embeddings, head = setup()
    tokens = torch.zeros(2, 12, dtype=torch.long)
    found = count_accepted(drafter, lambda _: (features, embeddings), head, tokens, depth=DEPTH, chunk=5)
    wanted = [[one_by_one(drafter, features, embeddings, head, row, start) for start in range(12)] for row in (0, 1)]
    assert found.tolist() == wanted
    assert {0, DEPTH} <= set(found.flatten().tolist())  # the case tells something


def test_rounds_follow_one_another_and_rates_count_chains_still_right(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, *_ = setup()
    accepted = torch.tensor([[9, 2, 0, 0, 1, 0, 3, 3, 3, 3]])  # from index 1: +3, at 4: +2, at 6: +2 (the end)
    monkeypatch.setattr(evaluate, "count_accepted", lambda *_, **__: accepted)
    batch = Batch(torch.zeros(1, 10, dtype=torch.long), torch.tensor([1]), torch.tensor([7]))
    found = simulate(drafter, lambda _: None, torch.zeros(1, 1), [batch], depth=3, chunk=5)  # type: ignore[arg-type,return-value]
    assert found.rounds == 3
    assert found.tau == pytest.approx((3 + 2 + 2) / 3)
    # chains with room for 3: starts 1..5 accept 2, 0, 0, 1, 0
    assert found.rates == pytest.approx((2 / 5, 1 / 2, 0.0))
