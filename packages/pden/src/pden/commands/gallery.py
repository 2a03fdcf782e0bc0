"""`pden gallery`: look at the expanded domains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pden.commands import options


def run(
    run: options.Run,
    out: Annotated[Path, typer.Option(dir_okay=False, help="The picture (PNG).")] = Path("gallery.png"),
    source: Annotated[str | None, typer.Option(help="Domain to show; the run's own source by default.")] = None,
    columns: Annotated[int, typer.Option(min=1, max=64, help="Images in a row.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    data_dir: options.DataDir = None,
) -> None:
    """A row of source images, and a row for each expanded domain with its safety and distance."""
    from expkit.errors import UsageError
    from pden.data import Home, load_domain
    from pden.gallery import save_gallery
    from pden.saving import load

    if out.suffix.lower() != ".png":
        raise UsageError(f"{out}: the picture is a PNG; give a name that ends in .png")
    trained = load(run)
    if not trained.generators:
        raise UsageError(f"{run} has no expanded domains to show")
    domain = load_domain(source or trained.source, Home.of(data_dir), size=trained.size, channels=trained.channels)
    save_gallery(domain, trained.generators, trained.domains, out, columns=columns, seed=seed)
    typer.echo(f"{len(trained.generators)} domains: {out}")
