"""`pden demo`: ERM against PDEN on the embedded digits, on two cores in under two minutes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pden.commands import options

if TYPE_CHECKING:
    from pden.training.run import Outcome


def run(
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for gallery.png and chart.png.")] = Path(
        "pden-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of everything.")] = 0,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of expansion; the preset's by default.")] = None,
    device: options.Device = "auto",
    json: options.Json = None,
) -> None:
    """Train on handwritten digits, with and without expansion, and measure both on five other kinds of digits."""
    import shutil

    from expkit.checkpoint import write_json
    from expkit.config import load_config, to_toml
    from expkit.distributed import World
    from expkit.rundir import evidence
    from pden.data import Home
    from pden.data.embedded import TARGETS
    from pden.evaluation import table
    from pden.evaluation.chart import save_bars
    from pden.presets import preset_path
    from pden.training.config import TrainConfig
    from pden.training.run import load_data, train

    record = evidence(seed)
    outcomes: dict[str, Outcome] = {}
    data = None  # the same for both methods
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for method in ("erm", "pden"):
            flags: dict[str, Any] = {"name": method, "method": method, "seed": seed, "device": device, "rounds": rounds}
            flags["data.targets"] = TARGETS
            flags |= {"data.target_every": 0, "data.disguised": 0}
            config = load_config(TrainConfig, preset_path("demo"), flags)
            typer.echo(f"training {method} on scikit-learn's digits ...")
            data = data or load_data(config, Home.of())
            outcome = train(config, Home.of(), Path(folder), World(0, 1, 0), data=data, quiet=True)
            assert outcome is not None
            outcomes[method] = outcome
        results = {method: outcome.result for method, outcome in outcomes.items()}
        gallery = outcomes["pden"].folder / "gallery.png"
        if gallery.is_file():
            shutil.copyfile(gallery, out / "gallery.png")
    rows = table.summarise({method: [result] for method, result in results.items()}, "last")
    typer.echo(table.markdown(rows))
    seconds = {method: result["seconds"] for method, result in results.items()}
    gain = 100 * (rows["pden"][table.AVERAGE][0] - rows["erm"][table.AVERAGE][0])
    typer.echo(f"PDEN against ERM: {gain:+.1f} points on average, one seed, last weights, equal steps; seeds differ")
    save_bars(rows, out / "chart.png", title=f"trained on scikit-learn's digits alone, seed {seed}, last weights")
    typer.echo(f"pictures: {out.resolve()}")
    if json is not None:
        methods = {
            method: {
                "targets": result["selections"]["last"]["targets"],
                "average": result["selections"]["last"]["average"],
                "source": result["selections"]["last"]["validation"],
                "seconds": seconds[method],
            }
            for method, result in results.items()
        }
        write_json(json, {**record, "selection": "last", "methods": methods, "config": to_toml(config)})
        typer.echo(f"figures: {json}")
