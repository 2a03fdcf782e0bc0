"""`pden train`: expand one source domain and train on it, or train a baseline in the same harness."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pden.commands import options

if TYPE_CHECKING:
    from pden.training.config import TrainConfig
    from pden.training.run import Outcome


def run(
    config: Annotated[Path | None, typer.Option(help="TOML file; every key has a default.")] = None,
    preset: Annotated[str | None, typer.Option(help="Settings of the package: paper, ours, tiny or demo.")] = None,
    name: Annotated[str | None, typer.Option(help="Folder of the run, below --runs.")] = None,
    method: Annotated[str | None, typer.Option(help="pden, erm, randaugment, augmix, randconv, ada or me-ada.")] = None,
    source: Annotated[str | None, typer.Option(help="Domain to train on: a name, a folder or FILE.npz#x,y.")] = None,
    target: options.Target = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds K of expansion; 0 is ERM.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**31 - 1, help="Seed of everything.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Several runs: a count (5) or seeds (0,1,2).")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="How many of them at once.")] = 1,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or auto.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other key: --set optimizer.lr=1e-3")
    ] = None,
    data_dir: options.DataDir = None,
    runs: options.Runs = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run of this name, as it was begun.")] = False,
    json: options.Json = None,
) -> None:
    """Train; with torchrun on any number of processes. Writes runs/NAME with the model, figures, curve and gallery."""
    from expkit.checkpoint import write_json
    from expkit.config import load_config, parse_setting
    from expkit.distributed import join, leave
    from expkit.errors import UsageError
    from expkit.rundir import config_to_resume
    from pden.presets import preset_path
    from pden.training.config import TrainConfig

    if config is not None and preset is not None:
        raise UsageError("give --config or --preset, not both; --set changes single keys")
    overrides: dict[str, Any] = dict(parse_setting(text) for text in set_ or [])
    flags = {
        "name": name,
        "method": method,
        "data.source": source,
        "data.targets": tuple(target) if target else None,
        "rounds": rounds,
        "seed": seed,
        "device": device,
        "dtype": dtype,
    }
    flags = {key: value for key, value in flags.items() if value is not None}  # one not given overrides no --set
    path = preset_path(preset) if preset is not None else config
    settings = load_config(TrainConfig, path, {**overrides, **flags})
    if name is None and settings.method != "pden" and settings.name == "pden":
        flags["name"] = settings.method
        settings = load_config(TrainConfig, path, {**overrides, **flags})
    if resume and seeds is None:
        settings = load_config(TrainConfig, config_to_resume(runs, settings.name, path), {**overrides, **flags})

    from pden.data import Home
    from pden.training.run import train

    home = Home.of(data_dir)
    if seeds is not None:
        from pden.training.seeds import train_seeds

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError("--seeds starts processes of its own; call it without torchrun")
        result = train_seeds(settings, options.parse_seeds(seeds), home, runs, jobs=jobs, resume=resume)
        typer.echo(result["table"])
        if json is not None:
            write_json(json, result)
        return
    world = join()
    try:
        outcome = train(settings, home, runs, world, resume=resume)
    finally:
        leave()
    if outcome is not None:
        show(settings, outcome)
        if json is not None:
            write_json(json, outcome.result)


def show(settings: TrainConfig, outcome: Outcome) -> None:
    """One line per selection."""
    result = outcome.result
    typer.echo(f"{outcome.folder}: {result['domains']} domains, {result['seconds']:.0f} s of training")
    for name, found in result["selections"].items():
        targets = ", ".join(f"{key} {100 * value:.2f}" for key, value in found.get("targets", {}).items())
        count = len(found.get("targets", {}))
        average = f"; average of {count}: {100 * found['average']:.2f} % ({targets})" if targets else ""
        typer.echo(f"  {name} (round {found['round']}): source {100 * found['validation']:.2f} %{average}")
