"""`train-adv train`: train a robust model, with or without TRAIN."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from train_adv.commands import options


def run(
    config: Annotated[Path | None, typer.Option(help="TOML file; every key has a default.")] = None,
    name: Annotated[str | None, typer.Option(help="Folder of the run, below --runs.")] = None,
    data: Annotated[
        str | None, typer.Option(help="digits, cifar10, cifar100, svhn, tiny-imagenet or a folder.")
    ] = None,
    data_dir: options.DataDir = None,
    model: Annotated[str | None, typer.Option(help="resnet18, wrn-34-10, timm/NAME, torchvision/NAME, ...")] = None,
    host: Annotated[str | None, typer.Option(help="standard, at, trades, mart, lbgat, fgsm-rs or n-fgsm.")] = None,
    beta: Annotated[float | None, typer.Option(help="Second term of TRADES, MART and LBGAT.")] = None,
    epsilon: Annotated[str | None, typer.Option(help="Radius, for images in [0, 1]: 8/255.")] = None,
    topology_weight: Annotated[float | None, typer.Option(help="lambda of TRAIN; 0 is off.")] = None,
    topology_ratio: Annotated[
        float | None, typer.Option(help="Instead: the ratio of gradient norms that lambda shall give.")
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="The standard model; trained first if left out.")] = None,
    awp_gamma: Annotated[float | None, typer.Option(help="Adversarial weight perturbation: 0.005 to 0.01.")] = None,
    averaging: Annotated[str | None, typer.Option(help="none, ema or swa.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Over all processes together.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**31 - 1, help="Seed of everything.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bf16 or fp32.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other key: --set optimizer.lr=0.05")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run of this name, as it was begun.")] = False,
    json: options.Json = None,
) -> None:
    """Train; with torchrun on any number of GPUs. Leaves runs/NAME/{best,last}.safetensors and result.json."""
    from expkit.checkpoint import write_json
    from expkit.config import load_config, parse_setting
    from expkit.distributed import join, leave
    from expkit.rundir import config_to_resume
    from train_adv.training.config import TrainConfig

    options.check_outputs([json], [runs])
    flags: dict[str, Any] = {
        "name": name,
        "data.name": data,
        "data.dir": data_dir,
        "model": model,
        "host": host,
        "beta": beta,
        "attack.epsilon": options.parse_number(epsilon, "--epsilon"),
        "topology.weight": topology_weight,
        "topology.ratio": topology_ratio,
        "topology.path": reference,
        "awp.gamma": awp_gamma,
        "averaging.kind": averaging,
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "device": device,
        "dtype": dtype,
    }
    overrides: dict[str, Any] = dict(parse_setting(text) for text in set_ or [])
    given = {key: value for key, value in flags.items() if value is not None}  # or they would hide --set
    settings = load_config(TrainConfig, config, {**overrides, **given})
    if resume:
        settings = load_config(TrainConfig, config_to_resume(runs, settings.name, config), {**overrides, **given})
    elif name is None and config is None:
        settings = _named(settings, runs)

    from train_adv.training.run import train

    world = join()
    try:
        outcome = train(settings, runs, world, resume=resume)
    finally:
        leave()
    if not world.is_main:
        return
    if json is not None:
        write_json(json, outcome.result)
    typer.echo(_summary(outcome.folder, outcome.result))


def _named(settings: Any, runs: Path) -> Any:
    """A name for a run that was given none: what it is, and a number where that is taken."""
    from dataclasses import replace

    topology = "+train" if settings.topology.active else ""
    base = f"{Path(settings.data.name.partition('#')[0]).stem}-{settings.host}{topology}"
    taken = (f"{base}-{number}" for number in range(2, 10_000))
    name = base if not (runs / base).exists() else next(each for each in taken if not (runs / each).exists())
    return replace(settings, name=name)


def _summary(folder: Path, result: dict[str, Any]) -> str:
    lines = [f"{folder}: {result['seconds_per_epoch']:.1f} s an epoch, {result['images_per_second']:,.0f} images/s"]
    for which in ("best", "last"):
        found = result[which]
        test = f", test natural {found['natural']:.2%}, PGD-20 {found['pgd20']:.2%}" if "natural" in found else ""
        lines.append(
            f"{which} (epoch {found['epoch']:.0f}): validation natural {found['val_natural']:.2%}, "
            f"PGD {found['val_pgd']:.2%}{test}"
        )
    if result["stopped"]:
        lines.append(f"stopped: {result['stopped']}")
    return "\n".join(lines)
