"""`coral-spec estimate`: would a drafter pay for this model on this machine?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from coral_spec.commands import options

if TYPE_CHECKING:
    from rich.table import Table

    from coral_spec.tuning.estimate import Estimate


def run(
    model: options.Model = "smollm2-135m",
    rows: Annotated[
        int | None, typer.Option(help="Rows of the reduced head, from 64 on; the default of --head.")
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.Json = None,
) -> None:
    """Time the model and an untrained drafter of its sizes, and say what speed-up to expect; nothing is trained."""
    from expkit.errors import UsageError

    if rows is not None and rows < 64:
        raise UsageError(f"rows is {rows}, needed at least 64")
    options.require_file_name("json", json, ".json")

    from dataclasses import asdict

    from rich.console import Console

    from coral_spec.backbone import Backbone
    from coral_spec.bundled import bundled_drafter
    from coral_spec.heads.choose import FREQUENT_ROWS
    from coral_spec.model import acceptance_profile
    from coral_spec.targets import load_target
    from coral_spec.tuning.choose import TYPICAL
    from coral_spec.tuning.costs import Disturbance
    from coral_spec.tuning.estimate import REFERENCE, estimate
    from expkit.checkpoint import write_json
    from expkit.cli import console
    from expkit.rundir import evidence

    proof = evidence()
    target = load_target(model, device=device, dtype=dtype)
    bundled = bundled_drafter(target)
    disturbance = Disturbance()
    rows = rows or FREQUENT_ROWS[target.device.type]
    found = estimate(Backbone(target), rows, lambda count: acceptance_profile(bundled, count))
    disturbed = disturbance()
    own = found.heads["full"].acceptance.tau(REFERENCE, TYPICAL) if bundled else None
    where = f"{target.name}, {str(target.dtype).removeprefix('torch.')} on {target.device.type}"
    screen = Console()
    screen.print(_costs(found, where))
    screen.print(_gains(found, own))
    if disturbed:
        screen.print("Other work had the processor meanwhile, so the figures are not to be trusted: try again.")
    screen.print(verdict(found, own), highlight=False)
    if json is not None:
        costs = {
            kind: {"rows": head.rows, "head": head.head, "costs": asdict(head.costs)}
            for kind, head in found.heads.items()
        }
        figures = {
            "disturbed": disturbed,
            "break_even": found.break_even(),
            "gains": found.rows(),
            "milliseconds": costs,
        }
        figures["bundled"] = found.rows((own,))[0] if own else None
        about = {"model": target.name, "device": str(target.device), "dtype": str(target.dtype).removeprefix("torch.")}
        write_json(json, {**figures, "reference_tree": str(REFERENCE), "settings": about, **proof})
        console().print(f"figures: {json}", soft_wrap=True)


def verdict(found: Estimate, own: float | None) -> str:
    """One plain sentence."""
    from coral_spec.tuning.estimate import REFERENCE, TAUS

    least = found.break_even()
    if least is None:
        return (
            f"It will not pay here: even a drafter with {TAUS[-1]:g} tokens per round in tree {REFERENCE} gives "
            f"{found.gain(TAUS[-1]):.2f}x plain decoding."
        )
    sentence = f"A drafter pays here from {least:.2f} tokens per round in tree {REFERENCE} on"
    if own is None:
        return f"{sentence}; with 3.5, which is usual, it gives {found.gain(3.5):.2f}x plain decoding."
    return f"{sentence}; the bundled one has {own:.2f} there, so expect {found.gain(own):.2f}x plain decoding."


def _costs(found: Estimate, where: str) -> Table:
    from rich.table import Table

    out = Table(title=f"milliseconds, {where}")
    out.add_column("what")
    for kind, head in found.heads.items():
        out.add_column(f"{kind} head\n{head.rows:,} rows", justify="right")
    heads = list(found.heads.values())
    out.add_row("plain step, 1 token", *(f"{head.costs.plain:.2f}" for head in heads))
    # A slow machine times fewer shapes, and not the same for all heads.
    for count in sorted(set.intersection(*(set(head.costs.verify) for head in heads))):
        label = f"round that verifies {count} tokens, 1 level"
        out.add_row(label, *(f"{head.costs.verify[count]:.2f}" for head in heads))
    for width in sorted(set.intersection(*(set(head.costs.level) for head in heads))):
        label = f"further level, {width} wide (its head alone)"
        out.add_row(label, *(f"{head.costs.level[width]:.2f} ({head.head[width]:.2f})" for head in heads))
    return out


def _gains(found: Estimate, own: float | None) -> Table:
    from rich.table import Table

    from coral_spec.tuning.estimate import REFERENCE, TAUS

    out = Table(title="expected speed-up over plain decoding")
    out.add_column(f"tau in\n{REFERENCE}", justify="right")
    for kind in found.heads:
        out.add_column(f"{kind} head:\nbest tree")
        out.add_column("its\ntau", justify="right")
        out.add_column("speed-up", justify="right")
    for row in found.rows(tuple(sorted({*TAUS, own} if own else TAUS))):
        cells = [f"{row['tau']:.2f}" + (" (bundled)" if row["tau"] == own else "")]
        for kind in found.heads:
            cells += [row[kind]["tree"], f"{row[kind]['tau']:.2f}", f"{row[kind]['speedup']:.2f}x"]
        out.add_row(*cells)
    return out
