"""What a finished run leaves: the drafter's folder with its model card, a result file and a plot of its curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from coral_spec.drafter import Drafter
from coral_spec.training.config import TrainConfig
from coral_spec.training.data import Manifest
from expkit.checkpoint import atomic_path, write_text


def model_card(config: TrainConfig, result: Mapping[str, Any], manifests: Sequence[Manifest]) -> str:
    """Markdown that says what the drafter is for, how it was trained and how well it did."""
    recipe = "EAGLE-2's (1 step)" if config.align_steps == 1 else f"HASS's ({config.align_steps} harmonised steps)"
    if config.csra.weight > 0:
        recipe = f"CORAL's ({config.align_steps} harmonised steps, aligned with weight {config.csra.weight:g})"
    rates = ", ".join(f"{rate:.3f}" for rate in result["rates"])
    sources = "\n".join(
        f"* {manifest.rows:,} answers of {manifest.model} at temperature {manifest.temperature}, "
        f"top-p {manifest.top_p}, at most {manifest.max_new_tokens} tokens, seed {manifest.seed}"
        for manifest in manifests
    )
    return f"""# Drafter for {config.target}

A one-layer EAGLE-shaped drafter. It proposes tokens; the target verifies every one of them, so the text is the
target's own. It shares the target's embeddings and head, which are not in this folder, and works with that model only
(`config.json` holds the tokenizer's hash).

    coral-spec generate "..." --model {config.target} --draft THIS_FOLDER

## Training
Recipe: {recipe}; seed {config.seed}; {result["steps"]:,} optimiser steps, {result["tokens"]:,} tokens through the
target (padding left out), {result["minutes"]:.1f} minutes. Answers the target wrote itself:

{sources}

## Held-out answers
Acceptance length simulated on {result["held_out_rows"]} answers to held-out prompts (greedy chain drafts of depth
{config.evaluation.depth}): {result["tau_sim"]:.3f} tokens per round; share accepted per depth: {rates}.
A drafter is distilled from its target: the target's licence applies to it as well.
"""


def save_drafter(folder: Path, drafter: Drafter, card: str, ranking: Tensor) -> None:
    """Write the drafter's folder whole or not at all."""
    with atomic_path(folder) as temporary:
        drafter.save(temporary, model_card=card, ranking=ranking)


def add_section(folder: Path, title: str, text: str) -> None:
    """Put a section at the end of a drafter's model card, in place of one of the same title."""
    path = folder / "README.md"
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, _, rest = card.partition(f"\n## {title}\n")
    after = rest.partition("\n## ")[2]
    write_text(path, f"{before}{f'{chr(10)}## {after}' if after else ''}\n## {title}\n{text}")


@dataclass(frozen=True)
class Curves:
    """What a stage's plot shows.

    Attributes:
        losses: names of losses, each with one curve per harmonised step (`NAME_1`, `NAME_2` ...).
        score: name of the evaluation's figure.
        label, title: of the score's axis and panel.
    """

    losses: tuple[str, ...] = ("soft", "feature", "csra")
    score: str = "tau_sim"
    label: str = "tokens per round"
    title: str = "acceptance length, simulated, held out"


def plot_curves(path: Path, lines: Sequence[Mapping[str, float]], title: str, curves: Curves | None = None) -> bool:
    """Losses and score over steps as a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    curves = curves or Curves()
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for part, style in zip(curves.losses, ("-", ":", "--"), strict=False):
        names = {name for line in lines for name in line if name.rpartition("_")[0] == part}
        for name in sorted(names):
            step = int(name.rpartition("_")[2])
            points = [(line["step"], line[name]) for line in lines if name in line]
            label = f"{part} loss, step {step}"
            left.plot(*zip(*points, strict=True), style, color=f"C{step - 1}", label=label, linewidth=1)
    left.set(xlabel="optimiser step", ylabel="loss per position", yscale="log", title=title)
    points = [(line["step"], line[curves.score]) for line in lines if curves.score in line]
    if points:
        right.plot(*zip(*points, strict=True), "o-", markersize=3)
    right.set(xlabel="optimiser step", ylabel=curves.label, title=curves.title)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    if left.get_legend_handles_labels()[0]:
        left.legend(fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return True
