"""Milliseconds of one linear layer on this CPU, torch's stock product against the packed one, by rows: in fp32, and in
bf16 where the processor multiplies in it.

    python packages/coral-spec/benchmarks/packed_linear.py --json packages/coral-spec/results/packed-linear.json

The sizes are SmolLM2-135M's. Weights rotate among 24 layers, so that no cache holds them. `--quick`: few layers and
rows.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from coral_spec.packing import multiplies_bf16, packed
from expkit.checkpoint import write_json
from expkit.rundir import evidence

SIZES = {"gate, up": (576, 1536), "down": (1536, 576), "query, output": (576, 576), "8,192 head rows": (576, 8192)}
ROWS = (1, 3, 5, 9, 13, 17, 61)
LAYERS, REPEATS = 24, 9


@torch.inference_mode()
def milliseconds(layers: list[nn.Module], rows: int, width: int) -> float:
    """Median over passes through all layers, per layer."""
    states = torch.randn(1, rows, width).to(next(layers[0].parameters()).dtype)
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for layer in layers:
            layer(states)
        times.append((time.perf_counter() - started) / len(layers) * 1e3)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    count, several = (4, ROWS[:3]) if options.quick else (LAYERS, ROWS)
    torch.manual_seed(0)
    result = {**evidence(0), "threads": torch.get_num_threads(), "milliseconds": {}}
    precisions = {"fp32": torch.float32, **({"bf16": torch.bfloat16} if multiplies_bf16() else {})}
    for (precision, dtype), (name, (width, outputs)) in itertools.product(precisions.items(), SIZES.items()):
        stock: list[nn.Module] = [
            nn.Linear(width, outputs, bias=False, dtype=dtype).requires_grad_(False) for _ in range(count)
        ]
        both = {"stock": stock, "packed": [packed(layer) for layer in stock]}
        found = {kind: {rows: milliseconds(layers, rows, width) for rows in several} for kind, layers in both.items()}
        result["milliseconds"].setdefault(precision, {})[name] = found
        for kind, rows in itertools.product(both, several):
            print(f"{precision} {name:16} {kind:7} {rows:3} rows {found[kind][rows]:6.3f} ms")
    if options.json is not None:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
