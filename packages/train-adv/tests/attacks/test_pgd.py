"""PGD: it climbs, stays inside, leaves the model alone, and is the same under the same generator."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expkit.errors import UsageError
from tiny_models import tiny_batch, tiny_net
from train_adv.attacks import losses
from train_adv.attacks.norms import L2, Linf
from train_adv.attacks.pgd import PGD, fgsm
from train_adv.modes import attack_twin


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    model = tiny_net(seed=3)
    images, labels = tiny_batch(128, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return float((model(images).argmax(1) == labels).float().mean())


def test_more_steps_are_a_stronger_attack(trained):
    images, labels = tiny_batch(64, seed=2)
    found = [
        accuracy(trained, PGD(0.2, 0.05, steps, start="none")(trained, images, labels), labels) for steps in (0, 2, 10)
    ]
    assert found[0] > 0.9 and found[0] >= found[1] >= found[2] and found[2] < 0.6


def test_one_step_is_fgsm_by_hand(trained):
    images, labels = tiny_batch(8)
    leaf = images.clone().requires_grad_()
    F.cross_entropy(trained(leaf), labels).backward()
    expected = (images + 0.1 * leaf.grad.sign()).clamp(0, 1)
    assert torch.allclose(fgsm(0.1)(trained, images, labels), expected, atol=1e-6)


def test_the_model_is_left_as_it_was(trained):
    model = copy.deepcopy(trained).train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    PGD(0.1)(model, *tiny_batch(8))
    assert model.training and model[4].training and not model[1].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_generator_decides_everything(trained):
    images, labels = tiny_batch(8)

    def run(seed: int) -> torch.Tensor:
        return PGD(0.1, restarts=2)(trained, images, labels, generator=torch.Generator().manual_seed(seed))

    first = run(1)
    torch.rand(5)
    assert torch.equal(first, run(1)) and not torch.equal(first, run(2))


def test_restarts_never_weaken(trained):
    images, labels = tiny_batch(64, seed=5)
    one = PGD(0.12, 0.05, 3)(trained, images, labels, generator=torch.Generator().manual_seed(0))
    many = PGD(0.12, 0.05, 3, restarts=5)(trained, images, labels, generator=torch.Generator().manual_seed(0))
    assert accuracy(trained, many, labels) <= accuracy(trained, one, labels)


def test_a_targeted_attack_reaches_its_targets(trained):
    images, labels = tiny_batch(32)
    targets = (labels + 1) % 4
    attack = PGD(0.5, 0.05, 30, norm=Linf())
    found = attack(trained, images, labels, losses.targeted_cross_entropy(targets), targets=targets)
    assert accuracy(trained, found, targets) > 0.9
    torch.manual_seed(0)
    first = attack(trained, images, labels, losses.targeted_cross_entropy(targets), targets=targets)
    torch.manual_seed(0)
    assert torch.equal(first, attack(trained, images, labels, targets=targets))  # the loss that targets want


def test_bf16_weights_leave_the_image_arithmetic_in_fp32(trained):
    """With the image in bf16, steps of 0.5/255 near 1 would vanish."""
    model = copy.deepcopy(trained).to(torch.bfloat16)
    images, labels = tiny_batch(8)
    found = PGD(2 / 255, 0.5 / 255, 8)(model, images, labels)
    assert found.dtype == torch.float32
    assert float((found - images).abs().max()) <= 2 / 255 + 1e-6
    assert len(((found - images).abs() * 255 * 2).round(decimals=3).unique()) > 5


def test_losses_are_what_they_say():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 1.0, 2.0]])
    labels = torch.tensor([0, 2])
    assert losses.cw_margin(logits, labels).tolist() == pytest.approx([-1.0, 2.0])
    assert losses.dlr(logits, labels).tolist() == pytest.approx([-(2 - 1) / 2.0, -(1 - 3) / 2.0])
    probabilities = torch.softmax(logits, 1)
    assert losses.kl_from(probabilities)(logits, labels).abs().max() < 1e-6
    assert (losses.kl_from(probabilities)(logits.flip(1), labels) > 0).all()


def test_a_twin_shares_storage_and_never_trains(trained):
    model = copy.deepcopy(trained).train()
    twin = attack_twin(model)
    images, labels = tiny_batch(8)
    with torch.no_grad():
        model[0].weight.add_(0.5)
        model[1].running_mean.add_(0.1)
    assert torch.equal(twin(images), model.eval()(images))
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    model.train()
    assert not twin.training
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    direct, through = (PGD(0.1)(m, images, labels, generator=g) for m, g in zip((model, twin), generators, strict=True))
    assert torch.equal(direct, through)


def test_l2_attacks_use_their_whole_ball(trained):
    images = torch.full((4, 3, 8, 8), 0.5)
    found = PGD(0.5, 0.2, 10, norm=L2())(trained, images, torch.zeros(4, dtype=torch.long))
    assert torch.allclose((found - images).flatten(1).norm(dim=1), torch.full((4,), 0.5), atol=1e-3)


@pytest.mark.parametrize("images", [torch.full((2, 3, 8, 8), 7.0), torch.full((2, 3, 8, 8), torch.nan)])
def test_images_outside_the_box_are_refused(images):
    with pytest.raises(UsageError, match=r"\[0, 1\]"):
        PGD(0.1, 0.1, 1)(tiny_net(), images, torch.zeros(2, dtype=torch.long))
