"""Baselines: each trains in the harness, and does what its paper says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from expkit.errors import UsageError
from pden.baselines import BASELINES, Ada, AugMix, MeAda, RandAugment, RandConv, build_baseline, operations
from pden.baselines.ada import entropy
from pden.baselines.operations import NAMES, dirichlet, operate, posterize_strongly, random_operation
from pden.baselines.randconv import convolved
from pden.losses import jensen_shannon
from pden.models import build_model
from pden.training.stream import Stream
from tiny_domains import finish, tiny_domain, tiny_trainer, weights

CPU = torch.device("cpu")


def pictures(seed: int = 0) -> torch.Tensor:
    draw = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return (draw * 200 + 20).round() / 255


def apply(name: str, images: torch.Tensor, strength: float) -> torch.Tensor:
    count = len(images)
    return operate(images, torch.full((count,), NAMES.index(name)), torch.full((count,), strength))


def pillow(images: torch.Tensor, function) -> torch.Tensor:
    arrays = [(each.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy() for each in images]
    made = [torch.from_numpy(np.array(function(Image.fromarray(each)))) for each in arrays]
    return torch.stack(made).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("method", BASELINES)
def test_every_baseline_trains_in_the_harness(method):
    trainer = tiny_trainer(method=method)
    if trainer.baseline.growth:
        trainer.baseline.growth = (2, 8)
    assert finish(trainer) == ["pretrained", "round", "round"]
    assert trainer.pool == [] and torch.isfinite(weights(trainer)).all()
    assert trainer.clock.total == trainer.planned_steps == 6 + 2 * 6
    grows = {"ada", "me-ada"}
    assert (trainer.grown is None) == (method not in grows)


def test_ada_doubles_the_pool_before_the_steps_it_names():
    trainer = tiny_trainer(method="ada")
    trainer.baseline.growth = (2, 8)
    finish(trainer, 2)
    assert trainer.grown is None
    finish(trainer, 1)
    assert len(trainer.grown[0]) == len(trainer.source)
    finish(trainer)
    assert torch.equal(trainer.grown[1], trainer.source.labels.repeat(3))
    copies, of_copies = trainer.grown[0][:60], trainer.grown[0][120:]
    assert not torch.equal(copies, of_copies) and (copies - of_copies).abs().mean() < 0.2


def adversary(method: Ada) -> tuple[torch.Tensor, torch.Tensor, torch.nn.Module, torch.Tensor]:
    trainer = tiny_trainer(method="erm", pretrain_steps=6, rounds=0)
    finish(trainer)
    images, labels = trainer.source.batch(torch.arange(12))
    return images, method.worst(trainer.task.eval(), images, labels), trainer.task, labels


def test_adas_copies_are_worse_for_the_model_and_nearer_with_a_larger_gamma():
    images, free, model, labels = adversary(Ada(gamma=0.0, lr=50.0))
    near = adversary(Ada(gamma=3.0, lr=50.0))[1]
    cost = torch.nn.functional.cross_entropy
    assert cost(model(free), labels) > cost(model(images), labels) + 0.1
    assert 0 <= free.min() and free.max() <= 1
    there = model.full(images).features
    assert (model.full(near).features - there).norm() < (model.full(free).features - there).norm()


def test_me_adas_copies_have_more_entropy():
    _, plain, model, _ = adversary(Ada(gamma=0.0, lr=50.0))
    spread = adversary(MeAda(gamma=0.0, lr=50.0))[1]
    assert entropy(model(spread)).mean() > entropy(model(plain)).mean()
    assert float(entropy(torch.zeros(1, 4))) == pytest.approx(math.log(4))


def test_jensen_shannon_is_the_naive_one():
    logits = torch.randn(3, 5, 4)
    total = 0.0
    for image in range(5):
        views = [logits[view, image].softmax(0).tolist() for view in range(3)]
        middle = [sum(each) / 3 for each in zip(*views, strict=True)]
        total += sum(p * math.log(p / m) for view in views for p, m in zip(view, middle, strict=True)) / 3
    assert float(jensen_shannon(logits)) == pytest.approx(total / 5, rel=1e-4)
    assert float(jensen_shannon(logits[:1].expand(3, -1, -1))) == pytest.approx(0, abs=1e-6)


def test_augmix_stays_in_range_and_mixes_by_image():
    images = pictures()
    made = AugMix().mixed(images, 2, Stream(CPU, 1))
    assert made.shape == (2, *images.shape) and not torch.equal(made[0], made[1])
    assert made.min() >= -1e-6 and made.max() <= 1 + 1e-6
    assert torch.equal(made, AugMix().mixed(images, 2, Stream(CPU, 1)))


def test_dirichlet_weights_sum_to_one():
    drawn = dirichlet(1000, 3, torch.Generator().manual_seed(0), CPU)
    assert torch.allclose(drawn.sum(1), torch.ones(1000)) and torch.allclose(
        drawn.mean(0), torch.full((3,), 1 / 3), atol=0.03
    )


def test_a_random_convolution_keeps_the_scale_of_the_image():
    images = torch.rand(64, 3, 16, 16)
    spreads = [RandConv(kernels=(3,)).convolved(images, Stream(CPU, seed)).std() for seed in range(30)]
    assert 0.1 < float(torch.stack(spreads).mean()) < 0.6
    assert RandConv(kernels=(7,)).convolved(images, Stream(CPU, 0)).shape == images.shape


def test_randaugment_without_magnitude_changes_no_geometry():
    model = build_model("digits", classes=3, size=16, width=0.1)
    images, labels = tiny_domain(6).batch(torch.arange(6))
    method = RandAugment(magnitude=0.0)
    assert torch.isfinite(method.loss(model, method.views(images, Stream(CPU, 0)), labels))


@pytest.mark.parametrize(
    ("name", "function", "within"),
    [
        ("autocontrast", ImageOps.autocontrast, 0.01),
        ("equalize", ImageOps.equalize, 0.03),
        ("posterize", lambda each: ImageOps.posterize(each, 6), 0.001),
        ("solarize", lambda each: ImageOps.solarize(each, 128), 0.01),
    ],
)
def test_photometric_operations_are_pillows(name, function, within):
    images = torch.rand(3, 3, 64, 64).square().mul(200).round() / 255
    assert torch.allclose(apply(name, images, 0.5), pillow(images, function), atol=within)


def test_geometric_operations_move_as_far_as_they_say():
    image = torch.zeros(3, 1, 12, 12)
    image[:, :, 5, 2] = 1
    moved = apply("translate_x", image, -0.5)  # a sixth of the image: two pixels
    assert moved[0, 0, 5, 4] == pytest.approx(1, abs=1e-4)
    smooth = torch.linspace(0, 1, 16).expand(2, 1, 16, 16)
    turned = apply("rotate", smooth, 1.0)[0, 0]
    slope = (turned[8, 9] - turned[8, 8], turned[9, 8] - turned[8, 8])
    assert math.degrees(math.atan2(-float(slope[1]), float(slope[0]))) == pytest.approx(30, abs=0.1)
    sheared = apply("shear_y", smooth.mT, 1.0)[0, 0]
    assert float((sheared[8, 9] - sheared[8, 8]) / (sheared[9, 8] - sheared[8, 8])) == pytest.approx(0.3, abs=1e-3)


def test_each_image_gets_an_operation_of_its_own():
    images = pictures()[:1].expand(64, -1, -1, -1)
    made = random_operation(images, 0.8, torch.Generator().manual_seed(0))
    assert len({each.numpy().tobytes() for each in made}) > len(NAMES)
    assert made.min() >= 0 and made.max() <= 1


def test_an_unknown_method_is_refused():
    with pytest.raises(UsageError, match="use pden, erm, randaugment"):
        build_baseline("magic")


def test_a_step_of_ada_is_the_published_one():
    """Up the mean loss of 32 images less their mean squared distance, on pixels in [0, 1]; cut to them at the end."""
    trainer = tiny_trainer(method="erm", pretrain_steps=6, rounds=0)
    finish(trainer)
    images, labels = trainer.source.batch(torch.arange(8))
    for method, eta in ((Ada(steps=2, lr=30.0, gamma=0.5), 0.0), (MeAda(steps=2, lr=30.0, gamma=0.5), 10.0)):
        model, expected = trainer.task.eval(), images.clone()
        anchor = model.full(images).features.detach()
        for _ in range(2):
            expected.requires_grad_()
            seen = model.full(expected)
            cost = torch.nn.functional.cross_entropy(seen.logits, labels, reduction="sum")
            chances = seen.logits.softmax(dim=1)
            spread = -(chances * chances.log()).sum()
            loss = (cost + eta * spread - 0.5 * (seen.features - anchor).square().mean(dim=1).sum()) / 32
            expected = expected.detach() + 30.0 * torch.autograd.grad(loss, expected)[0]
        assert torch.allclose(method.worst(model, images, labels), expected.clamp(0, 1), atol=1e-4)


def test_the_defaults_are_the_published_ones():
    assert (Ada().gamma, Ada().lr, Ada().steps, Ada().eta, Ada().growth) == (1.0, 1.0, 15, 0.0, (100, 200, 300))
    assert (MeAda().eta, MeAda().gamma, MeAda().steps) == (10.0, 1.0, 15)
    assert (AugMix().weight, AugMix().chains, AugMix().depth, AugMix().magnitude) == (12.0, 3, 3, 0.3)
    assert (RandConv().weight, RandConv().count, RandConv().kernels) == (10.0, 3, (1, 3, 5, 7))


@pytest.mark.parametrize("method", [AugMix(weight=3.0), RandConv(weight=3.0)])
def test_the_consistency_is_weighed(method):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4))
    images, labels = pictures(), torch.arange(3)
    views = method.views(images, Stream(CPU, 3))
    logits = model(views).unflatten(0, (3, 3))
    apart = float(jensen_shannon(logits))
    wanted = float(torch.nn.functional.cross_entropy(logits[0], labels)) + 3.0 * apart
    assert apart > 1e-4 and float(method.loss(model, views, labels)) == pytest.approx(wanted, rel=1e-4)


def test_a_random_convolution_is_mixed_with_the_image_and_of_every_size(monkeypatch):
    images, made = pictures(), []
    real = torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.functional, "conv2d", lambda padded, weight: made.append(real(padded, weight)) or made[-1]
    )
    sizes = set()
    for seed in range(30):
        host = Stream(CPU, seed).host  # draws the size first, then the share
        sizes.add(host.choice(RandConv().kernels))
        share = host.random()
        found = RandConv().convolved(images, Stream(CPU, seed))
        wanted = share * (images * 2 - 1) + (1 - share) * made[-1]
        assert torch.allclose(found, (wanted + 1) / 2, atol=1e-5)
    assert sizes == {1, 3, 5, 7}


def test_drawn_convolutions_are_those_of_a_batch_within_a_frame_of_zeros():
    images = pictures()
    for seed in range(20):
        stream = Stream(CPU, seed)
        kernels, keep = RandConv().draw(2, 3, 1.0, stream)
        again = Stream(CPU, seed)
        for kernel, share in zip(kernels, keep, strict=True):
            again.host.random()  # whether it is convolved
            wanted = RandConv().convolved(images, again)
            assert torch.allclose(convolved(images, kernel, share), wanted, atol=1e-5)
    kernels, keep = RandConv().draw(400, 3, 0.25, Stream(CPU, 1))
    alone = keep == 1
    assert 0.65 < alone.float().mean() < 0.85 and not kernels[alone].any()
    assert torch.allclose(convolved(images, kernels[alone][0], keep[alone][0]), images, atol=1e-6)


def test_augmix_applies_its_chains():
    images = pictures()
    made = AugMix(magnitude=1.0).mixed(images, 20, Stream(CPU, 1))
    assert float((made - images).abs().mean()) > 0.02
    grey = torch.linspace(0, 1, 256).expand(1, 3, 1, 256)
    levels = [len(posterize_strongly(grey, torch.tensor(each)).unique()) for each in (0.0, 0.24, 0.3, 0.6, 0.9)]
    assert levels == [16, 16, 8, 4, 2]


def test_randaugment_has_one_magnitude(monkeypatch):
    seen = []
    monkeypatch.setattr(operations, "operate", lambda images, kinds, strength, *more: seen.append(strength) or images)
    RandAugment(magnitude=0.4).views(torch.rand(50, 3, 8, 8), Stream(CPU, 0))
    strengths = torch.cat(seen)
    assert len(strengths) == 100 and strengths.abs().unique().tolist() == pytest.approx([0.4])
    assert (strengths > 0).any() and (strengths < 0).any()
