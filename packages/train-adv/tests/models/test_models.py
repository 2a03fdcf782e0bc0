"""Models by name: their sizes are the published ones; checkpoints carry all that is needed."""

from __future__ import annotations

import copy

import pytest
import torch

from expkit.checkpoint import save_tensors
from expkit.errors import UsageError
from tiny_models import tiny_net
from train_adv.models.build import build
from train_adv.models.checkpoint import figures_of, load_model, save_model
from train_adv.models.classifier import Classifier, ModelSpec
from train_adv.modes import attack_twin

NAMES = tuple(str(digit) for digit in range(10))


def spec(name: str, channels: int = 3, size: int = 32, layer: str = "auto") -> ModelSpec:
    return ModelSpec(name, NAMES, (channels, size, size), (0.4,) * channels, (0.2,) * channels, layer)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet18", 11.174),
        ("preact-resnet18", 11.172),
        ("wrn-16-4", 2.749),
        ("wrn-28-10", 36.479),
        ("wrn-34-10", 46.160),
    ],
)
def test_sizes_are_the_published_ones(name, millions):
    with torch.device("meta"):
        model = build(spec(name))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=1e-3)


@pytest.mark.parametrize("name", ["resnet18", "preact-resnet18", "wrn-16-4", "small-cnn"])
def test_features_and_logits_are_of_one_forward(name):
    torch.manual_seed(0)
    model = build(spec(name, size=16)).eval()
    images = torch.rand(2, 3, 16, 16)
    logits, features = model.with_features(images)
    assert torch.allclose(logits, model(images), atol=1e-5) and logits.shape == (2, 10)
    assert torch.allclose(model.backbone.classify(features), logits, atol=1e-5)


@pytest.mark.parametrize("name", ["timm/resnet10t", "torchvision/shufflenet_v2_x0_5", "mobilenetv3_small_050"])
def test_library_models_work_by_name_and_can_be_copied(name):
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    model = build(spec(name)).eval()
    images = torch.rand(2, 3, 32, 32)
    model(images)  # notes nothing, or copies of a graph would be asked for
    for each in (model, copy.deepcopy(model), attack_twin(model)):
        logits, features = each.with_features(images)
        assert torch.allclose(logits, model(images), atol=1e-5) and features.ndim == 2


@pytest.mark.parametrize("name", ["torchvision/googlenet", "torchvision/squeezenet1_1"])
def test_networks_with_further_outputs_or_without_a_linear_layer_train(name):
    pytest.importorskip("torchvision")
    logits, features = build(spec(name)).train().with_features(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 10) and features.ndim == 2
    logits.sum().backward()


def test_normalisation_is_inside_and_travels(tmp_path):
    torch.manual_seed(0)
    model = build(spec("small-cnn", channels=1, size=8)).eval()
    save_model(tmp_path / "best.safetensors", model, {"epoch": 3})
    again = load_model(tmp_path)
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(again(images), model(images)) and again.spec == model.spec
    assert figures_of(tmp_path) == {"epoch": 3}
    assert torch.allclose(again(images), again.backbone((images - 0.4) / 0.2), atol=1e-6)


def test_a_model_of_ones_own_is_saved_and_given_back(tmp_path):
    model = Classifier(tiny_net(classes=10), spec("custom"))
    save_model(tmp_path / "m.safetensors", model)
    again = load_model(tmp_path / "m.safetensors", model=tiny_net(classes=10, seed=5))
    assert torch.equal(again.backbone[0].weight, model.backbone[0].weight)
    with pytest.raises(UsageError, match="pass it as model="):
        load_model(tmp_path / "m.safetensors")


def test_wrong_checkpoints_are_said(tmp_path):
    model = Classifier(tiny_net(classes=10), spec("custom"))
    save_model(tmp_path / "m.safetensors", model)
    with pytest.raises(UsageError, match="another architecture"):
        load_model(tmp_path / "m.safetensors", model=tiny_net(classes=10, width=9))
    save_tensors(tmp_path / "other.safetensors", {"w": torch.zeros(1)})
    with pytest.raises(UsageError, match="not a train-adv checkpoint"):
        load_model(tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="does not exist"):
        load_model(tmp_path / "absent.safetensors")
    with pytest.raises(UsageError, match=r"holds no best\.safetensors"):
        load_model(tmp_path)


def test_unknown_names_are_said_with_near_ones():
    with pytest.raises(UsageError, match="resnet18"):
        build(spec("resnet-18"))
    with pytest.raises(UsageError, match="unknown library"):
        build(spec("keras/resnet"))


@pytest.mark.parametrize("name", ["small-cnn", "resnet18", "preact-resnet18", "wrn-16-4"])
def test_features_and_logits_are_fp32_under_bf16(name):
    spec = ModelSpec(name, tuple("abcd"), (3, 16, 16), (0.5,) * 3, (0.25,) * 3)
    model = build(spec).eval()
    images = torch.rand(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits, features = model.with_features(images)
    assert features.dtype == logits.dtype == torch.float32
    for each in (features, logits):
        assert not torch.equal(each, each.bfloat16().float())
    assert model.bfloat16()(images.bfloat16()).dtype == torch.bfloat16
