"""Generators: sizes, ranges, noise, and use as ordinary transforms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

from expkit.errors import UsageError
from pden.generators import KINDS, AdaIN, Composite, Geometric, Photometric, build_generator, generator_settings
from pden.generators.geometric import warp
from pden.generators.photometric import enlarged, normalised
from pden.layout import channels_last


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_photometric_generator_has_the_papers_size():
    assert count(Photometric()) == 26_019


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [0, 8])
@pytest.mark.parametrize("size", [(32, 32), (17, 17), (40, 64)])
def test_shape_and_range_are_kept_at_any_resolution(kind, grid, size):
    images = torch.rand(2, 3, *size)
    made = build_generator(kind, grid=grid)(images)
    assert made.shape == images.shape
    assert 0 <= made.min() and made.max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_noise_alone_decides_a_draw(kind):
    torch.manual_seed(0)
    generator, images = build_generator(kind), torch.rand(3, 3, 32, 32)
    noise = torch.randn(3, generator.noise)
    assert torch.equal(generator(images, noise), generator(images, noise))
    assert not torch.equal(generator(images, noise), generator(images, -noise))
    first, second = (generator(images, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, generator(images, generator=torch.Generator().manual_seed(8)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_without_noise_is_a_function_of_the_image(kind):
    generator, images = build_generator(kind, noise=0), torch.rand(2, 3, 32, 32)
    assert torch.equal(generator(images), generator(images))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [0, 8])
def test_every_weight_gets_a_gradient_from_a_difference_of_draws(kind, grid):
    torch.manual_seed(0)
    generator, images = build_generator(kind, grid=grid), torch.rand(4, 3, 32, 32)
    (generator(images) - generator(images)).abs().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in generator.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_images_come_back_in_the_form_they_came_in(kind):
    torch.manual_seed(0)
    generator, noise = build_generator(kind), torch.randn(1, build_generator(kind).noise)
    image = torch.rand(3, 32, 32)
    one = generator(image, noise)
    assert one.shape == image.shape and torch.equal(one, generator(image[None], noise)[0])
    eight = (image * 255).round().to(torch.uint8)
    made = generator(eight, noise)
    assert made.dtype == torch.uint8
    assert (made.float() / 255 - one).abs().max() < 0.02
    picture = generator(v2.functional.to_pil_image(eight), noise)
    assert isinstance(picture, Image.Image)
    assert torch.equal(v2.functional.pil_to_tensor(picture), made)


def test_a_generator_stands_in_a_chain_of_torchvision_transforms():
    chain = v2.Compose([v2.Resize(32), build_generator("composite").requires_grad_(False), v2.ToDtype(torch.float32)])
    assert chain(torch.rand(3, 48, 48)).shape == (3, 32, 32)


def test_the_geometric_generator_starts_around_the_identity():
    torch.manual_seed(0)
    images, identity = torch.rand(8, 3, 32, 32), torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    assert torch.allclose(Geometric(noise=0).maps(images, torch.empty(8, 0)), identity.expand(8, 2, 3), atol=0.15)
    found = [(Geometric().maps(images, torch.randn(8, 10)) - identity).flatten() for _ in range(20)]
    assert float(torch.cat(found).square().mean().sqrt()) == pytest.approx(0.16, abs=0.03)
    assert torch.allclose(warp(images, torch.tensor([[[1.0, 0, 0], [0, 1, 0]]]).expand(8, 2, 3)), images, atol=1e-5)


def test_warp_moves_as_the_map_says():
    images = torch.zeros(1, 1, 8, 8)
    images[0, 0, 2, 3] = 1
    moved = warp(images, torch.tensor([[[1.0, 0, 0.25], [0, 1, 0]]]))  # a quarter of a half width: one pixel
    assert moved[0, 0, 2, 2] == pytest.approx(1, abs=1e-5)


def test_adain_sets_mean_and_spread_from_noise():
    layer, maps = AdaIN(4, 6), torch.rand(2, 6, 16, 16) * 3 + 1
    noise = torch.randn(2, 4)
    gamma, beta = layer.style(noise).chunk(2, dim=1)
    styled = layer(maps, noise)
    assert torch.allclose(styled.mean(dim=(2, 3)), beta, atol=1e-4)
    assert torch.allclose(styled.std(dim=(2, 3), unbiased=False), (1 + gamma).abs(), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_of_one_batch_are_the_draws_one_by_one(kind):
    torch.manual_seed(0)
    generator, images = build_generator(kind), torch.rand(4, 3, 32, 32)
    noises = [torch.randn(4, generator.noise) for _ in range(2)]
    together, apart = generator.draws(images, noises), [generator(images, noise) for noise in noises]
    for first, second in zip(together, apart, strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    weights, parameters = torch.rand(2, *images.shape), list(generator.parameters())
    gradients = [torch.autograd.grad((torch.stack(each) * weights).sum(), parameters) for each in (together, apart)]
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5 * float(second.abs().max()), rtol=0)


def test_the_photometric_generator_is_its_layers_one_after_another():
    torch.manual_seed(0)
    generator = Photometric().double()  # in fp32 the first layer's gradient has three digits, in any order of sums
    images, noise = torch.rand(4, 3, 32, 32).double(), torch.randn(4, 10).double()
    maps = generator.second(generator.first(images).relu()).relu()
    gamma, beta = generator.adain.style(noise)[:, :, None, None].chunk(2, dim=1)
    plain = generator.last(generator.third((1 + gamma) * F.instance_norm(maps) + beta).relu()).float().sigmoid()
    made, parameters = generator(images, noise), list(generator.parameters())
    torch.testing.assert_close(made, plain, atol=1e-6, rtol=0)
    weights = torch.rand_like(made)
    gradients = [torch.autograd.grad((each * weights).sum(), parameters) for each in (made, plain)]
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, atol=1e-6 * float(second.abs().max()), rtol=0)


@pytest.mark.parametrize("level", [0.0, 100.0])
def test_normalised_maps_are_right_to_rounding_in_any_layout(level):
    torch.manual_seed(0)
    maps = level + torch.randn(2, 8, 16, 16)
    exact = F.instance_norm(maps.double())
    for each in (maps, channels_last(maps)):
        torch.testing.assert_close(normalised(each).double(), exact, atol=1e-5 + 1e-6 * level, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_transform_gives_contiguous_images(kind):
    assert build_generator(kind)(torch.rand(2, 3, 32, 32)).is_contiguous()


def test_a_composite_gives_each_part_half_of_the_noise():
    torch.manual_seed(0)
    generator, images = Composite(), torch.rand(2, 3, 32, 32)
    noise = torch.randn(2, 20)
    moved = generator.geometric.transform(images, noise[:, :10])
    assert torch.equal(generator(images, noise), generator.photometric.transform(moved, noise[:, 10:]))


@pytest.mark.parametrize("grid", [1, 8])
@pytest.mark.parametrize("size", [(32, 32), (6, 40)])
def test_cells_are_enlarged_as_images_are(grid, size):
    cells = torch.randn(2, 3, grid, grid, dtype=torch.double)
    expected = F.interpolate(cells, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(enlarged(cells, *size), expected)


@pytest.mark.parametrize("kind", ["photometric", "composite"])
def test_with_a_grid_an_even_ground_becomes_uneven(kind):
    torch.manual_seed(0)
    images = torch.full((4, 3, 32, 32), 0.3)
    even, uneven = (build_generator(kind, grid=grid)(images)[..., 4:-4, 4:-4] for grid in (0, 8))
    assert even.std(dim=(2, 3)).max() < 1e-4 < 0.01 < uneven.std(dim=(2, 3)).max()


@pytest.mark.parametrize("kind", ["photometric", "composite"])
def test_a_share_of_the_draws_has_an_uneven_ground(kind):
    torch.manual_seed(0)
    images = torch.full((1000, 3, 16, 16), 0.3)
    made = build_generator(kind, grid=8, grid_share=0.25)(images)[..., 4:-4, 4:-4]
    spread = made.std(dim=(2, 3)).amax(dim=1)
    assert 0.2 < (spread > 1e-3).float().mean() < 0.3 and (spread < 1e-4).float().mean() > 0.7
    generator = build_generator("photometric", grid=8, grid_share=0.5)
    everywhere = build_generator("photometric", grid=8)
    everywhere.load_state_dict(generator.state_dict())
    noise = torch.tensor([[-0.1], [0.1]]).expand(-1, 10)
    one, other = (each(images[:2], noise) for each in (generator, everywhere))
    assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])


@pytest.mark.parametrize("share", [0.0, -1.0, 2.0, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(UsageError, match="grid_share is"):
        build_generator("photometric", grid=8, grid_share=share)


def test_settings_of_an_older_generator_have_no_grid():
    settings = generator_settings(Photometric())
    assert settings.pop("grid") == 0 and settings.pop("grid_share") == 1.0
    build_generator(**settings).load_state_dict(Photometric().state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [0, 8])
def test_settings_rebuild_a_generator(kind, grid):
    generator = build_generator(kind, channels=1, width=4, noise=3, grid=grid, grid_share=0.5)
    again = build_generator(**generator_settings(generator))
    again.load_state_dict(generator.state_dict())
    image, noise = torch.rand(1, 1, 32, 32), torch.randn(1, generator.noise)
    assert torch.equal(again(image, noise), generator(image, noise))


@pytest.mark.parametrize(
    ("images", "noise", "said"),
    [
        (torch.rand(2, 1, 32, 32), None, "takes 3 channel"),
        (torch.rand(32, 32), None, "shape (32, 32)"),
        (torch.rand(2, 3, 32, 32), torch.randn(1, 10), "must be (2, 10)"),
        (255 * torch.ones(2, 3, 32, 32), None, "pixels from 255 to 255"),
        (torch.full((2, 3, 32, 32), torch.nan), None, "image 0 has pixels that are not numbers"),
    ],
)
def test_wrong_images_or_noise_are_refused(images, noise, said):
    with pytest.raises(UsageError) as error:
        Photometric()(images, noise)
    assert said in str(error.value)


def test_an_unknown_kind_is_refused():
    with pytest.raises(UsageError, match="photometric, geometric, composite"):
        build_generator("magic")
