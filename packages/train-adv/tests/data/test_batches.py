"""Batches: every image once an epoch, the same after an interruption, dealt out over processes."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from expkit.distributed import World
from expkit.errors import UsageError
from train_adv.data.batches import Batches, augmented, erased
from train_adv.data.dataset import Augment, Resident
from train_adv.data.folder import image_folder

CPU = torch.device("cpu")
ALONE = World(0, 1, 0)
PLAIN = Augment(0, False)


def split(count: int = 20) -> Resident:
    values = torch.arange(count, dtype=torch.uint8)
    return Resident(values.view(-1, 1, 1, 1).expand(-1, 1, 4, 4).clone(), torch.arange(count))


def batches(world: World = ALONE, augment: Augment = PLAIN, size: int = 4) -> Batches:
    return Batches(split(), batch_size=size, seed=1, augment=augment, device=CPU, world=world)


def test_an_epoch_holds_every_image_once_in_another_order_each_time():
    epochs = [[label for _, labels in batches().epoch(epoch) for label in labels.tolist()] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20)) and epochs[0] != epochs[1]


def test_an_epoch_can_be_entered_anywhere():
    made = batches(augment=Augment(2, True))
    whole, rest = list(made.epoch(3)), list(made.epoch(3, first=2))
    assert len(rest) == 3
    for (images, labels), (again, same) in zip(whole[2:], rest, strict=True):
        assert torch.equal(images, again) and torch.equal(labels, same)


def test_processes_share_each_batch():
    parts = [list(batches(World(rank, 2, rank)).epoch(0)) for rank in range(2)]
    whole = list(batches().epoch(0))
    for index, (_, labels) in enumerate(whole):
        assert torch.equal(torch.cat([parts[0][index][1], parts[1][index][1]]), labels)


def test_images_are_floats_in_the_unit_interval():
    images, labels = next(iter(batches().epoch(0)))
    assert images.dtype == torch.float32 and torch.allclose(images[:, 0, 0, 0] * 255, labels.float())


def test_crops_and_flips_are_those_of_loops():
    images = torch.randint(256, (6, 3, 5, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    got = augmented(images, Augment(2, True), torch.Generator().manual_seed(7))
    draws = torch.Generator().manual_seed(7)
    flips = torch.rand(6, 1, generator=draws)[:, 0] < 0.5
    shifts = torch.randint(5, (2, 6, 1), generator=draws)[:, :, 0]
    assert flips.any() and not flips.all()
    for index in range(6):
        padded = torch.zeros(3, 9, 9, dtype=torch.uint8)
        padded[:, 2:7, 2:7] = images[index]
        row, column = shifts[:, index].tolist()
        crop = padded[:, row : row + 5, column : column + 5]
        # The columns of the crop are read backwards where it is mirrored.
        assert torch.equal(got[index], crop.flip(2) if flips[index] else crop)


def test_a_share_of_images_loses_a_rectangle_each_of_the_area_and_shape_that_are_said():
    images = torch.full((4000, 3, 32, 32), 255, dtype=torch.uint8)
    got = erased(images, 0.5, torch.Generator().manual_seed(0))
    black = (got == 0).all(1)
    assert torch.equal(black, (got == 0).any(1)) and set(got.unique().tolist()) == {0, 255}
    rows, columns = black.any(2).sum(1), black.any(1).sum(1)  # equal to the sides, if it is one rectangle
    assert torch.equal(black.flatten(1).sum(1), rows * columns)
    for lines, sides in ((black.any(2), rows), (black.any(1), columns)):
        places = torch.arange(32).expand_as(lines)
        span = places.where(lines, -1).amax(1) - places.where(lines, 32).amin(1) + 1
        assert torch.equal(span[sides > 0], sides[sides > 0])
    hit = rows > 0
    assert hit.float().mean() == pytest.approx(0.5, abs=0.03)
    share = (rows * columns)[hit] / 1024
    assert (
        share.min() < 0.03
        and share.max() > 0.3
        and share.max() < 0.36
        and share.mean() == pytest.approx(0.175, abs=0.01)
    )
    ratio = (rows[hit] / columns[hit]).log()
    assert ratio.abs().max() < 1.4 and ratio.mean().abs() < 0.06 and ratio.std() > 0.5
    where = black.float().mean(0)
    assert where.min() > 0  # no place is spared, not the corners
    assert torch.stack([where.flip(0), where.flip(1), where.T]).sub(where).abs().max() < 0.05  # and no side preferred


def test_nothing_is_erased_or_drawn_unless_asked():
    images = torch.randint(256, (6, 3, 5, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    draws = torch.Generator().manual_seed(7)
    before = draws.get_state()
    assert torch.equal(augmented(images, PLAIN, draws), images) and torch.equal(draws.get_state(), before)
    assert not torch.equal(augmented(images, Augment(0, False, 1.0), draws), images)


def test_the_share_that_is_erased_is_the_one_that_was_asked_for():
    white = Resident(torch.full((2000, 1, 8, 8), 255, dtype=torch.uint8), torch.arange(2000))
    given = Batches(white, batch_size=500, seed=1, augment=Augment(0, False, 0.3), device=CPU, world=ALONE)
    images = torch.cat([batch for batch, _ in given.epoch(0)])
    assert float((images.amin((1, 2, 3)) == 0).float().mean()) == pytest.approx(0.3, abs=0.04)


def test_folders_are_decoded_by_workers_into_the_same_batches(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(10):
            Image.new("RGB", (8, 8), (index, 0, 100)).save(tmp_path / name / f"{index}.png")
    made = []
    for limit in (4.0, 0.0):
        data = image_folder(tmp_path, size=8, resident_gib=limit)
        made.append(
            list(
                Batches(
                    data.train, batch_size=4, seed=0, augment=data.augment, device=CPU, world=ALONE, workers=1
                ).epoch(0)
            )
        )
    for (images, labels), (again, same) in zip(*made, strict=True):
        assert torch.equal(images, again) and torch.equal(labels, same)


@pytest.mark.parametrize(
    ("size", "world", "said"), [(1, ALONE, "no neighbours"), (21, ALONE, "no more"), (5, World(0, 2, 0), "divide")]
)
def test_batches_that_cannot_be_are_refused(size, world, said):
    with pytest.raises(UsageError, match=said):
        batches(world, size=size)
