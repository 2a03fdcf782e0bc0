"""Domains: what is refused, how they are fitted and split, and where they come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from expkit.errors import UsageError
from pden.data import Domain, Home, from_dataset, load_domain, parse_target
from pden.data.augment import crop_flip
from pden.data.domain import fit_images, to_uint8
from pden.data.folder import load_masks, read_image
from tiny_domains import tiny_domain

HOME = Home((), Path("nowhere"), download=False)


def write_folder(folder: Path, sizes: dict[str, tuple[int, int]]) -> None:
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (200, 10, 30)).save(folder / name)


def test_labels_out_of_range_are_refused():
    with pytest.raises(UsageError, match="label 7 is out of range; there are 2 classes"):
        Domain("d", torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 7]), ("a", "b"))


def test_pixels_that_are_not_numbers_are_refused_by_place():
    images = torch.rand(5, 1, 4, 4)
    images[3, 0, 1, 1] = torch.nan
    with pytest.raises(UsageError, match="image 3 has pixels that are not numbers"):
        to_uint8(images, "d")
    with pytest.raises(UsageError, match=r"in \[0, 1\]"):
        to_uint8(images.nan_to_num(255.0), "d")


def test_fitting_resizes_bilinearly_and_copies_grey():
    domain = tiny_domain(4, channels=1, size=16)
    fitted = domain.fitted(32, 3)
    assert fitted.images.shape == (4, 3, 32, 32)
    assert torch.equal(fitted.images[:, 0], fitted.images[:, 2])
    naive = torch.nn.functional.interpolate(domain.images.float(), (32, 32), mode="bilinear", align_corners=False)
    assert (fitted.images[:, :1].float() - naive).abs().max() <= 0.5
    assert domain.fitted(0, 1).images.shape == (4, 1, 16, 16)


def test_one_channel_of_colour_is_its_luminance_as_in_a_folder():
    colour = tiny_domain(4)
    grey = colour.fitted(16, 1).images
    for image, found in zip(colour.images, grey, strict=True):
        naive = pil_to_tensor(to_pil_image(image).convert("L"))
        assert (found.float() - naive.float()).abs().max() <= 1
    with pytest.raises(UsageError, match="2 channels; the model takes 1"):
        fit_images(colour.images[:, :2], 16, 1, "d")


def test_a_split_is_by_class_disjoint_and_the_same_again():
    domain = tiny_domain(60)
    rest, held = domain.split(0.2, seed=3)
    assert (len(rest), len(held)) == (48, 12)
    assert held.labels.bincount().tolist() == [4, 4, 4]
    whole = sorted(map(tuple, torch.cat([rest.images, held.images]).flatten(1).tolist()))
    assert whole == sorted(map(tuple, domain.images.flatten(1).tolist()))
    assert torch.equal(held.images, domain.split(0.2, seed=3)[1].images)
    with pytest.raises(UsageError, match="leaves a part empty"):
        domain.split(0.001, seed=0)


def test_any_torch_dataset_becomes_a_domain():
    pairs = [(torch.rand(3, 8, 8), 1), (torch.rand(3, 8, 8), 0)]
    domain = from_dataset(pairs, "pairs")
    assert domain.images.dtype == torch.uint8 and domain.labels.tolist() == [1, 0] and domain.classes == ("0", "1")
    pictures = [(Image.new("L", (8, 8), 9), 0), (Image.new("L", (8, 8), 9), 1)]
    assert from_dataset(pictures, "pictures", ["cat", "dog"]).images.unique().tolist() == [9]
    with pytest.raises(UsageError, match=r"image 1 is \(3, 9, 8\)"):
        from_dataset([pairs[0], (torch.rand(3, 9, 8), 0)], "odd")


def test_arrays_of_one_file(tmp_path):
    file = tmp_path / "set.npz"
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    np.savez(file, x=images, y=np.array([0, 1, 2, 0, 1, 2]), wrong=np.zeros(6))
    domain = load_domain(f"mine={file}#x,y", HOME, size=16)
    assert domain.name == "mine" and domain.classes == ("0", "1", "2")
    assert np.array_equal(domain.images.permute(0, 2, 3, 1).numpy(), images)
    for spec, said in [
        (f"{file}#x,z", 'no array "z"; it has x, y, wrong'),
        (f"{file}#x", "FILE.npz#x_key,y_key"),
        (f"{file}#x,wrong", "needed are integers"),
        (f"{file}#y,y", "images of int64"),
        (f"{tmp_path}/none.npz#x,y", "does not exist"),
    ]:
        with pytest.raises(UsageError) as error:
            load_domain(spec, HOME)
        assert said in str(error.value)


def test_arrays_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "bad.npz", x=np.array([{"a": 1}], dtype=object), y=np.array([0]))
    with pytest.raises(UsageError, match="cannot be read"):
        load_domain(f"{tmp_path}/bad.npz#x,y", HOME)


def test_folders_of_classes(tmp_path):
    write_folder(tmp_path / "photo", {"cat/1.png": (20, 20), "cat/2.jpg": (20, 20), "dog/1.png": (20, 20)})
    domain = load_domain(str(tmp_path / "photo"), HOME, size=16)
    assert domain.name == "photo" and domain.classes == ("cat", "dog")
    assert domain.labels.tolist() == [0, 0, 1] and domain.images.shape == (3, 3, 16, 16)


def test_sizes_that_differ_need_a_size(tmp_path):
    write_folder(tmp_path / "d", {"cat/1.png": (20, 20), "dog/1.png": (24, 20)})
    with pytest.raises(UsageError, match=r"24x20, .* is 20x20; set data\.size"):
        load_domain(str(tmp_path / "d"), HOME, size=0)
    assert load_domain(str(tmp_path / "d"), HOME, size=16).images.shape == (2, 3, 16, 16)


def test_broken_folders_are_refused(tmp_path):
    (tmp_path / "flat").mkdir()
    with pytest.raises(UsageError, match="domain/class/image"):
        load_domain(str(tmp_path / "flat"), HOME)
    write_folder(tmp_path / "d", {"cat/1.png": (20, 20)})
    (tmp_path / "d" / "dog").mkdir()
    with pytest.raises(UsageError, match='class "dog" has no images'):
        load_domain(str(tmp_path / "d"), HOME)
    (tmp_path / "d" / "dog" / "1.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"1\.png is not a readable image"):
        load_domain(str(tmp_path / "d"), HOME)


def test_masks_go_with_images_by_name(tmp_path):
    write_folder(tmp_path, {"images/a.png": (6, 4), "images/b.png": (6, 4)})
    (tmp_path / "masks").mkdir()
    mask = np.tile(np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8), (4, 1))
    for name in ("a", "b"):
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
    domain = load_masks(tmp_path / "images", tmp_path / "masks", "m", ("x", "y"), void=2)
    assert domain.dense and domain.labels.shape == (2, 4, 6)
    assert domain.labels[0, 0].tolist() == [0, 1, 255, 0, 1, 255] and domain.present == [0, 1]
    (tmp_path / "masks" / "b.png").unlink()
    Image.fromarray(mask[:2]).save(tmp_path / "masks" / "a.png")
    with pytest.raises(UsageError, match=r"a\.png is 6x4, its mask is 6x2; all images and masks"):
        load_masks(tmp_path / "images", tmp_path / "masks", "m", ("x", "y"))
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    with pytest.raises(UsageError, match=r"b\.png has no mask"):
        load_masks(tmp_path / "images", tmp_path / "masks", "m", ("x", "y"))


@pytest.mark.parametrize("names", [None, "road\nsky\n"])
def test_a_folder_of_images_and_masks_is_a_segmentation_domain(names, tmp_path):
    write_folder(tmp_path, {"images/a.jpg": (32, 24)})
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.tile(np.array([0, 0, 1, 1], dtype=np.uint8), (24, 8))).save(tmp_path / "masks" / "a.png")
    if names is not None:
        (tmp_path / "classes.txt").write_text(names)
    domain = load_domain(f"streets={tmp_path}", HOME, size=12)
    assert domain.images.shape == (1, 3, 12, 16) and domain.labels.shape == (1, 12, 16)
    assert domain.classes == (("0", "1") if names is None else ("road", "sky")) and domain.present == [0, 1]


def test_unknown_domains_name_the_nearest():
    with pytest.raises(UsageError, match='did you mean "mnist-m"'):
        load_domain("mnist_m", HOME)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("usps", ("usps", "usps")),
        ("a=b.npz#x,y", ("a", "b.npz#x,y")),
        ("d.npz#usps_x,usps_y", ("usps", "d.npz#usps_x,usps_y")),
    ],
)
def test_targets_may_be_named(text, expected):
    assert parse_target(text) == expected


def test_data_are_looked_for_in_the_flag_then_the_environment_then_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPKIT_DATA", str(tmp_path / "env"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder in ("flag", "env", "cache/pden"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_text(folder)
    home = Home.of(tmp_path / "flag")
    for folder in ("flag", "env", "cache/pden"):
        found = home.find("file")
        assert found is not None and found.read_text() == folder
        found.unlink()
    assert home.find("file") is None


def test_crop_flip_moves_images_and_pixel_labels_alike():
    images = torch.arange(16 * 16).float().view(1, 1, 16, 16).expand(4, 1, -1, -1)
    moved, labels = crop_flip(images, images[:, 0].long(), torch.Generator().manual_seed(0))
    assert torch.equal(moved[:, 0].long(), labels)
    assert moved.shape == images.shape and not torch.equal(moved, images)
    steps = moved[:, 0, 8, 8] - moved[:, 0, 8, 7]  # one to the right, or mirrored one to the left
    assert set(steps.tolist()) == {1.0, -1.0}


def assert_refused(spec: str, said: str, folder: Path) -> None:
    with pytest.raises(UsageError) as error:
        pden_load(spec, folder)
    assert said in str(error.value) and "\n" not in str(error.value)


def pden_load(spec: str, folder: Path):
    return load_domain(spec, Home((folder,), folder, download=False))


@pytest.mark.parametrize("name", ["digits.npz", "cut.npz", "one.npy"])
def test_damaged_arrays_are_refused_whether_named_or_found(name, tmp_path):
    whole = tmp_path / "whole.npz"
    np.savez(whole, usps_test_x=np.zeros((40, 16, 16), dtype=np.uint8), usps_test_y=np.zeros(40, dtype=np.int64))
    if name == "one.npy":
        np.save(tmp_path / name, np.zeros(3))
    else:
        (tmp_path / name).write_bytes(whole.read_bytes()[: 60 if name == "cut.npz" else -200])
    assert_refused(f"{tmp_path / name}#usps_test_x,usps_test_y", name, tmp_path)
    if name == "digits.npz":
        assert_refused("usps", "digits.npz cannot be read as .npz", tmp_path)


def test_a_label_that_is_an_accident_is_refused_before_it_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 16, 16), dtype=np.uint8), y=np.array([0, 10**12]))
    assert_refused(f"{tmp_path / 'a.npz'}#x,y", "label 1000000000000 is out of range", tmp_path)


def png(path: Path, array: np.ndarray) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("damage", ["cut", "header", "chunk", "empty", "text"])
def test_damaged_images_are_refused_by_name(damage, tmp_path):
    file = tmp_path / "d" / "a" / "0.png"
    whole = png(file, np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    broken = {
        "cut": whole[:200],
        "header": whole[:8] + b"\xff" * 4 + whole[12:],
        "chunk": whole[:60] + b"\x00" * 40 + whole[100:],
        "empty": b"",
        "text": b"no picture",
    }
    file.write_bytes(broken[damage])
    assert_refused(str(tmp_path / "d"), "0.png is not a readable image", tmp_path)


def test_an_image_of_absurd_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    png(tmp_path / "d" / "a" / "0.png", np.zeros((40, 40), dtype=np.uint8))
    assert_refused(str(tmp_path / "d"), "is not a readable image", tmp_path)


def test_sixteen_bit_grey_keeps_its_shades(tmp_path):
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    png(tmp_path / "0.png", ramp)
    assert read_image(tmp_path / "0.png", channels=1).flatten().tolist() == list(range(256))


def test_large_images_are_resized_a_few_at_a_time(monkeypatch):
    images = torch.randint(0, 256, (6, 3, 20, 20), dtype=torch.uint8)
    whole = fit_images(images, 8, 3, "x")
    monkeypatch.setattr("pden.data.domain._FLOATS", 2500)  # two images
    seen = []
    real = torch.nn.functional.interpolate
    monkeypatch.setattr(
        torch.nn.functional, "interpolate", lambda part, *a, **k: seen.append(len(part)) or real(part, *a, **k)
    )
    assert torch.equal(fit_images(images, 8, 3, "x"), whole) and seen == [2, 2, 2]


@pytest.mark.parametrize("count", [1, 3, 7, 59, 60, 100])
def test_a_part_of_a_sorted_domain_has_all_its_classes(count):
    domain = tiny_domain(60)
    domain = domain.take(domain.labels.sort(stable=True).indices)
    part = domain.spread(count)
    assert len(part) == min(count, 60)
    assert part.present == (domain.present if count >= 3 else [0])


def test_tensors_of_another_kind_are_refused():
    labels = torch.arange(6) % 2
    for images, given, said in (
        (torch.rand(6, 3, 8, 8), labels, "float32 .* needed are uint8"),
        (torch.zeros(6, 8, 8, dtype=torch.uint8), labels, r"uint8 \(6, 8, 8\)"),
        (torch.zeros(6, 3, 8, 8, dtype=torch.uint8), labels.float(), "labels are float32"),
    ):
        with pytest.raises(UsageError, match=said):
            Domain("odd", images, given, ("a", "b"))


class Pairs(torch.utils.data.Dataset):
    """Any items."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_odd_datasets_are_refused_and_grey_ones_without_channels_taken():
    image, broken = torch.rand(3, 8, 8), torch.full((3, 8, 8), torch.nan)
    for dataset, said in (
        (Pairs((image, 0), (broken, 1)), "image 1 has pixels that are not numbers"),
        (Pairs((image, 0.5)), "label 0 is float32"),
        (Pairs((image, torch.tensor([0, 1]))), "label 0 is int64"),
        (Pairs((np.zeros((8, 8, 3), np.uint8), 0)), "item 0 is no pair of an image"),
        (Pairs(image), "item 0 is no pair"),
        (iter([(image, 0)]), "no length or no items"),
    ):
        with pytest.raises(UsageError, match=said):
            from_dataset(dataset, "odd")
    grey = from_dataset(Pairs((torch.rand(8, 8), 0), (torch.rand(8, 8), 1)), "grey")
    assert grey.images.shape == (2, 1, 8, 8)
    whole = Pairs((image, 0), (image, 1))
    whole.classes = ["cat", "dog"]
    assert from_dataset(torch.utils.data.Subset(whole, [0]), "part").classes == ("cat", "dog")


def test_transparent_pixels_are_white_and_opaque_ones_what_they_are(tmp_path):
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((200, 0, 0, 255), (0, 0, 4, 8))
    picture.save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png")
    assert found[:, 0, 0].tolist() == [200, 0, 0] and found[:, 0, 7].tolist() == [255, 255, 255]
    picture.convert("LA").save(tmp_path / "b.png")
    assert int(read_image(tmp_path / "b.png", channels=1)[0, 0, 7]) == 255


def test_an_image_is_upright_as_its_exif_says(tmp_path):
    picture = Image.new("L", (8, 4))
    picture.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be turned by 90 degrees clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    found = read_image(tmp_path / "a.png", channels=1)
    assert found.shape == (1, 8, 4) and int(found[0, 0, 3]) == 255


def test_pixels_of_an_unknown_range_are_refused_and_16_bits_are_not(tmp_path):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "f.tiff")
    Image.fromarray(np.full((8, 8), 1 << 20, np.int32)).save(tmp_path / "i.tiff")
    for name, said in (("f.tiff", "floats"), ("i.tiff", "beyond 16 bits")):
        with pytest.raises(UsageError, match=said):
            read_image(tmp_path / name)
    Image.fromarray(np.full((8, 8), 51 * 256, np.int32)).save(tmp_path / "whole.tiff")
    assert read_image(tmp_path / "whole.tiff").unique().tolist() == [51]


def test_a_palette_image_of_a_dataset_has_its_colours():
    picture = Image.new("RGB", (8, 8), (10, 200, 30))
    found = from_dataset([(picture.convert("P"), 0), (picture.convert("RGBA"), 1)], "d")
    assert found.images.shape == (2, 3, 8, 8)
    assert found.images[1, :, 0, 0].tolist() == [10, 200, 30]
    assert (found.images[0, :, 0, 0].float() - torch.tensor([10.0, 200.0, 30.0])).abs().max() < 30


def test_a_mask_painted_in_colours_is_refused(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (0, 0, 128)).save(tmp_path / name / "a.png")
    with pytest.raises(UsageError, match="of mode RGB; its pixels must be labels"):
        load_masks(tmp_path / "images", tmp_path / "masks", "d", ("a", "b"))


def test_labels_of_pixels_stay_under_their_pixels_when_both_are_resized():
    rows = torch.arange(18) // 2 % 3
    labels = rows[:, None].expand(18, 18)[None].contiguous()
    images = (labels * 100).byte()[:, None]
    found = Domain("d", images, labels, ("a", "b", "c")).fitted(9, 1)
    assert (found.images[0, 0].float() / 100 - found.labels[0]).abs().max() < 0.5
    third = Domain("d", images, labels, ("a", "b", "c")).fitted(6, 1)
    assert torch.equal(third.labels[0, :, 0], labels[0, 1::3, 0])  # the pixel in the middle
    with pytest.raises(UsageError, match="labels of 18x18 on images of 9x9"):
        Domain("d", images[:, :, :9, :9], labels, ("a", "b", "c"))


def test_no_images_are_refused_as_floats_too():
    with pytest.raises(UsageError, match="0 images"):
        Domain("d", to_uint8(torch.zeros(0, 3, 8, 8), "d"), torch.zeros(0, dtype=torch.int64), ("a",))
