"""APGD against the published implementation, point by point in fp32, and on its own."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expkit.errors import UsageError
from tiny_models import tiny_batch, tiny_net
from train_adv.attacks.apgd import APGD, apgd_targeted, likely_targets
from train_adv.attacks.losses import cross_entropy, dlr, targeted_dlr
from train_adv.attacks.norms import L1, L2, Linf
from train_adv.attacks.pgd import PGD

NORMS = {"Linf": (Linf(), 0.06), "L2": (L2(), 0.8), "L1": (L1(), 8.0)}


class Recorder(nn.Module):
    """Notes every point at which the model is asked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.points: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.points.append(images.detach().clone())
        return self.model(images)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    model = tiny_net(classes=6, seed=3, width=12)
    images, labels = tiny_batch(256, classes=6, seed=1)
    labels = (labels + 2 * (images[:, 0].mean((1, 2)) > 0.32).long()) % 6
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        attacked = PGD(0.03, 0.02, 2)(model, images, labels)
        F.cross_entropy(model.train()(attacked), labels).backward()
        optimizer.step()
    return model.eval()


def published(name: str, epsilon: float, model: nn.Module, steps: int, **options):
    base = pytest.importorskip("pyautoattack.autopgd_base")
    options = {"n_iter": steps, "norm": name, "eps": epsilon, "logger": logging.getLogger("test"), **options}
    attack = base.APGDAttack(model, **options)
    return attack


@pytest.mark.parametrize("steps", [10, 40])
@pytest.mark.parametrize("loss_name", ["ce", "dlr"])
@pytest.mark.parametrize("name", ["Linf", "L2"])
def test_every_point_is_the_published_one(trained, name, loss_name, steps):
    norm, epsilon = NORMS[name]
    images, labels = tiny_batch(24, classes=6, seed=8)
    ours = APGD(epsilon, steps, norm)
    start = ours.draw(images, torch.Generator().manual_seed(0))
    theirs_model, ours_model = Recorder(trained), Recorder(trained)
    theirs = published(name, epsilon, theirs_model, steps, loss=loss_name)
    theirs.init_hyperparam(images)
    best, accuracy, value, adversarial = theirs.attack_single_run(images, labels, x_init=start)
    found = ours.run(ours_model, start, images, labels, {"ce": cross_entropy, "dlr": dlr}[loss_name])
    assert len(theirs_model.points) == len(ours_model.points) == steps + 1
    for expected, got in zip(theirs_model.points, ours_model.points, strict=True):
        assert torch.allclose(expected, got, atol=2e-6)
    assert torch.allclose(best, found.best, atol=2e-6) and torch.allclose(value, found.loss, atol=1e-4)
    assert torch.equal(accuracy.bool(), ~found.broken) and torch.allclose(adversarial, found.adversarial, atol=2e-6)


@pytest.mark.parametrize("name", ["Linf", "L2"])
def test_targeted_runs_are_the_published_ones_too(trained, name):
    base = pytest.importorskip("pyautoattack.autopgd_base")
    norm, epsilon = NORMS[name]
    images, labels = tiny_batch(24, classes=6, seed=9)
    ours = APGD(epsilon, 20, norm)
    start = ours.draw(images, torch.Generator().manual_seed(0))
    targets = trained(images).argsort(1)[:, -2]
    theirs_model, ours_model = Recorder(trained), Recorder(trained)
    theirs = base.APGDAttack_targeted(theirs_model, n_iter=20, norm=name, eps=epsilon, logger=logging.getLogger("t"))
    theirs.init_hyperparam(images)
    theirs.y_target = targets
    theirs.attack_single_run(images, labels, x_init=start)
    ours.run(ours_model, start, images, labels, targeted_dlr(targets))
    for expected, got in zip(theirs_model.points, ours_model.points, strict=True):
        assert torch.allclose(expected, got, atol=2e-6)


def test_l1_reaches_the_published_loss(trained):
    """Not point by point: the published code counts rounding noise as support, and ours has none."""
    norm, epsilon = NORMS["L1"]
    images, labels = tiny_batch(48, classes=6, seed=8)
    ours = APGD(epsilon, 50, norm)
    start = ours.draw(images, torch.Generator().manual_seed(0))
    theirs = published("L1", epsilon, trained, 50, loss="ce")
    theirs.init_hyperparam(images)
    _, accuracy, value, _ = theirs.attack_single_run(images, labels, x_init=start)
    found = ours.run(trained, start, images, labels, cross_entropy, drawn=False)
    assert float(found.loss.mean()) >= 0.97 * float(value.mean())
    assert abs(float((~found.broken).float().mean()) - float(accuracy.float().mean())) <= 0.05
    assert ((found.best - images).abs().flatten(1).sum(1) <= epsilon * 1.001).all()


@pytest.mark.parametrize("name", ["Linf", "L2", "L1"])
def test_what_it_returns_is_inside_and_misleads(trained, name):
    norm, epsilon = NORMS[name]
    images, labels = tiny_batch(48, classes=6, seed=8)
    labels = trained(images).argmax(1)
    attack = APGD(epsilon, 20, norm)
    adversarial = attack(trained, images, labels, generator=torch.Generator().manual_seed(0))
    wrong = trained(adversarial).argmax(1) != labels
    order = {"Linf": torch.inf, "L2": 2, "L1": 1}[name]
    size = torch.linalg.vector_norm((adversarial - images).flatten(1), order, dim=1)
    assert wrong.any() and (size <= epsilon * 1.001).all() and adversarial.min() >= 0 and adversarial.max() <= 1
    assert torch.equal(adversarial[~wrong], images[~wrong])


def test_the_targeted_ensemble_is_at_least_as_strong_as_one_target(trained):
    images, labels = tiny_batch(48, classes=6, seed=8)
    attack = APGD(0.06, 10)
    counts = []
    for classes in (1, 5):
        generator = torch.Generator().manual_seed(0)
        found = apgd_targeted(attack, trained, images, labels, classes=classes, generator=generator)
        counts.append(int((trained(found).argmax(1) == labels).sum()))
    assert counts[1] <= counts[0]


def test_three_classes_are_too_few_for_the_targeted_loss():
    images, _ = tiny_batch(4, classes=3)
    with pytest.raises(UsageError, match="4 classes"):
        apgd_targeted(APGD(0.1, 2), tiny_net(classes=3), images, torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("images", [torch.full((2, 3, 8, 8), 7.0), torch.full((2, 3, 8, 8), torch.nan)])
def test_images_outside_the_box_are_refused(images):
    with pytest.raises(UsageError, match=r"\[0, 1\]"):
        APGD(0.1, 2)(tiny_net(), images, torch.zeros(2, dtype=torch.long))


def test_l1_repeats_at_larger_radii_as_published(trained):
    """Three runs, at 3, 2 and 1 epsilon; the loss reached is near that of the published three from the same noise."""
    norm, epsilon = NORMS["L1"]
    images, labels = tiny_batch(48, classes=6, seed=8)
    labels = trained(images).argmax(1)
    recorder = Recorder(trained)
    ours = APGD(epsilon, 40, norm)
    found = ours.search(recorder, ours.draw(images, torch.Generator().manual_seed(0)), images, labels, cross_entropy)
    sizes = [float((point - images).abs().flatten(1).sum(1).max()) / epsilon for point in recorder.points]
    assert len(sizes) == 13 + 13 + 17 and max(sizes[:13]) > 2.9 and 1.9 < max(sizes[13:26]) <= 2.001
    assert max(sizes[26:]) <= 1.001
    theirs = published("L1", epsilon, trained, 40, loss="ce", use_largereps=True)
    theirs.init_hyperparam(images)
    torch.manual_seed(0)
    _, accuracy, value, _ = theirs.decr_eps_pgd(images, labels, [3 * epsilon, 2 * epsilon, epsilon], [12, 12, 16])
    assert float(found.loss.mean()) >= 0.97 * float(value.mean())
    assert float((~found.broken).float().mean()) <= float(accuracy.float().mean()) + 0.05
    assert APGD(epsilon, 2, norm).search(trained, images, images, labels, cross_entropy).loss.isfinite().all()


def test_targets_are_the_most_likely_other_classes_in_order():
    logits = torch.tensor([[0.1, 0.9, 0.5, 0.3, 0.2], [9.0, 1.0, 2.0, 4.0, 3.0]])
    assert [each.tolist() for each in likely_targets(logits)] == [[2, 3], [3, 4], [4, 2], [0, 1]]
    assert [each.tolist() for each in likely_targets(logits, 2)] == [[2, 3], [3, 4]]
    with pytest.raises(UsageError, match="at least 4 classes"):
        likely_targets(logits[:, :3])
