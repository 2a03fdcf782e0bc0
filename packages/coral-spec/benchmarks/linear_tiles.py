"""Which tiles suit which product of a few rows: microseconds of every candidate, launched one after another in a graph.

    python packages/coral-spec/benchmarks/linear_tiles.py --json packages/coral-spec/results/linear-tiles.json

Sizes are SmolLM2-135M's. Weights rotate, so that no cache holds them, and `cublas` is torch's own product without
norm, gate and residual. Candidates are compiled by several processes first. `--quick` runs a few on any device: on a
CPU in Triton's interpreter, which measures nothing but shows that the script works.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from graph_timing import microseconds

from coral_spec.kernels.linear import Tiles, choose_tiles, linear
from expkit.checkpoint import write_json
from expkit.rundir import evidence

# name -> outputs, width, norm, residual, gated
SHAPES = {
    "qkv": (960, 576, True, False, False),
    "out": (576, 576, False, True, False),
    "gate-up": (1536, 576, True, False, True),
    "down": (576, 1536, False, True, False),
    "fc": (576, 1152, False, False, False),
    "8,192 head rows": (8192, 576, False, False, False),
    "head": (49152, 576, False, False, False),
}
ROWS = (1, 7, 10, 24, 61)
ONE_ROW = [Tiles(*each, 1) for each in itertools.product((2, 4, 8, 16), (256, 512, 1024), (2, 4, 8))]
MANY_ROWS = [
    *(Tiles(*each) for each in itertools.product((16,), (64, 128, 256), (1, 2, 4), (2, 4))),
    *(Tiles(*each) for each in itertools.product((32,), (64, 128), (2, 4, 8), (3,))),
    *(Tiles(*each) for each in itertools.product((64, 128), (64, 128), (4, 8), (3, 4))),
]


def launches(name: str, rows: int, tiles: Tiles | None, weights: list[torch.Tensor]) -> list[Any]:
    """Calls of one product, each with another weight; ``tiles`` None: torch's own."""
    outputs, width, norm, residual, gated = SHAPES[name]
    like = weights[0]
    states = torch.randn(rows, width, device=like.device).to(like.dtype)
    squares = torch.ones(width // 16, rows, device=like.device) if norm else None
    scale = torch.ones(outputs, device=like.device) if residual else None
    extra = torch.randn(rows, outputs, device=like.device).to(like.dtype) if residual else None
    if tiles is None:
        return [lambda w=w: torch.nn.functional.linear(states, w) for w in weights]
    options: dict[str, Any] = {"squares": squares, "eps": 1e-5, "residual": extra, "next_norm": scale}
    options |= {"activation": "silu" if gated else None, "gated": gated}
    return [lambda w=w: linear(states, w, tiles=tiles, cast=like.device.type == "cpu", **options) for w in weights]


def make_weights(name: str, count: int, device: str) -> list[torch.Tensor]:
    outputs, width, _, _, gated = SHAPES[name]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size = (2 * outputs if gated else outputs, width)
    return [torch.randn(size, device=device).mul_(0.02).to(dtype) for _ in range(count)]


def candidates() -> list[tuple[str, int, Tiles]]:
    """All that is measured; large heads are not tried with few columns."""
    found = []
    for name, rows in itertools.product(SHAPES, ROWS):
        for tiles in ONE_ROW if rows == 1 else MANY_ROWS:
            if SHAPES[name][0] <= 4096 or tiles.outputs >= (4 if rows == 1 else 32):
                found.append((name, rows, tiles))
    return found


def compile_part(part: int, parts: int) -> None:
    """Launch every ``parts``-th candidate once, so that Triton's cache holds it."""
    for name, rows, tiles in candidates()[part::parts]:
        try:
            launches(name, rows, tiles, make_weights(name, 1, "cuda"))[0]()
        except Exception:  # too large for the GPU's shared memory: not a candidate there
            continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.quick:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for rows in (1, 10):
            launches("out", rows, choose_tiles(rows, 576, 576, device == "cpu"), make_weights("out", 1, device))[0]()
            print(f"out, {rows} rows: ran on {device}")
        return
    if options.part is not None:
        return compile_part(options.part, options.processes)
    parts = [
        subprocess.Popen([sys.executable, __file__, "--part", str(part), "--processes", str(options.processes)])
        for part in range(options.processes)
    ]
    for each in parts:
        each.wait()
    rows_out: list[dict[str, Any]] = []
    for name in SHAPES:
        count = 24 if SHAPES[name][0] <= 8192 else 4
        weights = make_weights(name, count, "cuda")
        for rows in ROWS:
            tried = [None, *(tiles for n, r, tiles in candidates() if (n, r) == (name, rows))]
            for tiles in tried:
                try:
                    took = microseconds(launches(name, rows, tiles, weights))
                except Exception:
                    torch.cuda.synchronize()
                    continue
                label = None if tiles is None else vars(tiles)
                rows_out.append({"product": name, "rows": rows, "tiles": label, "microseconds": took})
            mine = sorted(
                (e for e in rows_out if (e["product"], e["rows"]) == (name, rows)), key=lambda e: e["microseconds"]
            )
            own = next(e for e in mine if e["tiles"] is None)["microseconds"]
            best = [e for e in mine if e["tiles"]][:3]
            text = "  ".join(f"{e['microseconds']:.2f} {tuple(e['tiles'].values())}" for e in best)
            print(f"{name:16} {rows:3} rows  cublas {own:6.2f}  best {text}", flush=True)
    if options.json:
        write_json(options.json, {**evidence(0), "measured": rows_out})


if __name__ == "__main__":
    main()
