"""The chunked loss equals the plain one, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from coral_spec.training.config import LossConfig, OptimizerConfig
from coral_spec.training.losses import LossParts, draft_loss
from coral_spec.training.schedule import learning_rate, loss_weights

POSITIONS, WIDTH, VOCAB = 13, 8, 40


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    predicted, features = (2 * torch.randn(POSITIONS, WIDTH, generator=generator) for _ in range(2))
    return predicted.requires_grad_(), features, torch.randn(VOCAB, WIDTH, generator=generator)


def plain(predicted: Tensor, features: Tensor, head: Tensor, weights: tuple[float, float, float]) -> list[Tensor]:
    target, log_draft = torch.softmax(features @ head.T, -1), torch.log_softmax(predicted @ head.T, -1)
    feature = functional.smooth_l1_loss(predicted, features, reduction="none").mean(-1).sum()
    every = -(target * log_draft)
    top = every.gather(-1, target.topk(10).indices).sum()
    parts = [feature, every.sum(), top]
    return [sum(w * part for w, part in zip(weights, parts, strict=True)), *parts]  # type: ignore[list-item]


def chunked(
    predicted: Tensor, features: Tensor, head: Tensor, weights: tuple[float, float, float], chunk: int
) -> LossParts:
    return draft_loss(predicted, features, head, weights=weights, top_k=10, scale=0.5, chunk=chunk)


@pytest.mark.parametrize("weights", [(1.0, 0.1, 0.0), (1.0, 0.1, 1.0), (0.0, 0.0, 0.7), (0.3, 1.0, 0.0)])
@pytest.mark.parametrize("chunk", [4, 13, 100])
def test_value_and_gradient_equal_the_plain_loss(weights: tuple[float, float, float], chunk: int) -> None:
    predicted, features, head = tensors()
    expected = plain(predicted, features, head, weights)
    (0.5 * expected[0]).backward()
    wanted, predicted.grad = predicted.grad, None
    found = chunked(predicted, features, head, weights, chunk)
    (2 * found.total / 2).backward()
    assert wanted is not None and predicted.grad is not None
    assert torch.allclose(predicted.grad, wanted, atol=1e-6)
    assert torch.allclose(found.total, 0.5 * expected[0], rtol=1e-5)
    assert torch.allclose(found.feature, 0.5 * expected[1], rtol=1e-5)
    assert torch.allclose(found.soft, 0.5 * expected[2], rtol=1e-5)
    assert torch.allclose(found.top, 0.5 * expected[3] if weights[2] else torch.tensor(0.0), rtol=1e-5)


def test_known_top_tokens_are_not_searched_again() -> None:
    predicted, features, head = tensors()
    first = draft_loss(predicted, features, head, weights=(1, 0.1, 1), top_k=10, scale=1, chunk=5)
    again = draft_loss(
        predicted, features, head, weights=(1, 0.1, 1), top_k=10, scale=1, chunk=4, top_ids=first.top_ids
    )
    assert torch.allclose(first.total, again.total)


def test_a_perfect_draft_agrees_everywhere_and_has_the_target_entropy() -> None:
    _, features, head = tensors()
    found = chunked(features.clone().requires_grad_(), features, head, (1.0, 0.1, 1.0), 4)
    assert found.agreed == 0.5 * POSITIONS
    assert found.feature == 0
    entropy = -(torch.softmax(features @ head.T, -1) * torch.log_softmax(features @ head.T, -1)).sum()
    assert torch.allclose(found.soft, 0.5 * entropy, rtol=1e-5)


def test_no_tensor_of_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    predicted, features, head = tensors()
    sizes: list[int] = []
    original = torch.softmax

    def watched(logits: Tensor, *args: object, **kwargs: object) -> Tensor:
        sizes.append(len(logits))
        return original(logits, *args, **kwargs)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(torch, "softmax", watched)
    chunked(predicted, features, head, (1.0, 0.1, 1.0), 4).total.backward()  # type: ignore[no-untyped-call]
    assert sizes == [4, 4, 4, 1]


def test_the_rate_rises_then_falls() -> None:
    config = OptimizerConfig(lr=1.0, warmup=0.1, schedule="linear", final=0.1)
    rates = [learning_rate(config, progress) for progress in (0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([0.5, 1.0, 0.55, 0.1])
    assert learning_rate(OptimizerConfig(lr=1.0, schedule="cosine"), 1.0) == pytest.approx(0)
    assert learning_rate(OptimizerConfig(lr=1.0, schedule="constant"), 0.7) == 1.0
    assert learning_rate(OptimizerConfig(lr=1.0), 0.0) > 0


def test_the_top_part_counts_from_its_share_of_the_run_on() -> None:
    config = LossConfig(top=2.0, top_from=0.8)
    assert loss_weights(config, 0.79) == (1.0, 1.0, 0.0)
    assert loss_weights(config, 0.8) == (1.0, 1.0, 2.0)
