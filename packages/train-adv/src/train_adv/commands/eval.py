"""`train-adv eval`: how robust checkpoints are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from train_adv.commands import options


def run(
    checkpoints: Annotated[list[Path], typer.Argument(help="Runs' folders (their best checkpoint) or files.")],
    attacks: Annotated[
        str, typer.Option(help="Some of natural,fgsm,pgd20,pgd100,cw,apgd-ce,apgd-t,apgd (both),autoattack.")
    ] = "natural,fgsm,pgd20,cw,apgd",
    data: options.Data = None,
    data_dir: options.DataDir = None,
    epsilon: options.Epsilon = None,
    norm: options.Norm = None,
    limit: options.Limit = 0,
    autoattack_limit: Annotated[int, typer.Option(min=0, help="The same for autoattack alone.")] = 1000,
    batch_size: options.BatchSize = 500,
    device: options.Device = "auto",
    precision: Annotated[
        str, typer.Option(help="fp32, tf32 or bf16 inside the attacks; what counts as broken is decided in fp32.")
    ] = "fp32",
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the model; pays for thousands of images.")
    ] = False,
    seed: options.Seed = 0,
    work: Annotated[
        Path | None, typer.Option(help="Where answers are kept; else `eval` beside the checkpoint.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file too.")] = None,
    json: options.Json = None,
) -> None:
    """Accuracy under each attack with 95 % intervals, per class in the JSON. Run again, it goes on where it was.

    Several checkpoints are compared with the first one, image by image.
    """
    from expkit.checkpoint import write_json, write_text
    from expkit.device import resolve_device
    from expkit.rundir import evidence
    from train_adv.evaluation import evaluate as evaluation
    from train_adv.topology.report import run_name

    options.check_outputs([json, markdown], [work])
    record = evidence(seed)
    where = resolve_device(device)
    radius, kind = options.attack_of(epsilon, norm, checkpoints[0])
    images = options.data_of(data, data_dir, checkpoints[0])
    settings = evaluation.Settings(
        radius, kind, limit, autoattack_limit, batch_size, precision=precision, compiled=compile, seed=seed
    )
    names = [each.strip() for each in attacks.split(",") if each.strip()]
    answers = [evaluation.evaluate(path, images, names, settings, device=where, work=work) for path in checkpoints]
    rows = [
        {**evaluation.row(run_name(path), found, images), "checkpoint": str(path)}
        for path, found in zip(checkpoints, answers, strict=True)
    ]
    compared = {
        f"{run_name(path)} - {run_name(checkpoints[0])}": evaluation.differences(found, answers[0])
        for path, found in zip(checkpoints[1:], answers[1:], strict=True)
    }
    table = evaluation.markdown(rows, compared)
    typer.echo(table)
    if markdown is not None:
        write_text(markdown, table + "\n")
    if json is not None:
        about = {"data": images.name, "epsilon": radius, "norm": kind, "precision": precision}
        write_json(json, {"rows": rows, "differences": compared, "settings": about, **record})
