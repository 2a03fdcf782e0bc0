"""Task models: sizes of the literature, one pass for all outputs, input scaling inside."""

from __future__ import annotations

import pytest
import torch

from expkit.errors import UsageError
from pden.models import build_model
from pden.models.scaling import to_unit


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_digits_net_has_the_literatures_layers():
    model = build_model("digits", classes=10)
    convolutions = 64 * 3 * 25 + 64 + 128 * 64 * 25 + 128
    linear = 3200 * 1024 + 1024 + 1024 * 1024 + 1024
    assert count(model) == convolutions + linear + (1024 * 10 + 10) + (1024 * 128 + 128)


def test_the_digits_net_is_its_layers_one_after_another():
    torch.manual_seed(0)
    model, images = build_model("digits", classes=10, width=0.25), torch.rand(8, 3, 32, 32)
    made, plain = model.full(images).features, to_unit(images)
    for layer in model.encoder:
        plain = layer(plain)
    torch.testing.assert_close(made, plain, atol=1e-6, rtol=1e-5)
    parameters = list(model.encoder.parameters())
    gradients = [torch.autograd.grad(each.square().sum(), parameters) for each in (made, plain)]
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5 * float(second.abs().max()), rtol=0)


def test_wrn_16_4_has_its_2_7_million_weights():
    model = build_model("wrn-16-4", classes=10, embedding=1)
    assert 2.7e6 < count(model) < 2.8e6
    assert sum(isinstance(each, torch.nn.Conv2d) for each in model.encoder.modules()) == 16  # 13 and 3 shortcuts


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [("digits", 1, 20), ("wrn-10-1", 3, 32), ("fcn-small", 3, 24), ("fcn-resnet50", 1, 32)],
)
def test_one_pass_gives_logits_normalised_embeddings_and_features(name, channels, size):
    model = build_model(name, classes=4, channels=channels, size=size, embedding=6).eval()
    images = torch.rand(2, channels, size, size)
    output = model.full(images)
    assert output.logits.shape == ((2, 4, size, size) if name.startswith("fcn") else (2, 4))
    assert output.embeddings.shape == (2, 6)
    assert torch.allclose(output.embeddings.norm(dim=1), torch.ones(2), atol=1e-5)
    assert output.features.shape[0] == 2 and output.features.dim() == 2
    assert torch.equal(model(images), output.logits)


def test_the_encoder_sees_images_from_minus_one_to_one():
    model = build_model("digits", classes=3, size=16, width=0.1)
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 3, 16, 16))
    assert torch.equal(seen[0][:, 0, 0, 0], torch.tensor([-1.0, 0.0, 1.0]))
    assert to_unit(torch.tensor(0.25)) == -0.5


@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv3_small_050",  # features are wider than `num_features`
        "mobilenetv4_conv_small_035",
        "ghostnetv2_100",
        "deit_tiny_patch16_224",  # built for one size, which its name does not say
        "swin_tiny_patch4_window7_224",
        "mixer_s16_224",
        "efficientvit_b0",  # takes any size, which its name does not say
        "fastvit_t8",
    ],
)
def test_timm_backbones_of_all_kinds_are_encoders(name):
    pytest.importorskip("timm")
    model = build_model(f"timm:{name}", classes=3, size=64)
    assert model.training and model(torch.rand(2, 3, 64, 64)).shape == (2, 3)


def test_finding_a_timm_backbones_width_leaves_weights_statistics_and_random_numbers_alone():
    timm = pytest.importorskip("timm")
    from pden.models.backbones import timm_encoder

    torch.manual_seed(0)
    plain, random = timm.create_model("mobilenetv3_small_050", num_classes=0).state_dict(), torch.get_rng_state()
    torch.manual_seed(0)
    found = timm_encoder("mobilenetv3_small_050", 3, 64)[0].state_dict()
    assert torch.equal(torch.get_rng_state(), random)
    assert found.keys() == plain.keys() and all(torch.equal(found[key], plain[key]) for key in plain)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("inception_v4", 32),  # its maps become smaller than its kernels
        ("deit_tiny_patch16_224", 8),  # less than one patch
        ("crossvit_tiny_240", 32),  # no multiple of its patches
        ("halonet26t", 32),  # what timm raises says nothing
    ],
)
def test_images_that_a_timm_backbone_does_not_take_are_one_line(name, size):
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match=f'"{name}" takes no images of {size} pixels \\(.+\\)$') as error:
        build_model(f"timm:{name}", classes=3, size=size)
    assert "\n" not in str(error.value)


def test_an_unknown_timm_backbone_is_one_line_with_names_near_it():
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match='"mobilenetv3_small"; near it: mobilenetv3_small_050'):
        build_model("timm:mobilenetv3_small", classes=3)


def test_a_timm_backbone_is_an_encoder():
    pytest.importorskip("timm")
    model = build_model("timm:resnet10t", classes=3, channels=1, size=32)
    assert model.full(torch.rand(2, 1, 32, 32)).logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "digits", "classes": 1}, "at least 2"),
        ({"name": "digits", "classes": 3, "size": 8}, "at least 16 pixels"),
        ({"name": "wrn-15-4", "classes": 3}, "10, 16, 22"),
        ({"name": "magic", "classes": 3}, "wrn-DEPTH-FACTOR"),
    ],
)
def test_impossible_models_are_refused(settings, said):
    with pytest.raises(UsageError) as error:
        build_model(**settings)
    assert said in str(error.value)
