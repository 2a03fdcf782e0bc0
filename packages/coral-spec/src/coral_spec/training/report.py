"""What a finished run leaves: the drafter's folder with its model card, a result file and a plot of its curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from coral_spec.drafter import Drafter
from coral_spec.training.config import TrainConfig
from coral_spec.training.data import Manifest
from expkit.checkpoint import atomic_path


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


def plot_curves(path: Path, lines: Sequence[Mapping[str, float]], title: str) -> bool:
    """Losses and simulated acceptance over steps as a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for part, style in (("soft", "-"), ("feature", ":")):
        names = sorted({name for line in lines for name in line if name.startswith(f"{part}_")})
        for number, name in enumerate(names):
            points = [(line["step"], line[name]) for line in lines if name in line]
            label = f"{part} loss, step {name.rsplit('_', 1)[1]}"
            left.plot(*zip(*points, strict=True), style, color=f"C{number}", label=label, linewidth=1)
    left.set(xlabel="optimiser step", ylabel="loss per position", yscale="log", title=title)
    points = [(line["step"], line["tau_sim"]) for line in lines if "tau_sim" in line]
    if points:
        right.plot(*zip(*points, strict=True), "o-", markersize=3)
    right.set(xlabel="optimiser step", ylabel="tokens per round", title="acceptance length, simulated, held out")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    if left.get_legend_handles_labels()[0]:
        left.legend(fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return True
