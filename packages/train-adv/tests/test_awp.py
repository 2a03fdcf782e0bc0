"""AWP: layer by layer as published, and gone afterwards."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from tiny_models import tiny_batch, tiny_net
from train_adv.awp import AWP


def test_each_layer_moves_by_gamma_of_its_norm_up_its_gradient():
    model = tiny_net().eval()
    images, labels = tiny_batch(8)
    moves = AWP(model, 0.01).direction(lambda: F.cross_entropy(model(images), labels))
    gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), list(model.parameters()))
    by_name = {name: g for (name, _), g in zip(model.named_parameters(), gradients, strict=True)}
    assert set(moves) == {"0.weight", "3.weight", "8.weight"}
    for name, move in moves.items():
        weight = dict(model.named_parameters())[name]
        expected = 0.01 * weight.norm() * by_name[name] / by_name[name].norm()
        assert torch.allclose(move, expected, rtol=1e-4, atol=1e-8)


def test_the_published_proxy_gives_the_same_move():
    """One SGD step of a copy, its difference rescaled to the weights' norm (the published code, written again)."""
    model = tiny_net().train()
    images, labels = tiny_batch(8)
    moves = AWP(model, 0.01).direction(lambda: F.cross_entropy(model(images), labels))
    proxy = copy.deepcopy(model)
    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
    (-F.cross_entropy(proxy(images), labels)).backward()
    optimizer.step()
    for name, move in moves.items():
        old, new = dict(model.named_parameters())[name], dict(proxy.named_parameters())[name]
        difference = new - old
        assert torch.allclose(move, 0.01 * old.norm() / difference.norm() * difference, rtol=1e-3, atol=1e-6)


def test_weights_and_statistics_come_back():
    model = tiny_net().train()
    images, labels = tiny_batch(8)
    before = copy.deepcopy(model.state_dict())

    def loss():
        return F.cross_entropy(model(images), labels)

    with AWP(model, 0.05).perturbed(loss):
        assert not torch.equal(model[0].weight, before["0.weight"])
        assert torch.equal(model[1].running_mean, before["1.running_mean"])
    assert all(torch.allclose(before[name], value, atol=1e-7) for name, value in model.state_dict().items())


def test_the_perturbed_loss_is_higher():
    model = tiny_net().eval()
    images, labels = tiny_batch(32)

    def loss():
        return F.cross_entropy(model(images), labels)

    before = float(loss())
    with AWP(model, 0.05).perturbed(loss):
        assert float(loss()) > before


def test_the_ascent_moves_no_other_networks_statistics():
    model, teacher = tiny_net().train(), tiny_net(seed=2).train()
    images, _ = tiny_batch(8)
    before = copy.deepcopy(teacher.state_dict())

    def loss():
        return F.mse_loss(model(images), teacher(images))

    AWP(model, 0.05, [teacher]).direction(loss)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
