"""`coral-spec train`: train a drafter on answers that `coral-spec data` made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def run(
    config: Annotated[Path | None, typer.Option(help="TOML file; every key has a default.")] = None,
    name: Annotated[str | None, typer.Option(help="Folder of the run, below --runs.")] = None,
    model: Annotated[str | None, typer.Option(help="Alias, hub id or folder of the target.")] = None,
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
    """Train a drafter; with torchrun on any number of GPUs. Writes runs/NAME/drafter."""
    from coral_spec.training.config import TrainConfig
    from expkit.config import load_config
    from expkit.distributed import join, leave

    overrides: dict[str, Any] = dict(parse_setting(text) for text in set_ or [])
    flags = {
        "name": name,
        "target": model,
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
    from coral_spec.training.run import train

    world = join()
    try:
        target = load_target(settings.target, device=settings.device, dtype=settings.dtype)
        outcome = train(settings, target, runs, world, resume=resume)
    finally:
        leave()
    if outcome is not None:
        result = outcome.result
        typer.echo(
            f"{outcome.folder / 'drafter'}: {result['tau_sim']:.3f} tokens per round (simulated, step "
            f"{result['best_step']}), {result['minutes']:.1f} minutes, {result['tokens_per_second']:,.0f} tokens/s"
        )


def parse_setting(text: str) -> tuple[str, Any]:
    """`optimizer.lr=1e-3` as key and value; the value is read as TOML, or as a plain string where it is none.

    Raises:
        UsageError: there is no "=".
    """
    import tomllib

    from expkit.errors import UsageError

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {text!r}: expected KEY=VALUE, for example optimizer.lr=1e-3")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()
