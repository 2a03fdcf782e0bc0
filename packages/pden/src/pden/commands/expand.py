"""`pden expand`: write the expanded dataset as an image folder that any other program can train on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pden.commands import options


def run(
    run: options.Run,
    out: Annotated[Path, typer.Option(help="Folder to make: OUT/domain-01/CLASS/000000.png, and manifest.json.")],
    source: Annotated[str | None, typer.Option(help="Domain to expand; the run's own source by default.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many images, evenly over the domain.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    data_dir: options.DataDir = None,
    device: options.Device = "auto",
) -> None:
    """Every source image in every expanded domain, as PNG files with a manifest."""
    from expkit.errors import UsageError
    from expkit.rundir import evidence
    from pden.data import Home, load_domain
    from pden.expand import write_expanded
    from pden.saving import load

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists already; choose another folder")
    trained = load(run, device=device)
    if not trained.generators:
        raise UsageError(f"{run} has no expanded domains")
    domain = load_domain(source or trained.source, Home.of(data_dir), size=trained.size, channels=trained.channels)
    if domain.dense:
        raise UsageError("expand writes images with one label each, not segmentation")
    count = write_expanded(domain, trained, out, seed=seed, record={**evidence(seed), "run": str(run)}, limit=limit)
    typer.echo(f"{count} images in {len(trained.generators)} domains: {out}")
