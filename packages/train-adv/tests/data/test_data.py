"""Loaders on small files of the published formats, and what is done with damaged ones."""

from __future__ import annotations

import hashlib
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from expkit.errors import UsageError
from train_adv.data import published
from train_adv.data.dataset import Resident, channel_statistics, hold_out, stream_seed
from train_adv.data.fetch import Archive, download, locate
from train_adv.data.folder import Streamed, image_folder
from train_adv.data.load import digits, load_data


def write_pickle(path: Path, content: object) -> str:
    raw = pickle.dumps(content, protocol=2)
    path.write_bytes(raw)
    return hashlib.md5(raw).hexdigest()


def write_cifar(folder: Path) -> dict[str, str]:
    random = np.random.default_rng(0)
    sums = {}
    for name in [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]:
        data = random.integers(0, 256, (4, 3072), dtype=np.uint8)
        sums[name] = write_pickle(folder / name, {"data": data, "labels": [0, 1, 2, 1]})
    sums["batches.meta"] = write_pickle(folder / "batches.meta", {"label_names": ["plane", "car", "bird"]})
    return sums


def write_image(path: Path, value: int, size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 255 - value, 7)).save(path)


def test_cifar10_in_its_published_layout(tmp_path):
    data = published.read_cifar10(tmp_path, write_cifar(tmp_path))
    assert data.class_names == ("plane", "car", "bird") and data.image_shape == (3, 32, 32)
    assert len(data.train) == 20 and len(data.test) == 4
    with (tmp_path / "test_batch").open("rb") as file:
        raw = pickle.load(file)["data"]
    assert torch.equal(data.test.read(torch.tensor([1]))[0].flatten(), torch.from_numpy(raw[1]))


def test_a_changed_file_is_not_even_opened(tmp_path):
    sums = write_cifar(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(b"<html>")
    with pytest.raises(UsageError, match="not the published file"):
        published.read_cifar10(tmp_path, sums)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch ran",)

    md5 = write_pickle(tmp_path / "evil", Evil())
    with pytest.raises(UsageError, match="asks for"):
        published.read_pickle(tmp_path / "evil", md5)


def test_cifar100_has_fine_labels(tmp_path):
    sums = {"meta": write_pickle(tmp_path / "meta", {"fine_label_names": ["apple", "bear"]})}
    for name in ("train", "test"):
        content = {"data": np.zeros((3, 3072), np.uint8), "fine_labels": [0, 1, 1], "coarse_labels": [4, 4, 4]}
        sums[name] = write_pickle(tmp_path / name, content)
    data = published.read_cifar100(tmp_path, sums)
    assert data.class_names == ("apple", "bear") and data.train.labels.tolist() == [0, 1, 1]


def test_svhn_calls_ten_zero(tmp_path):
    from scipy.io import savemat

    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    savemat(tmp_path / "x.mat", {"X": images, "y": np.array([[10], [1], [9], [10]], np.uint8)})
    split = published.read_svhn(tmp_path / "x.mat")
    assert split.labels.tolist() == [0, 1, 9, 0]
    assert torch.equal(split.images[2], torch.from_numpy(images[..., 2]).permute(2, 0, 1))
    (tmp_path / "y.mat").write_bytes(b"no")
    with pytest.raises(UsageError, match="SVHN"):
        published.read_svhn(tmp_path / "y.mat")


def test_tiny_imagenet_takes_its_labels_from_the_annotations(tmp_path):
    for name in ("n01", "n02"):
        for index in range(2):
            write_image(tmp_path / "train" / name / "images" / f"{name}_{index}.JPEG", 10, (64, 64))
    write_image(tmp_path / "val" / "images" / "val_0.JPEG", 200, (64, 64))
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t62\t62\n")
    (tmp_path / "words.txt").write_text("n01\tgoldfish, Carassius\nn02\tbullfrog\n")
    data = published.read_tiny_imagenet(tmp_path, "refuse")
    assert data.class_names == ("goldfish", "bullfrog") and data.test.labels.tolist() == [1]
    assert data.image_shape == (3, 64, 64) and len(data.train) == 4


def test_a_folder_is_split_class_by_class_and_a_class_without_images_is_refused(tmp_path, capsys):
    for name, count in (("a", 20), ("b", 3), ("c", 1)):
        for number in range(count):
            write_image(tmp_path / name / f"{number}.png", 9 * number)
    (tmp_path / ".cache").mkdir()
    data = image_folder(tmp_path, size=8)
    assert data.class_names == ("a", "b", "c")
    assert data.train.labels.bincount().tolist() == [16, 2, 1] and data.test.labels.bincount().tolist() == [4, 1]
    assert 'class "c"' in capsys.readouterr().err
    (tmp_path / "void").mkdir()
    with pytest.raises(UsageError, match='class "void" has no training image'):
        image_folder(tmp_path, size=8)


def test_an_image_folder_is_resized_and_split(tmp_path):
    for name, value in (("cat", 0), ("dog", 255)):
        for index in range(10):
            write_image(tmp_path / name / f"{index}.png", value)
    data = image_folder(tmp_path, size=8)
    assert data.class_names == ("cat", "dog") and data.image_shape == (3, 8, 8)
    assert len(data.train) == 16 and len(data.test) == 4
    images = data.train.read(torch.arange(16))
    assert torch.equal(images[:, 0, 0, 0] > 128, data.train.labels.bool())


def test_a_folder_that_does_not_fit_is_decoded_along_the_way(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            write_image(tmp_path / split / name / "1.png", 40)
            write_image(tmp_path / split / name / "2.png", 80)
    held = image_folder(tmp_path, size=8)
    streamed = image_folder(tmp_path, size=8, resident_gib=0)
    assert isinstance(held.train, Resident) and isinstance(streamed.train, Streamed)
    chosen = torch.tensor([3, 0])
    assert torch.equal(held.train.read(chosen), streamed.train.select(chosen).read(torch.tensor([0, 1])))


def test_corrupt_images_are_named_counted_and_skipped_or_refused(tmp_path, capsys):
    for name in ("a", "b"):
        for index in range(6):
            write_image(tmp_path / name / f"{index}.png", 40)
    (tmp_path / "a" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(UsageError, match=r"1 of \d+ images cannot be read: .*broken\.png"):
        image_folder(tmp_path, size=8)
    data = image_folder(tmp_path, size=8, corrupt="skip")
    assert len(data.train) + len(data.test) == 12
    assert "skipped 1" in capsys.readouterr().err


def test_digits_come_with_the_library():
    data = digits()
    assert data.image_shape == (1, 8, 8) and len(data.train) + len(data.test) == 1797
    assert int(data.train.read(torch.arange(100)).max()) == 255


def test_arrays_of_a_file(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 3), dtype=np.uint8)
    labels = np.array([0, 1, 2, 0, 1, 2])
    np.savez(tmp_path / "d.npz", x=images, y=labels)
    data = load_data(f"{tmp_path / 'd.npz'}#x,y,x,y")
    assert data.image_shape == (3, 5, 5) and len(data.class_names) == 3
    with pytest.raises(UsageError, match="no array 'z'"):
        load_data(f"{tmp_path / 'd.npz'}#x,y,x,z")


def test_the_held_out_part_is_stratified_and_fixed_by_the_seed():
    labels = torch.arange(1000) % 10
    split = Resident(torch.arange(1000, dtype=torch.int64).view(-1, 1, 1, 1).to(torch.uint8), labels)
    rest, held = hold_out(split, 0.1, seed=3)
    assert len(rest) == 900 and held.labels.bincount().tolist() == [10] * 10
    assert torch.equal(hold_out(split, 0.1, seed=3)[1].images, held.images)
    assert not torch.equal(hold_out(split, 0.1, seed=4)[1].images, held.images)
    with pytest.raises(UsageError, match="fraction"):
        hold_out(split, 0.0, seed=3)


def test_channel_statistics_are_those_of_torch():
    images = torch.randint(256, (50, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    mean, std = channel_statistics(Resident(images, torch.zeros(50, dtype=torch.long)))
    flat = (images.double() / 255).transpose(0, 1).flatten(1)
    assert mean == pytest.approx(flat.mean(1).tolist(), abs=1e-5)
    assert std == pytest.approx(flat.std(1, correction=0).tolist(), abs=1e-5)


def test_data_is_looked_for_in_order_and_fetched_last(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("EXPKIT_DATA", str(tmp_path / "env"))
    source = tmp_path / "thing" / "file.txt"
    source.parent.mkdir()
    source.write_text("content")
    packed = tmp_path / "thing.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(source.parent, "thing")
    archive = Archive("thing", packed.as_uri(), hashlib.md5(packed.read_bytes()).hexdigest())
    fetched = locate(archive, None)
    assert fetched == tmp_path / "cache/expkit/data/thing" and (fetched / "file.txt").read_text() == "content"
    assert not list(fetched.parent.glob("*.tar.gz"))
    (tmp_path / "env" / "thing").mkdir(parents=True)
    assert locate(archive, None) == tmp_path / "env" / "thing"
    (tmp_path / "own" / "thing").mkdir(parents=True)
    assert locate(archive, tmp_path / "own") == tmp_path / "own" / "thing" == locate(archive, tmp_path / "own/thing")


def test_a_download_that_is_something_else_leaves_nothing(tmp_path):
    (tmp_path / "page.zip").write_text("<html>quota exceeded</html>")
    archive = Archive("page", (tmp_path / "page.zip").as_uri(), "0" * 32)
    with pytest.raises(UsageError, match="something else"):
        download(archive, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    missing = Archive("gone", (tmp_path / "gone.zip").as_uri(), "0" * 32)
    with pytest.raises(UsageError, match="--data-dir"):
        download(missing, tmp_path / "cache")


def test_unknown_data_is_said():
    with pytest.raises(UsageError, match="cifar10"):
        load_data("cifar-10")


def test_stream_seeds_differ_by_every_part():
    seeds = {stream_seed(a, b, c) for a in range(3) for b in ("x", "y") for c in range(3)}
    assert len(seeds) == 18 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_download_killed_while_it_unpacks_is_not_there(tmp_path, monkeypatch):
    source = tmp_path / "source" / "thing"
    source.mkdir(parents=True)
    for name in ("a", "b"):
        (source / name).write_text(name)
    packed = tmp_path / "thing.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(source, "thing")
    archive = Archive("thing", packed.as_uri(), hashlib.md5(packed.read_bytes()).hexdigest())
    real, done = tarfile.TarFile.extract, []

    def dying(self, member, *arguments, **options):
        if len(done) == 2:  # the folder and one file
            raise KeyboardInterrupt
        done.append(member)
        return real(self, member, *arguments, **options)

    def all_of(self, path, filter):
        for member in self.getmembers():
            self.extract(member, path, filter=filter)

    monkeypatch.setattr(tarfile.TarFile, "extract", dying)
    monkeypatch.setattr(tarfile.TarFile, "extractall", all_of)
    with pytest.raises(KeyboardInterrupt):
        download(archive, tmp_path / "cache")
    assert len(done) == 2 and not (tmp_path / "cache" / "thing").exists()
    monkeypatch.undo()
    assert sorted(path.name for path in download(archive, tmp_path / "cache").iterdir()) == ["a", "b"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["thing"]


def test_a_half_unpacked_tiny_imagenet_is_refused(tmp_path):
    (tmp_path / "train" / "n1" / "images").mkdir(parents=True)
    (tmp_path / "val" / "images").mkdir(parents=True)
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn1\t0\t0\t1\t1\n")
    with pytest.raises(UsageError, match=r"0 training and 0 validation images.*unpacked by half"):
        published.read_tiny_imagenet(tmp_path, "refuse", (500, 1))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("x,text,x,y", "whole numbers"),
        ("x,below,x,y", "whole numbers"),
        ("x,half,x,y", "whole numbers"),
        ("x,table,x,y", "whole numbers"),
        ("x,large,x,y", "largest label"),
        ("none,nothing,x,y", "at least one"),
        ("four,y,four,y", "3\\)"),
        ("x,y,other,y", "must be alike"),
        ("x,y,x,z", "no array 'z'"),
    ],
)
def test_arrays_that_cannot_be_used_are_said(keys, said, tmp_path):
    y = np.arange(8) % 2
    images = np.zeros((8, 4, 4), np.uint8)
    arrays = {"x": images, "y": y, "text": y.astype(str), "below": y - 1, "half": y + 0.5, "table": y[:, None]}
    arrays |= {"large": y * 10**6, "none": images[:0], "nothing": y[:0], "other": images[:, :3]}
    np.savez(tmp_path / "a.npz", four=np.zeros((8, 4, 4, 4), np.uint8), **arrays)
    with pytest.raises(UsageError, match=said):
        load_data(f"{tmp_path / 'a.npz'}#{keys}")


@pytest.mark.parametrize("content", [b"nonsense", b"", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_npz_is_said(content, tmp_path):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UsageError, match="no npz file"):
        load_data(f"{tmp_path / 'a.npz'}#x,y,x,y")
