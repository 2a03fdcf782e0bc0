"""The expanded dataset as an image folder: `domain-01/CLASS/000000.png`, and a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.v2.functional import to_pil_image

from expkit.checkpoint import atomic_path, write_json
from expkit.cli import progress
from pden.data import Domain
from pden.saving import Expanded
from pden.training.stream import Stream

_CHUNK = 256


@torch.no_grad()
def write_expanded(
    domain: Domain, trained: Expanded, out: Path, *, seed: int, record: Mapping[str, Any], limit: int | None = None
) -> int:
    """Write every image in every domain; the folder appears whole or not at all.

    Args:
        domain: images of the size and channels that the generators were trained on.
        seed: of the noise; the same seed gives the same files.
        record: goes into the manifest, with the domains' reports and one row per image.
        limit: only so many images, evenly over the domain, which may be sorted by class.

    Returns:
        how many images were written.
    """
    device = next(trained.model.parameters()).device
    count = len(domain) if limit is None else min(limit, len(domain))
    places = torch.arange(count) * len(domain) // count
    rows: list[dict[str, Any]] = []
    with atomic_path(out) as aside, progress() as bar:
        task = bar.add_task("expanding", total=count * len(trained.generators))
        for number, generator in enumerate(trained.generators, start=1):
            stream = Stream(device, seed, "expand", number)
            for index in torch.split(places, _CHUNK):
                images, labels = domain.batch(index)
                made = generator(images.to(device), generator=stream.torch).cpu()
                for place, image, label in zip(index.tolist(), made, labels.tolist(), strict=True):
                    file = Path(f"domain-{number:02d}", domain.classes[label], f"{place:06d}.png")
                    (aside / file).parent.mkdir(parents=True, exist_ok=True)
                    to_pil_image(image).save(aside / file)
                    rows.append(
                        {"file": file.as_posix(), "domain": number, "class": domain.classes[label], "source": place}
                    )
                bar.advance(task, len(index))
        about = {**record, "source": domain.name, "domains": trained.domains, "images": rows}
        write_json(aside / "manifest.json", about)
    return len(rows)
