"""One step of drafting with the routed and with the full head, for the sizes of a large model, random weights.

    python packages/coral-spec/benchmarks/draft_step.py --json packages/coral-spec/results/draft-step.json

A step is a level of the tree: the drafter's layer over its nodes, then the head and the best tokens of each node, all
as the engine does it, captured in a CUDA graph. A tree of 6 levels takes four such steps more than one of 2, so a step
is a quarter of the difference. Microseconds, from medians. `--quick` runs small sizes; on a CPU it measures nothing,
but shows that the script works.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from graph_timing import microseconds
from plain_speed import MODELS, random_target
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from coral_spec.backbone import Backbone
from coral_spec.drafter import Drafter, DrafterConfig
from coral_spec.drafts import DrafterDraft
from coral_spec.grouping import make_grouping
from coral_spec.heads import FullHead, ProposalHead, RoutedHead
from coral_spec.layers import FusedDrafter
from coral_spec.router import Router, Routing
from coral_spec.statistics import Stopwatch
from coral_spec.tree import TreeShape
from expkit.checkpoint import write_json
from expkit.rundir import evidence

PREFIX, CAPACITY = 300, 512
GROUPS, ALWAYS = 128, 4
SHARES = (4, 8, 16)
WIDTHS = (1, 10, 16)
DEPTHS = (2, 6)


class Problem:
    """A drafter and its target's head, both random."""

    def __init__(self, config: LlamaConfig) -> None:
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")
        target = random_target(config, self.device, torch.bfloat16 if cuda else torch.float32)
        self.backbone = Backbone(target)
        drafter = Drafter(DrafterConfig.from_target(target)).to(self.device, target.dtype).eval().requires_grad_(False)
        self.drafter = FusedDrafter(drafter)
        self.drafter_bytes = sum(each.nbytes for each in drafter.parameters())
        router = Router(config.hidden_size, GROUPS).to(self.device, target.dtype).eval().requires_grad_(False)
        grouping = make_grouping("contiguous", GROUPS, ALWAYS, torch.arange(config.vocab_size))
        self.heads: dict[str, ProposalHead] = {"full": FullHead(self.backbone)}
        for share in SHARES:
            routing = Routing(router, grouping, GROUPS // share - ALWAYS, "renormalised")
            self.heads[f"1/{share}"] = RoutedHead(self.backbone, routing)

    def propose(self, head: str, shape: TreeShape) -> float:
        """Microseconds of a whole tree."""
        draft = DrafterDraft(self.backbone, self.drafter, self.heads[head], shape)
        draft.resize(1, CAPACITY, 0)
        width, vocab = self.backbone.hidden_size, self.backbone.vocab_size
        history = torch.randint(vocab, (1, CAPACITY), device=self.device)
        features = torch.randn(1, PREFIX, width, device=self.device).to(self.backbone.target.dtype)
        start = torch.zeros(1, dtype=torch.long, device=self.device)
        lengths = torch.full_like(start, PREFIX)
        draft.absorb(history[:, 1 : PREFIX + 1], features, start, lengths, 0)
        watch = Stopwatch(self.device).silent()
        return microseconds([lambda: draft.propose(history, lengths, PREFIX, watch)] * 4)

    def step(self, head: str, width: int) -> float:
        """Microseconds of a step with so many nodes."""
        short, long = (
            self.propose(head, TreeShape(depth, width, min(32, width if width == 1 else 2 * width))) for depth in DEPTHS
        )
        return (long - short) / (DEPTHS[1] - DEPTHS[0])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", choices=[name for name, each in MODELS.items() if isinstance(each, LlamaConfig)])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    name = options.model or ("SmolLM2-135M" if options.quick else "Llama-3-8B")
    config = LlamaConfig(**{**MODELS[name].to_dict(), "num_hidden_layers": 1})  # of the target only its head is used
    if options.quick:
        config.vocab_size = 2048
    problem = Problem(config)
    row_bytes = config.hidden_size * problem.backbone.output.weight.element_size()
    rows: list[dict[str, Any]] = []
    out = Table("nodes", "head", "MB read", "µs a step", "of the full head's")
    for width in WIDTHS:
        full = float("nan")
        for head, made in problem.heads.items():
            took = problem.step(head, width)
            full = took if head == "full" else full
            read = problem.drafter_bytes + made.rows * row_bytes
            rows.append(
                {
                    "nodes": width,
                    "head": head,
                    "rows": made.rows,
                    "bytes": read,
                    "microseconds": None if math.isnan(took) else took,
                }
            )
            out.add_row(str(width), head, f"{read / 1e6:.0f}", f"{took:.1f}", f"{took / full:.2f}")
    Console(width=100).print(out)
    if options.json is not None:
        about = {"model": name, "groups": GROUPS, "always": ALWAYS, "prefix": PREFIX, "depths": DEPTHS}
        write_json(options.json, {"measured": rows, "settings": about, **evidence(0)})


if __name__ == "__main__":
    main()
