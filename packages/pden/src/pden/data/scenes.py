"""Data sets in folders that have a name: PACS (classification), CamVid by time of day (segmentation)."""

from __future__ import annotations

from dataclasses import replace

import torch

from expkit.errors import UsageError
from pden.data.domain import Domain
from pden.data.folder import image_files, load_folder, load_masks
from pden.data.home import Home

NAMES = ("pacs", "camvid")
PACS = ("art_painting", "cartoon", "photo", "sketch")
CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "cyclist")
_DUSK = "0001TP"  # the sequence that was filmed at dusk; the others are day


def load_scenes(spec: str, home: Home, size: int, channels: int) -> Domain:
    """`pacs/DOMAIN`, or `camvid/day`, `camvid/day-val`, `camvid/day-test`, `camvid/dusk` (of train, val and test).

    Raises:
        UsageError: an unknown part, or files that are not there.
    """
    kind, _, part = spec.partition("/")
    if kind == "pacs":
        return _pacs(part, home, size, channels)
    return _camvid(part, home)


def _pacs(part: str, home: Home, size: int, channels: int) -> Domain:
    if part not in PACS:
        raise UsageError(f'PACS has no domain "{part}"; use pacs/ and one of {", ".join(PACS)}')
    folder = home.find(f"PACS/{part}", f"pacs/{part}", f"PACS/kfold/{part}", f"pacs_data/{part}")
    if folder is None:
        raise UsageError(f"pacs is not there; unpack it as PACS/{part}/CLASS/*.jpg in {home.folders[0]}")
    return load_folder(folder, f"pacs/{part}", size, channels)


def _camvid(part: str, home: Home) -> Domain:
    splits = {"day": ("train",), "day-val": ("val",), "day-test": ("test",), "dusk": ("train", "val", "test")}
    if part not in splits:
        raise UsageError(f'camvid has no part "{part}"; use camvid/ and one of {", ".join(splits)}')
    folder = home.find("camvid")
    if folder is None:
        raise UsageError(f"camvid is not there; put camvid/train, camvid/train_labels, ... into {home.folders[0]}")
    parts = []
    for split in splits[part]:
        found = load_masks(folder / split, folder / f"{split}_labels", f"camvid/{part}", CAMVID, void=len(CAMVID))
        dusk = torch.tensor([_DUSK in path.name for path in image_files(folder / split)])
        wanted = dusk if part == "dusk" else ~dusk
        if bool(wanted.any()):
            parts.append(found.take(wanted))
    if not parts:
        raise UsageError(f"camvid/{part}: no image of it is in {folder}")
    images = torch.cat([each.images for each in parts])
    return replace(parts[0], images=images, labels=torch.cat([each.labels for each in parts]))
