"""The source in disguise: legible, the same in every run, and no target's recipe."""

from __future__ import annotations

import pytest
import torch

from pden.evaluation.accuracy import evaluate
from pden.evaluation.disguise import disguises, grounded, textured
from pden.training.history import figures
from tiny_domains import finish, tiny_dense, tiny_domain, tiny_trainer


def naive_texture(image: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One image after one convolution with a reflected border, by loops over places, stretched to [0, 1]."""
    pad = weight.shape[-1] // 2
    padded = torch.nn.functional.pad((image * 2 - 1)[None], [pad] * 4, mode="reflect")[0]
    made = torch.empty_like(image)
    for row in range(image.shape[1]):
        for column in range(image.shape[2]):
            patch = padded[:, row : row + weight.shape[-1], column : column + weight.shape[-1]]
            made[:, row, column] = (weight * patch).sum(dim=(1, 2, 3))
    return (made - made.min()) / (made.max() - made.min())


def test_each_image_has_a_random_convolution_of_its_own():
    images = torch.rand(8, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    made = textured(images, torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(0)
    for place, size in enumerate((1, 3, 5, 7)):
        weights = torch.randn(6, 3, size, size, generator=rng).view(2, 3, 3, size, size)
        for turn in range(2):
            expected = naive_texture(images[place + 4 * turn], weights[turn])
            assert torch.allclose(made[place + 4 * turn], expected, atol=1e-4)


def test_each_image_is_on_a_ground_of_its_own_where_that_is_lighter():
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    colours = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(grounded(images, torch.Generator().manual_seed(0)), torch.maximum(images, colours), atol=1e-6)
    large = torch.zeros(2, 3, 64, 64)
    large[:, :, 20:40, 20:40] = 1
    made = grounded(large, torch.Generator().manual_seed(0))
    assert (made[:, :, 20:40, 20:40] == 1).all() and 0 <= made.min() and made.max() <= 1
    steps = (made[..., :16, 1:] - made[..., :16, :-1]).abs()
    assert made[..., :16, :].std() > 0.2 and steps.max() < 0.3  # uneven, and smooth
    assert (made[0] - made[1]).abs().mean() > 0.1


@pytest.mark.parametrize("disguised", [textured, grounded])
def test_a_single_image_or_a_flat_one_can_be_disguised(disguised):
    for count in (1, 2, 3):
        made = disguised(torch.full((count, 1, 8, 8), 0.5), torch.Generator().manual_seed(0))
        assert torch.isfinite(made).all()


def test_the_same_images_come_in_every_run_and_labels_stay():
    domain = tiny_domain(30)
    first, second = disguises(domain, 20), disguises(domain, 20)
    assert [each.name for each in first] == ["bars, texture", "bars, operations", "bars, ground"]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, domain.spread(20).labels)
        assert not torch.equal(one.images, domain.spread(20).images)


def test_labels_of_pixels_are_not_moved():
    assert [each.name for each in disguises(tiny_dense())] == ["halves, texture", "halves, ground"]


def test_a_rounds_figure_is_the_mean_over_disguises_and_decides_nothing():
    trainer = tiny_trainer()
    finish(trainer)
    shown = disguises(trainer.validation)
    found = figures(trainer.task, trainer.validation, (), shown)
    assert found["disguised"] == sum(evaluate(trainer.task, each).accuracy for each in shown) / 3
    assert list(found["disguises"]) == ["texture", "operations", "ground"]
    assert "disguised" not in figures(trainer.task, trainer.validation, ())
