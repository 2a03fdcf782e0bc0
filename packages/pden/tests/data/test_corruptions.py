"""CIFAR-10-C's corruptions against naive references and against the libraries that the published code used."""

from __future__ import annotations

import colorsys
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom

from pden.data.corruptions import COMMON, CORRUPTIONS, EXTRA, blur, corrupt, weather
from pden.data.corruptions.digital import pixelate, saturate
from pden.data.corruptions.kernels import clipped_zoom, gaussian, motion, plasma
from pden.data.corruptions.weather import brightness


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 2) -> torch.Tensor:
    """Smooth colour images with an edge."""
    across = torch.linspace(0, 1, 32)
    images = torch.stack(
        [across[None] * across[:, None], across[:, None].expand(32, 32), 1 - across[None].expand(32, 32)]
    )
    images[:, 8:16, 8:24] = torch.tensor([0.9, 0.2, 0.4])[:, None, None]
    return (images[None] * torch.linspace(1, 0.5, count)[:, None, None, None] * 255).to(torch.uint8)


def test_there_are_15_and_4():
    assert (len(COMMON), len(EXTRA), len(set(CORRUPTIONS))) == (15, 4, 19)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_changes_images_reproducibly(name):
    images = pictures()
    for level in (1, 3, 5):
        made = corrupt(images, name, level, rng(1))
        assert made.shape == images.shape and made.dtype == torch.uint8
        assert torch.equal(made, corrupt(images, name, level, rng(1)))
    assert (made.float() - images.float()).abs().mean() > 1


@pytest.mark.parametrize("name", sorted({*CORRUPTIONS} - {"spatter", "saturate", "elastic_transform", "pixelate"}))
def test_the_highest_level_is_worse_than_the_lowest(name):
    images = pictures(8)
    low, high = (corrupt(images, name, level, rng()).float() for level in (1, 5))
    assert (high - images).square().mean() > (low - images).square().mean()


def test_brightness_and_saturation_are_those_of_hsv():
    images = pictures(1).float() / 255
    raised, redder = brightness(images, 2, rng()), saturate(images, 4, rng()).clamp(0, 1)
    for row, column in ((0, 0), (10, 10), (20, 5), (31, 31)):
        hue, saturation, value = colorsys.rgb_to_hsv(*images[0, :, row, column].tolist())
        expected = colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.15))
        assert raised[0, :, row, column].tolist() == pytest.approx(expected, abs=1e-4)
        expected = colorsys.hsv_to_rgb(hue, min(1, saturation * 2.5 + 0.2), value)
        assert redder[0, :, row, column].tolist() == pytest.approx(expected, abs=1e-4)


def test_gaussian_blur_is_scipys():
    images = pictures(1).float() / 255
    expected = gaussian_filter(images[0, 0].numpy(), 0.8, mode="nearest", truncate=4)
    assert np.allclose(gaussian(images, 0.8)[0, 0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("factor", [1.03, 1.1, 1.25])
def test_clipped_zoom_is_scipys(factor):
    image = pictures(1)[0, 0].float().numpy() / 255
    inner = math.ceil(32 / factor)
    start = (32 - inner) // 2
    large = zoom(image[start : start + inner, start : start + inner], factor, order=1)
    trim = (large.shape[0] - 32) // 2
    expected = large[trim : trim + 32, trim : trim + 32]
    assert np.allclose(clipped_zoom(torch.from_numpy(image)[None, None], factor)[0, 0].numpy(), expected, atol=1e-4)


def test_pixelate_is_pillows_box_resampling():
    image = pictures(1)
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    expected = np.asarray(picture.resize((20, 20), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX))
    made = (pixelate(image.float() / 255, 4, rng()) * 255).round()[0].permute(1, 2, 0).numpy()
    assert np.abs(made - expected).max() <= 1


def test_jpeg_has_the_published_quality():
    image = pictures(1)
    packed = io.BytesIO()
    Image.fromarray(image[0].permute(1, 2, 0).numpy()).save(packed, "JPEG", quality=40)
    expected = np.asarray(Image.open(packed)).astype(int)
    made = corrupt(image, "jpeg_compression", 5, rng())[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(made - expected).max() <= 1


def test_defocus_at_level_5_is_a_disk_of_radius_one_and_a_half():
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[0, :, 16, 16] = 255
    made = corrupt(image, "defocus_blur", 5, rng())[0, 0].float()
    assert (made > 20).sum() == 9 and made[15:18, 15:18].std() < 3


def test_motion_is_a_naive_walk_along_the_angle():
    images = torch.rand(2, 1, 12, 12)
    degrees = torch.tensor([30.0, -100.0])
    made = motion(images, 3, 2.0, degrees)
    weights = [math.exp(-(step**2) / 8) for step in range(7)]
    for place, angle in enumerate(degrees.tolist()):
        for row, column in ((0, 0), (6, 6), (11, 3)):
            total = 0.0
            for step, weight in enumerate(weights):
                down = math.ceil(step * math.sin(math.radians(angle)) - 0.5)
                right = math.ceil(step * math.cos(math.radians(angle)) - 0.5)
                y, x = min(11, max(0, row + down)), min(11, max(0, column + right))
                total += weight / sum(weights) * float(images[place, 0, y, x])
            assert float(made[place, 0, row, column]) == pytest.approx(total, abs=1e-4)


def test_plasma_is_rougher_where_it_decays_less():
    smooth, rough = (plasma(8, 32, decay, rng()) for decay in (3.0, 1.5))
    assert smooth.shape == (8, 32, 32) and smooth.min() == 0 and smooth.max() == 1

    def steps(maps: torch.Tensor) -> float:
        return float((maps[:, 1:] - maps[:, :-1]).abs().mean())

    assert steps(rough) > 1.5 * steps(smooth)


@pytest.mark.parametrize("level", range(1, 6))
def test_levels_are_the_published_ones(level, monkeypatch):
    """Of CIFAR-10-C: what can be read off an image, or off the steps that are taken."""
    grey = torch.full((8, 3, 32, 32), 128, dtype=torch.uint8)
    noisy = corrupt(grey, "gaussian_noise", level, rng()).float() / 255
    assert float(noisy.std()) == pytest.approx((0.04, 0.06, 0.08, 0.09, 0.10)[level - 1], rel=0.03)
    counted = corrupt(grey, "shot_noise", level, rng()).float() / 255
    photons = (500, 250, 100, 75, 50)[level - 1]
    assert float(counted.std()) == pytest.approx((128 / 255 / photons) ** 0.5, rel=0.05)
    halves = grey.clone()
    halves[..., 16:] = 228
    flat = corrupt(halves, "contrast", level, rng()).float()
    left = (0.75, 0.5, 0.4, 0.3, 0.15)[level - 1]
    assert float(flat[..., 16:].mean() - flat[..., :16].mean()) == pytest.approx(100 * left, abs=1)
    zooms: list[float] = []
    monkeypatch.setattr(blur, "clipped_zoom", lambda images, factor: zooms.append(factor) or images)
    corrupt(halves, "zoom_blur", level, rng())
    steps = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[level - 1], 0.01)  # one more than it looks, by rounding
    assert zooms == pytest.approx(steps.tolist())
    rounds: list[int] = []
    real = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *given, **more: rounds.append(1) or real(*given, **more))
    corrupt(halves, "glass_blur", level, rng())
    assert len(rounds) == 30 * 30 * (1, 1, 1, 2, 2)[level - 1]


def test_a_field_of_shifts_is_smoothed_as_scipy_reflects():
    field = torch.rand(1, 2, 32, 32, generator=rng())
    mine = gaussian(field, 3.0, truncate=3, mode="symmetric")[0]
    theirs = [gaussian_filter(each.numpy(), 3.0, mode="reflect", truncate=3) for each in field[0]]
    assert np.allclose(mine.numpy(), theirs, atol=1e-5)


def test_impulses_are_as_many_as_published():
    grey = torch.full((4, 3, 32, 32), 128, dtype=torch.uint8)
    salted = corrupt(grey, "impulse_noise", 5, rng())
    assert float(((salted == 0) | (salted == 255)).float().mean()) == pytest.approx(0.07, rel=0.1)


def test_frost_photographs_are_used_where_there_are_some(tmp_path):
    Image.new("RGB", (200, 200), (0, 0, 255)).save(tmp_path / "frost1.png")
    made = corrupt(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "frost", 5, rng(), frost=tmp_path)
    assert made[:, :2].max() == 0 and made[:, 2].min() > 100


@pytest.mark.parametrize("level", range(5))
def test_weather_is_as_strong_as_published(level, monkeypatch):
    """With haze, flakes and ice that are the same everywhere, what is left is arithmetic."""
    halves = torch.full((1, 3, 32, 32), 0.2)
    halves[..., 16:] = 0.8
    monkeypatch.setattr(weather, "plasma", lambda count, size, decay, rng: torch.ones(count, size, size))
    amount = (0.2, 0.5, 0.75, 1.0, 1.5)[level]
    hazy = weather.fog(halves, level, rng())
    assert float(hazy[0, 0, 0, 0]) == pytest.approx((0.2 + amount) * 0.8 / (0.8 + amount), rel=1e-4)
    monkeypatch.setattr(weather, "motion", lambda images, *more: torch.zeros_like(images))
    kept = (0.95, 0.9, 0.9, 0.85, 0.8)[level]
    snowy = weather.snow(torch.full((1, 3, 32, 32), 0.2), level, rng())
    assert torch.allclose(snowy, torch.tensor(kept * 0.2 + (1 - kept) * 0.8))  # half as bright again, and half
    monkeypatch.setattr(weather, "_ice", lambda rng: [torch.full((3, 64, 64), 0.5)])
    kept, amount = (1.0, 1.0, 0.9, 0.85, 0.75)[level], (0.2, 0.3, 0.4, 0.4, 0.45)[level]
    icy = weather.frost(torch.full((1, 3, 32, 32), 0.2), level, rng())
    assert torch.allclose(icy, torch.tensor(kept * 0.2 + amount * 0.5))
