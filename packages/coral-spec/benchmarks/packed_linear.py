"""Milliseconds of one fp32 linear layer on this CPU, torch's stock product against the packed one, by rows.

    python packages/coral-spec/benchmarks/packed_linear.py --json packages/coral-spec/results/packed-linear.json

The sizes are SmolLM2-135M's. Weights rotate among 24 layers, so that no cache holds them.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from coral_spec.packing import packed
from expkit.checkpoint import write_json
from expkit.rundir import evidence

SIZES = {"gate, up": (576, 1536), "down": (1536, 576), "query, output": (576, 576), "8,192 head rows": (576, 8192)}
ROWS = (1, 2, 3, 5, 9, 13, 17, 61)
LAYERS, REPEATS = 24, 5


@torch.inference_mode()
def milliseconds(layers: list[nn.Module], rows: int, width: int) -> float:
    """Median over passes through all layers, per layer."""
    states = torch.randn(1, rows, width)
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for layer in layers:
            layer(states)
        times.append((time.perf_counter() - started) / len(layers) * 1e3)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    path = parser.parse_args().json
    torch.manual_seed(0)
    result = {**evidence(0), "threads": torch.get_num_threads(), "milliseconds": {}}
    for name, (width, outputs) in SIZES.items():
        stock: list[nn.Module] = [nn.Linear(width, outputs, bias=False).requires_grad_(False) for _ in range(LAYERS)]
        both = {"stock": stock, "packed": [packed(layer) for layer in stock]}
        found = {kind: {rows: milliseconds(layers, rows, width) for rows in ROWS} for kind, layers in both.items()}
        result["milliseconds"][name] = found
        for kind, rows in itertools.product(both, ROWS):
            print(f"{name:16} {kind:7} {rows:3} rows {found[kind][rows]:6.2f} ms")
    write_json(path, result)


if __name__ == "__main__":
    main()
