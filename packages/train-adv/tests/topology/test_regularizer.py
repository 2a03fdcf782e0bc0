"""TRAIN in a loop of one's own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expkit.errors import UsageError
from tiny_models import tiny_batch, tiny_net
from train_adv.topology.features import FeatureTap, pooled
from train_adv.topology.loss import TopologyLoss
from train_adv.topology.regularizer import TopologyRegularizer


def test_it_is_lambda_times_the_loss_of_pooled_features():
    model, reference = tiny_net(seed=1), tiny_net(seed=2)
    images, _ = tiny_batch()
    topology = TopologyRegularizer(model, reference, weight=7.0)
    value = topology(images)
    trunk, reference_trunk = model[:-1], reference[:-1]
    expected = TopologyLoss()(trunk(images), reference_trunk(images))
    assert float(value) == pytest.approx(7 * float(expected), rel=1e-4)
    assert float(topology.last["topology"]) == pytest.approx(float(expected), rel=1e-4)


def test_the_model_may_be_shown_other_images_than_the_reference():
    model, reference = tiny_net(seed=1), tiny_net(seed=2)
    images, _ = tiny_batch()
    moved = (images + 0.1).clamp(0, 1)
    value = TopologyRegularizer(model, reference, weight=7.0)(images, shown=moved)
    expected = TopologyLoss()(model[:-1](moved), reference[:-1](images))
    assert float(value) == pytest.approx(7 * float(expected), rel=1e-4)
    assert float(value) != pytest.approx(
        7 * float(TopologyLoss()(model[:-1](images), reference[:-1](images))), rel=1e-4
    )


def test_training_with_it_brings_the_relations_back():
    model, reference = tiny_net(seed=1), tiny_net(seed=2)
    images, _ = tiny_batch(count=32)
    topology = TopologyRegularizer(model, reference, weight=10.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = None
    for _ in range(30):
        optimizer.zero_grad()
        loss = topology(images)
        first = first if first is not None else float(loss)
        loss.backward()
        optimizer.step()
        topology.step()
    assert float(loss) < 0.5 * first


def test_a_frozen_reference_never_changes_and_never_trains():
    model, reference = tiny_net(seed=1), tiny_net(seed=2)
    before = copy.deepcopy(reference.state_dict())
    topology = TopologyRegularizer(model, reference).train()
    topology(tiny_batch()[0]).backward()
    assert not reference.training
    assert all(torch.equal(before[name], value) for name, value in reference.state_dict().items())
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_an_averaged_reference_follows_the_model():
    model = tiny_net(seed=1)
    topology = TopologyRegularizer(model, kind="ema", decay=0.9)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    topology.step()
    assert torch.allclose(model[0].weight - topology.reference[0].weight, torch.tensor(0.9), atol=1e-5)


def test_a_co_trained_reference_learns_from_labels_only():
    model, reference = tiny_net(seed=1), tiny_net(seed=2)
    images, labels = tiny_batch()
    topology = TopologyRegularizer(model, reference, kind="co-trained", weight=3.0)
    topology(images, labels).backward()
    gradient = reference[-1].weight.grad.clone()
    reference.zero_grad()
    F.cross_entropy(reference(images), labels).backward()
    assert torch.allclose(gradient, reference[-1].weight.grad, atol=1e-5)
    with pytest.raises(UsageError, match="labels"):
        topology(images)


def test_lambda_warms_up_linearly():
    topology = TopologyRegularizer(tiny_net(), tiny_net(seed=2), weight=8.0, warmup=4)
    weights = []
    for _ in range(6):
        weights.append(topology.current_weight())
        topology.step()
    assert weights == [0.0, 2.0, 4.0, 6.0, 8.0, 8.0]


@pytest.mark.parametrize("statistics", ["shared", "dual", "frozen"])
def test_calibration_gives_the_asked_ratio_of_gradient_norms(statistics):
    model, reference = tiny_net(seed=1), tiny_net(seed=2)
    images, labels = tiny_batch()
    for seed in range(20):
        model(tiny_batch(seed=3 + seed)[0])  # running statistics that are no single batch's
    topology = TopologyRegularizer(model, reference, statistics=statistics)
    host = F.cross_entropy(model(images), labels)
    weight = topology.calibrate(host, images, model.parameters(), ratio=0.5)

    def norm(loss):
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]).norm()

    ratio = norm(topology(images)) / norm(F.cross_entropy(model(images), labels))
    assert float(ratio) == pytest.approx(0.5, rel=1e-3) and weight == topology.weight
    assert topology.last["norm_host"] > 0 and topology.last["norm_topology"] > 0


@pytest.mark.parametrize(("policy", "moves"), [("shared", True), ("dual", False), ("frozen", False)])
def test_batch_norm_statistics_move_only_where_asked(policy, moves):
    model = tiny_net(seed=1).train()
    topology = TopologyRegularizer(model, tiny_net(seed=2), statistics=policy)
    before = model[1].running_mean.clone()
    topology(tiny_batch()[0]).backward()
    assert torch.equal(before, model[1].running_mean) is not moves
    assert model[1].training


def test_a_named_layer_is_pooled_and_a_missing_one_is_named():
    model = tiny_net()
    images, _ = tiny_batch()
    tap = FeatureTap(model, "3")
    model(images)
    assert torch.allclose(tap.take(), model[:4](images).mean((2, 3)))
    with pytest.raises(UsageError, match='no layer "layer4"; did you mean'):
        FeatureTap(model, "layer4")
    with pytest.raises(UsageError, match="no linear layer"):
        FeatureTap(nn.Flatten())


def test_without_a_linear_layer_the_last_convolutions_input_is_taken():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images, _ = tiny_batch()
    tap = FeatureTap(model)
    model(images)
    assert torch.allclose(tap.take(), model[:2](images).mean((2, 3)))


def test_a_model_is_no_reference_of_itself_nor_an_ema_of_its_start_one_to_scale_by():
    model = tiny_net().eval()  # in train mode its BatchNorm would part the two
    with pytest.raises(UsageError, match="the model itself"):
        TopologyRegularizer(model, model)
    topology = TopologyRegularizer(model, kind="ema")
    images, labels = tiny_batch(8)
    with pytest.raises(UsageError, match="give no lambda"):
        topology.calibrate(nn.functional.cross_entropy(model(images), labels), images, model.parameters(), ratio=0.3)


def test_the_model_is_not_swallowed_by_the_regularizer():
    model = tiny_net()
    topology = TopologyRegularizer(model, tiny_net(seed=2))
    assert not any(parameter.requires_grad for parameter in topology.parameters())
    topology.remove()
    assert not model[-1]._forward_pre_hooks


@pytest.mark.parametrize(("library", "name"), [("timm", "resnet10t"), ("torchvision", "mobilenet_v3_small")])
def test_models_of_timm_and_torchvision_are_taken_as_they_are(library, name):
    if library == "timm":
        model = pytest.importorskip("timm").create_model(name, num_classes=4)
    else:
        model = pytest.importorskip("torchvision").models.get_model(name, num_classes=4)
    topology = TopologyRegularizer(model, copy.deepcopy(model), weight=1.0)
    value = topology(torch.rand(4, 3, 32, 32))
    value.backward()
    assert torch.isfinite(value)


def test_a_co_trained_reference_trains_its_batch_norm_too():
    reference = tiny_net(seed=2).eval()  # as `load` gives it
    topology = TopologyRegularizer(tiny_net(seed=1), reference, kind="co-trained")
    before = reference[1].running_mean.clone()
    topology(*tiny_batch()).backward()
    assert reference.training and not torch.equal(before, reference[1].running_mean)


def test_the_warm_up_travels_in_the_state_and_asks_no_device():
    settings = {"weight": 8.0, "warmup": 4}
    one = TopologyRegularizer(tiny_net(), tiny_net(seed=2), **settings)
    one.step()
    two = TopologyRegularizer(tiny_net(), tiny_net(seed=3), **settings)
    two.load_state_dict(one.state_dict())
    assert two.current_weight() == 2.0 and isinstance(two.steps, int)
    assert not any(name.endswith("steps") for name, _ in two.named_buffers())


def test_pooled_features_of_a_named_layer_are_fp32_means():
    features = torch.full((2, 3, 16, 16), 0.1, dtype=torch.bfloat16)
    features[:, :, 0, 0] = 0.2
    expected = features.double().mean((2, 3)).float()
    assert torch.equal(pooled(features).float(), expected) and pooled(features.flatten(2)).dtype == torch.float32
