"""`coral-spec train`: everything from prompts to a drafter with its router, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def run(
    config: Annotated[Path | None, typer.Option(help="TOML file; every key has a default.")] = None,
    name: Annotated[str | None, typer.Option(help="Folder of the run, below --runs.")] = None,
    model: Annotated[str | None, typer.Option(help="Alias, hub id or folder of the target.")] = None,
    stages: Annotated[
        str | None, typer.Option(help="Some of data, drafter, router, low-rank, separated by commas.")
    ] = None,
    drafter: Annotated[
        Path | None, typer.Option(help="Folder of a trained drafter, for router or low-rank alone.")
    ] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Folder of answers; may be given several times.")] = None,
    align_steps: Annotated[int | None, typer.Option(help="Harmonised steps: 1 is EAGLE-2, 3 is HASS.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Follow the clock and end after this time.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**31 - 1, help="Seed of weights, batches and noise.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bf16 or fp32.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other key: --set optimizer.lr=1e-3")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run of this name.")] = False,
) -> None:
    """Answers, a drafter, its router; with torchrun on any number of GPUs. Writes runs/NAME/drafter."""
    from coral_spec.training.config import TrainConfig
    from expkit.config import load_config, parse_setting
    from expkit.distributed import join, leave

    overrides: dict[str, Any] = dict(parse_setting(text) for text in set_ or [])
    flags = {
        "name": name,
        "target": model,
        "stages": None if stages is None else [stage.strip() for stage in stages.split(",")],
        "drafter": drafter,
        "data": tuple(data) if data else None,
        "align_steps": align_steps,
        "steps": steps,
        "max_minutes": max_minutes,
        "seed": seed,
        "device": device,
        "dtype": dtype,
    }
    settings = load_config(TrainConfig, config, {**overrides, **flags})

    from coral_spec.targets import load_target
    from coral_spec.training.stages import require_inputs, run_stages

    require_inputs(settings)
    world = join()
    try:
        target = load_target(settings.target, device=settings.device, dtype=settings.dtype)
        outcomes = run_stages(settings, target, runs, world, resume=resume)
    finally:
        leave()
    for stage, outcome in outcomes.items():
        result, folder = outcome.result, runs / settings.name / "drafter"
        typer.echo(
            f"{folder}: {said(stage, result)}, step {result['best_step']}, "
            f"{result['minutes']:.1f} minutes, {result['tokens_per_second']:,.0f} tokens/s"
        )


def said(stage: str, result: dict[str, Any]) -> str:
    """What a stage came to, in a few words."""
    if stage == "drafter":
        return f"{result['tau_sim']:.3f} tokens per round (simulated)"
    if stage == "router":
        return f"{result['held_out_mass']:.3f} of the target's mass in {result['rows']:,} rows"
    return f"rank {result['rank']} agrees with the target at {result['held_out_agreed']:.3f} of positions"
