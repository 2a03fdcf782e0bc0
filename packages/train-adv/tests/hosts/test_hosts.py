"""Hosts against their formulas written out, and how they compose."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from expkit.errors import UsageError
from tiny_models import tiny_batch, tiny_net
from train_adv.attacks.norms import L2
from train_adv.attacks.pgd import PGD
from train_adv.hosts.make import make_host
from train_adv.models.classifier import Classifier, ModelSpec
from train_adv.modes import attack_twin

SPEC = ModelSpec("custom", ("a", "b", "c", "d"), (3, 8, 8), (0.5,) * 3, (0.25,) * 3)
ATTACK = PGD(0.1, 0.05, 3)
ALL = ["standard", "at", "trades", "mart", "lbgat", "fgsm-rs", "n-fgsm"]


def classifier(seed: int = 0) -> Classifier:
    net = tiny_net(seed=seed)
    with torch.no_grad():
        net[-1].weight.mul_(10)  # sure enough for what a host weighs by probabilities to show
    return Classifier(net, SPEC)


def setting(name: str, beta: float | None = None):
    """A host on a small batch: (host, model, images, adversarial, labels)."""
    model = classifier().eval()  # eval: both forwards must agree with the formula's
    host = make_host(name, ATTACK, beta, lambda: classifier(1).eval())
    images, labels = tiny_batch(6)
    generator = torch.Generator().manual_seed(0)
    adversarial = host.climb(attack_twin(model), host.start(images, generator), images, labels)
    return host, model, images, adversarial, labels


def naive(name: str, model: Classifier, teacher: Classifier | None, x, x_adv, y, beta: float) -> float:
    """Sample by sample."""
    total = 0.0
    for i in range(len(x)):
        p, q = (torch.softmax(model(z[i : i + 1]), 1)[0] for z in (x, x_adv))
        kl = sum(float(p[k] * (p[k] / q[k]).log()) for k in range(len(p)))
        natural, attacked = -math.log(p[y[i]]), -math.log(q[y[i]])
        if name == "standard":
            total += natural
        elif name in ("at", "fgsm-rs", "n-fgsm"):
            total += attacked
        elif name == "trades":
            total += natural + beta * kl
        elif name == "mart":
            rival = max(float(q[k]) for k in range(len(q)) if k != y[i])
            total += attacked - math.log(1.0001 - rival) + beta * kl * (1 - float(p[y[i]]))
        else:
            assert teacher is not None
            taught = teacher(x[i : i + 1])[0]
            gap = model(x_adv[i : i + 1])[0] - taught
            total += float(gap.square().mean()) + float(F.cross_entropy(taught[None], y[i : i + 1])) + beta * kl
    return total / len(x)


@pytest.mark.parametrize("name", ALL)
def test_the_loss_is_the_published_formula(name):
    beta = 2.0 if name in ("trades", "mart", "lbgat") else 0.0
    host, model, images, adversarial, labels = setting(name, beta)
    with torch.no_grad():
        loss = host.loss(model.with_features, images, adversarial, labels)
        teacher = getattr(host, "teacher", None)
        assert float(loss.total) == pytest.approx(
            naive(name, model, teacher, images, adversarial, labels, beta), rel=1e-4
        )


@pytest.mark.parametrize("name", ["at", "trades", "mart", "lbgat", "fgsm-rs"])
def test_attacks_stay_in_the_ball(name):
    _, _, images, adversarial, _ = setting(name)
    assert 0 < float((adversarial - images).abs().max()) <= 0.1 + 1e-6


def test_n_fgsm_leaves_the_ball_but_not_the_box():
    host, model, images, adversarial, labels = setting("n-fgsm")
    assert 0.1 < float((adversarial - images).abs().max()) <= 0.3 + 1e-6
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    grey = torch.full_like(images, 0.5)
    start = host.start(grey, torch.Generator().manual_seed(0))
    assert 0.19 < float((start - grey).abs().max()) <= 0.2 and abs(float((start - grey).mean())) < 0.01
    step = (host.climb(attack_twin(model), start, grey, labels) - start).abs()
    assert torch.allclose(step[step > 0], torch.tensor(0.1), atol=1e-6)


def test_fgsm_rs_is_one_step_of_five_quarters_of_epsilon_from_a_random_start():
    assert make_host("fgsm-rs", ATTACK, None, classifier).attack == PGD(0.1, 0.125, 1, start="random")


@pytest.mark.parametrize("name", ["trades", "mart", "lbgat"])
def test_attacks_start_at_a_thousandth_of_normal_noise_as_published(name):
    host = make_host(name, ATTACK, None, classifier)
    grey = torch.full((4, 3, 32, 32), 0.5)
    moved = host.start(grey, torch.Generator().manual_seed(0)) - grey
    assert float(moved.std()) == pytest.approx(0.001, rel=0.05) and abs(float(moved.mean())) < 1e-4
    assert float(moved.abs().max()) > 0.0025  # no uniform noise


@pytest.mark.parametrize("name", ["trades", "lbgat"])
def test_the_attack_climbs_the_kl_and_asks_for_no_labels(name):
    host, model, images, adversarial, labels = setting(name)
    start = host.start(images, torch.Generator().manual_seed(0))

    def kl(points: torch.Tensor) -> float:
        return float(F.kl_div(model(points).log_softmax(1), model(images).softmax(1), reduction="batchmean"))

    assert kl(adversarial) > 10 * kl(start)
    assert torch.equal(adversarial, host.climb(attack_twin(model), start, images, (labels + 1) % 4))


def test_a_closure_sees_the_weights_as_they_are_when_called():
    host, model, images, adversarial, labels = setting("trades")
    closure = host.closure(model.with_features, images, adversarial, labels)
    first, again = closure().total.detach(), closure().total.detach()
    with torch.no_grad():
        model.backbone[-1].weight.mul_(2)
    assert torch.equal(first, again) and not torch.equal(first, closure().total.detach())


def test_lbgat_teaches_its_teacher_too():
    host, model, images, adversarial, labels = setting("lbgat")
    host.loss(model.with_features, images, adversarial, labels).total.backward()
    assert all(parameter.grad is not None for parameter in host.teacher.parameters())


def test_hosts_with_a_natural_forward_hand_it_out():
    for name in ALL:
        host, model, images, adversarial, labels = setting(name, 1.0)
        natural = host.loss(model.with_features, images, adversarial, labels).natural
        assert (natural is None) == (name in ("at", "fgsm-rs", "n-fgsm"))


def test_wrong_use_is_said():
    with pytest.raises(UsageError, match="trades"):
        make_host("trade", ATTACK, None, classifier)
    with pytest.raises(UsageError, match="beta"):
        make_host("trades", ATTACK, -1.0, classifier)
    with pytest.raises(UsageError, match="Linf"):
        make_host("n-fgsm", PGD(0.1, norm=L2()), None, classifier)
