"""The embedded digits, and published formats on tiny files of the same form."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from expkit.errors import UsageError
from pden.data import Home, load_domain
from pden.data.cifar import expand_levels, read_batch, unpickle_arrays
from pden.data.embedded import NAMES, TARGETS, blend_with_photographs, render_digits


def home(folder: Path) -> Home:
    return Home((folder,), folder, download=False)


@pytest.fixture
def few(monkeypatch):
    """Published sets may have any number of images."""
    monkeypatch.setattr("pden.data.digits.COUNTS", {})


@pytest.mark.parametrize("name", NAMES)
def test_embedded_domains_are_whole_and_the_same_again(name, tmp_path):
    first, second = (load_domain(name, home(tmp_path)) for _ in range(2))
    assert first.images.shape[1:] == (3, 32, 32) and first.present == list(range(10))
    assert torch.equal(first.images, second.images)


def test_embedded_targets_share_no_image_with_the_source(tmp_path):
    source = {each.numpy().tobytes() for each in load_domain("digits", home(tmp_path)).images}
    held = load_domain("digits-test", home(tmp_path)).images
    assert (len(source), len(held)) == (1200, 597)
    assert not any(each.numpy().tobytes() in source for each in held)
    assert len(TARGETS) == 5


def test_blending_is_the_absolute_difference_with_a_photograph():
    black = blend_with_photographs(torch.zeros(1, 1, 32, 32, dtype=torch.uint8), seed=0)
    white = blend_with_photographs(torch.full((1, 1, 32, 32), 255, dtype=torch.uint8), seed=0)
    assert torch.equal(black, 255 - white)


def test_rendered_digits_depend_on_the_seed_alone():
    images, labels = render_digits(12, seed=1)
    again, same = render_digits(12, seed=1)
    assert torch.equal(images, again) and torch.equal(labels, same)
    assert not torch.equal(images, render_digits(12, seed=2)[0])
    assert (images.float().flatten(1).std(dim=1) > 5).all()  # no digit that cannot be seen


def write_idx(path: Path, array: np.ndarray) -> None:
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + array.tobytes())


def test_mnist_in_its_idx_files(tmp_path, few):
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 10
    for part in ("train", "t10k"):
        write_idx(tmp_path / "MNIST" / "raw" / f"{part}-images-idx3-ubyte", images)
        write_idx(tmp_path / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte", labels)
    domain = load_domain("mnist10k", home(tmp_path), size=28, channels=1)
    assert np.array_equal(domain.images[:, 0].numpy(), images) and domain.labels.tolist() == labels.tolist()


def test_syn_maps_label_10_to_0(tmp_path, few):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    savemat(tmp_path / "synth_test_32x32.mat", {"X": pixels, "y": np.array([[10], [1], [9], [10]])})
    domain = load_domain("syn", home(tmp_path))
    assert domain.labels.tolist() == [0, 1, 9, 0]
    assert np.array_equal(domain.images[2].permute(1, 2, 0).numpy(), pixels[..., 2])


def test_mnist_m_in_ganins_layout(tmp_path, few):
    folder = tmp_path / "mnist_m" / "mnist_m_test"
    folder.mkdir(parents=True)
    for name, grey in (("00000000.png", 10), ("00000001.png", 20)):
        Image.new("RGB", (32, 32), (grey, 0, 0)).save(folder / name)
    (folder.parent / "mnist_m_test_labels.txt").write_text("00000001.png 7\n00000000.png 3\n")
    domain = load_domain("mnist-m", home(tmp_path))
    assert domain.labels.tolist() == [7, 3] and domain.images[:, 0, 0, 0].tolist() == [20, 10]


def test_mnist_lies_in_one_folder_for_all_its_parts(tmp_path, few):
    for part in ("train", "t10k"):
        write_idx(tmp_path / "mnist" / "MNIST" / "raw" / f"{part}-images-idx3-ubyte", np.zeros((3, 28, 28), np.uint8))
        write_idx(tmp_path / "mnist" / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte", np.arange(3, dtype=np.uint8))
    assert all(len(load_domain(name, home(tmp_path))) == 3 for name in ("mnist", "mnist10k", "mnist-test"))


def test_one_file_of_arrays_may_hold_all_digits(tmp_path, few):
    images = np.zeros((3, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "digits.npz", usps_test_x=images, usps_test_y=np.array([9, 0, 1]))
    assert load_domain("usps", home(tmp_path)).labels.tolist() == [9, 0, 1]


def test_what_mnist_m_was_not_made_of_is_the_end_of_mnists_test(tmp_path):
    labels = np.arange(10_000) // 1000
    np.savez(tmp_path / "digits.npz", mnist_test_x=np.zeros((10_000, 4, 4), np.uint8), mnist_test_y=labels)
    assert load_domain("mnist-rest", home(tmp_path)).labels.tolist() == [9] * 999


def test_held_out_digits_lie_on_the_last_of_cifars_test_pictures(tmp_path, monkeypatch):
    digits = np.zeros((10_000, 28, 28), np.uint8)
    digits[9001, 3, 4], digits[9001, 3, 5], digits[:9001] = 255, 127, 255
    np.savez(tmp_path / "digits.npz", mnist_test_x=digits, mnist_test_y=np.zeros(10_000, int))
    pictures = torch.arange(10_000)[:, None, None, None].remainder(251).to(torch.uint8).expand(-1, 3, 32, 32).clone()
    pictures[9001, :, 5, 6] = torch.tensor([10, 20, 30])  # under the digit's first bright pixel
    monkeypatch.setattr(
        "pden.data.cifar._cifar10", lambda home, train: (pictures, torch.zeros(10_000, dtype=torch.long))
    )
    found = load_domain("mnist-rest-photo", home(tmp_path), size=0).images
    assert found.shape == (999, 3, 28, 28) and found[:, 0, 0, 0].tolist() == [
        each % 251 for each in range(9001, 10_000)
    ]
    assert found[0, :, 3, 4].tolist() == [245, 235, 225]  # a stroke inverts
    assert found[0, :, 3, 5].tolist() == [9001 % 251] * 3  # what is not brighter than half is none


@pytest.mark.parametrize(
    ("count", "side", "said"),
    [
        (9500, 28, "test images: mnist-rest has 499 images here and 999 as published"),
        (10_000, 36, "digits of 36x36 on pictures of 32x32"),
    ],
)
def test_digits_that_do_not_go_with_the_pictures_are_refused(count, side, said, tmp_path, monkeypatch):
    arrays = {"mnist_test_x": np.zeros((count, side, side), np.uint8), "mnist_test_y": np.zeros(count, int)}
    np.savez(tmp_path / "digits.npz", **arrays)
    pictures = torch.zeros(10_000, 3, 32, 32, dtype=torch.uint8)
    monkeypatch.setattr("pden.data.cifar._cifar10", lambda home, train: (pictures, torch.zeros(10_000).long()))
    with pytest.raises(UsageError, match=said):
        load_domain("mnist-rest-photo", home(tmp_path), size=0)


def test_held_out_digits_on_pictures_say_what_they_are_made_of(tmp_path):
    np.savez(
        tmp_path / "digits.npz", mnist_test_x=np.zeros((10_000, 28, 28), np.uint8), mnist_test_y=np.zeros(10_000, int)
    )
    with pytest.raises(UsageError, match="mnist-rest-photo is made of MNIST's and CIFAR-10's test images: "):
        load_domain("mnist-rest-photo", home(tmp_path))


@pytest.mark.parametrize("count", [2006, 2008])
def test_a_published_set_has_all_its_images(count, tmp_path):
    np.savez(tmp_path / "digits.npz", usps_test_x=np.zeros((count, 4, 4), np.uint8), usps_test_y=np.zeros(count, int))
    with pytest.raises(UsageError, match=f"usps has {count} images here and 2007 as published"):
        load_domain("usps", home(tmp_path))


@pytest.mark.parametrize(
    "name", ["mnist10k", "usps", "svhn", "mnist-m", "syn", "chars74k", "cifar10", "pacs/photo", "cifar10-c/fog/1"]
)
def test_absent_data_say_what_to_put_where(name, tmp_path):
    with pytest.raises(UsageError, match=r"is not in|put|unpack") as error:
        load_domain(name, home(tmp_path))
    assert "\n" not in str(error.value)


def test_usps_in_libsvms_format(tmp_path, few):
    import bz2

    rows = [
        "10 " + " ".join(f"{k}:{-1.0 if k % 2 else 1.0}" for k in range(1, 257)),
        "1 " + " ".join(f"{k}:0" for k in range(1, 257)),
    ]
    (tmp_path / "usps.t.bz2").write_bytes(bz2.compress("\n".join(rows).encode()))
    domain = load_domain("usps", home(tmp_path), size=16, channels=1)
    assert domain.labels.tolist() == [9, 0]
    assert domain.images[0, 0, 0, :4].tolist() == [0, 255, 0, 255]


def test_a_cifar_batch_is_read_only_with_its_own_md5(tmp_path):
    data = {"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "labels": [1, 2]}
    file = tmp_path / "batch"
    file.write_bytes(pickle.dumps(data, protocol=4))
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    found = read_batch(file, md5)
    assert np.array_equal(found["data"], data["data"]) and found["labels"] == [1, 2]
    with pytest.raises(UsageError, match="damaged or altered"):
        read_batch(file, "0" * 32)


class Evil:
    def __reduce__(self):
        return (print, ("called",))


def test_the_unpickler_calls_nothing_but_arrays(capsys):
    with pytest.raises(UsageError, match="not allowed"):
        unpickle_arrays(pickle.dumps({"data": Evil()}), "evil")
    assert "called" not in capsys.readouterr().out


def test_published_cifar_10_c_takes_the_levels_in_order(tmp_path):
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    images = np.zeros((50_000, 1, 1, 3), dtype=np.uint8)
    images[20_000:30_000] = 3
    np.save(folder / "fog.npy", images)
    np.save(folder / "labels.npy", np.tile(np.arange(10), 5000))
    domain = load_domain("cifar10-c/fog/3", home(tmp_path), size=0)
    assert len(domain) == 10_000 and domain.images.unique().tolist() == [3]


def test_levels_become_15_or_19_corruptions():
    assert len(expand_levels("cifar10-c/5")) == 15
    assert len(expand_levels("cifar10-c-recomputed/5/all")) == 19
    assert len(expand_levels("cifar10-c")) == 75
    assert expand_levels("cifar10-c/fog/2") == ["cifar10-c/fog/2"] and expand_levels("usps") == ["usps"]
    named = expand_levels("mine=cifar10-c/5")
    assert len(named) == 15 and "mine fog 5=cifar10-c/fog/5" in named
    assert expand_levels("mine=cifar10-c/fog/2") == ["mine=cifar10-c/fog/2"]


@pytest.mark.parametrize("text", ["cifar10-c/5/al", "cifar10-c/5/fog", "cifar10-c/all/5", "cifar10-c-recomputed/6"])
def test_levels_that_are_none_are_refused(text, tmp_path):
    (spec,) = expand_levels(text)
    with pytest.raises(UsageError, match=r"no corruption|level"):
        load_domain(spec, home(tmp_path))


def test_what_is_recomputed_is_called_so_whatever_its_name(tmp_path, monkeypatch):
    images = torch.randint(256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    monkeypatch.setattr("pden.data.cifar._cifar10", lambda home, train: (images, torch.arange(6)))
    for text, name in (
        ("cifar10-c-recomputed/fog/2", "CIFAR-10-C (recomputed) fog/2"),
        ("mine=cifar10-c-recomputed/fog/2", "CIFAR-10-C (recomputed) mine"),
    ):
        found = load_domain(text, home(tmp_path))
        assert found.name == name and "our own code" in found.note


def test_gzip_idx_is_not_mistaken_for_data(tmp_path):
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"half"))
    with pytest.raises(UsageError):
        load_domain("mnist", home(tmp_path))


def test_damaged_published_files_are_refused_by_name(tmp_path):
    (tmp_path / "synth_test_32x32.mat").write_bytes(b"MATLAB 5.0 no longer")
    with pytest.raises(UsageError, match=r"synth_test_32x32.mat cannot be read"):
        load_domain("syn", home(tmp_path))
    (tmp_path / "CIFAR-10-C").mkdir()
    (tmp_path / "CIFAR-10-C" / "fog.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UsageError, match=r"fog.npy cannot be read"):
        load_domain("cifar10-c/fog/1", home(tmp_path))
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for name in ("t10k-images-idx3", "t10k-labels-idx1", "train-images-idx3", "train-labels-idx1"):
        (tmp_path / "MNIST" / "raw" / f"{name}-ubyte").write_bytes(b"\x00\x00\x08\x03\x00\x00")
    with pytest.raises(UsageError, match=r"mnist-test in .* cannot be read"):
        load_domain("mnist-test", home(tmp_path))
