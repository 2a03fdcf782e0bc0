"""The grouped head's kernel against the full head and against the memory's own speed.

    python packages/coral-spec/benchmarks/grouped_head.py --json packages/coral-spec/results/grouped-head.json

Heads of known models with random weights, a quarter and an eighth of the rows active, several nodes of a tree level.
Microseconds, median, calls captured one after another in a CUDA graph; heads rotate so that no cache holds them. `full`
is cuBLAS's product with all rows, then this package's top-k; `torch` is `topk` and `logsumexp` instead; the bandwidth
is that of a device copy in the same run, bytes read and written. Writes a roofline beside the JSON. `--tiles` tries the
tiles of the product instead, compiled by several processes first. `--quick` runs small sizes; on a CPU in Triton's
interpreter, which measures nothing but shows that the script works.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from graph_timing import microseconds

from coral_spec.kernels.grouped import Tiles, grouped_top
from coral_spec.kernels.top import top_log_probs
from expkit.checkpoint import atomic_path, write_json
from expkit.rundir import evidence

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS = {
    "Llama-3-8B": (128256, 4096),
    "Qwen2.5-7B": (152064, 3584),
    "Gemma3-270M": (262144, 640),
    "SmolLM2-135M": (49152, 576),
}
GROUPS, COUNT = 32, 10
SHARES = (4, 8)
NODES = (1, 10, 16)
CANDIDATES = [Tiles(*each) for each in itertools.product((32, 64, 128, 256), (64, 128, 256), (4, 8), (3, 4, 6))]


def copy_bandwidth() -> float:
    """Bytes per second that a device copy reads and writes."""
    size = 1 << (30 if DEVICE.type == "cuda" else 16)
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE).random_(0, 255)
    target = torch.empty_like(source)
    return 2 * size / (microseconds([lambda: target.copy_(source)] * 4) * 1e-6)


def plain_top(logits: Tensor) -> tuple[Tensor, Tensor]:
    """By torch's own operations."""
    best = logits.topk(COUNT, dim=-1)
    return best.values.float() - logits.float().logsumexp(-1, keepdim=True), best.indices


class Problem:
    """Some copies of a head, so that no cache holds them, and which groups of them are read."""

    def __init__(self, vocab: int, width: int, share: int, nodes: int) -> None:
        dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
        rows, copies = -(-vocab // GROUPS), max(2, min(6, int(3e8 // (vocab * width * 2)) + 1))
        slabs = [torch.randn(GROUPS, rows, width, device=DEVICE).mul_(0.02).to(dtype) for _ in range(copies)]
        ids = torch.arange(GROUPS * rows, device=DEVICE).view(GROUPS, rows)
        self.features, self.slabs = torch.randn(nodes, width, device=DEVICE).to(dtype), slabs
        self.ids = torch.where(ids < vocab, ids, -1)
        many = range(8 if DEVICE.type == "cuda" else 2)
        self.choices = [torch.randperm(GROUPS, device=DEVICE)[: GROUPS // share].sort().values for _ in many]
        self.bytes = (GROUPS // share) * rows * width * slabs[0].element_size()

    def launch(self, number: int, tiles: Tiles | None = None) -> tuple[Tensor, Tensor]:
        """One call, each number with another head and other groups."""
        slabs, active = self.slabs[number % len(self.slabs)], self.choices[number]
        return grouped_top(self.features, slabs, active, COUNT, ids=self.ids, tiles=tiles, cast=DEVICE.type == "cpu")

    def microseconds(self, tiles: Tiles | None = None) -> float:
        """Of a call."""
        return microseconds([lambda n=number: self.launch(n, tiles) for number in range(len(self.choices))])


def compile_part(part: int, parts: int) -> None:
    """Launch every ``parts``-th candidate once at every width, so that Triton's cache holds it."""
    problems = [Problem(GROUPS * 64, width, 8, NODES[1]) for width in {width for _, width in HEADS.values()}]
    for problem, tiles in itertools.product(problems, CANDIDATES[part::parts]):
        with suppress(Exception):  # too large for the GPU's shared memory: not a candidate there
            problem.launch(0, tiles)


@torch.inference_mode()
def try_tiles(processes: int) -> list[dict[str, Any]]:
    """Microseconds of every candidate, by head and share."""
    command = [sys.executable, __file__, "--processes", str(processes), "--part"]
    for each in [subprocess.Popen([*command, str(part)]) for part in range(processes)]:
        each.wait()
    found: list[dict[str, Any]] = []
    out = Table("head", "active rows", "now", "best", "of the bandwidth", "tiles")
    bandwidth = copy_bandwidth()
    for (name, (vocab, width)), share in itertools.product(HEADS.items(), SHARES):
        problem = Problem(vocab, width, share, NODES[1])
        row: dict[str, Any] = {"head": name, "share": share, "now": problem.microseconds(), "bytes": problem.bytes}
        row["tiles"] = []
        for tiles in CANDIDATES:
            with suppress(Exception):
                row["tiles"].append({**asdict(tiles), "microseconds": problem.microseconds(tiles)})
        row["tiles"].sort(key=lambda each: each["microseconds"])
        found.append(row)
        for place, best in enumerate(row["tiles"][:3]):
            start = [name, f"1/{share}", f"{row['now']:.1f}"] if place == 0 else ["", "", ""]
            rate = problem.bytes / best["microseconds"] * 1e6 / bandwidth
            what = f"{best['rows']} x {best['depth']}, {best['warps']} warps, {best['stages']} stages"
            out.add_row(*start, f"{best['microseconds']:.1f}", f"{rate:.0%}", what)
    Console(width=120).print(out)
    return found


@torch.inference_mode()
def measure(vocab: int, width: int, share: int, nodes: int) -> dict[str, Any]:
    """One head, one share of active rows."""
    problem = Problem(vocab, width, share, nodes)
    features, slabs, routed = problem.features, problem.slabs, problem.microseconds()
    heads = [each.view(-1, width)[:vocab] for each in slabs]

    def whole(number: int) -> Tensor:
        return functional.linear(features, heads[number % len(heads)])

    full = microseconds([lambda n=number: top_log_probs(whole(n), COUNT) for number in range(6)])
    stock = microseconds([lambda n=number: plain_top(whole(n)) for number in range(6)])
    read = problem.bytes
    return {"routed": routed, "full": full, "torch": stock, "bytes": read, "bytes_per_second": read / routed * 1e6}


def draw(rows: list[dict[str, Any]], bandwidth: float, path: Path) -> None:
    """Bytes read against the rate at which they were read, under the memory's own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(HEADS, ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=True))
    markers = dict(zip(NODES, ("o", "s", "^"), strict=True))
    for row in rows:
        axes.plot(
            row["bytes"] / 1e6,
            row["bytes_per_second"] / 1e12,
            markers[row["nodes"]],
            color=colours[row["head"]],
            label=f"{row['head']}, {row['nodes']} nodes" if row["share"] == SHARES[0] else None,
        )
    axes.axhline(bandwidth / 1e12, color="#5F5F5F", label="device copy")
    axes.axhline(0.8 * bandwidth / 1e12, color="#5F5F5F", linestyle=":", label="80 % of it")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("megabytes of active rows")
    axes.set_ylabel("TB/s of active rows read, top-k included")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, ncols=2)
    with atomic_path(path) as aside:
        figure.savefig(aside, format="png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.part is not None:
        return compile_part(options.part, options.processes)
    if options.tiles:
        found = try_tiles(options.processes)
        if options.json is not None:
            write_json(options.json, {"measured": found, **evidence(0)})
        return None
    heads = {"SmolLM2-135M": (1000, 64)} if options.quick else HEADS
    nodes_of = NODES[:2] if options.quick else NODES
    bandwidth = copy_bandwidth()
    out = Table("head", "active rows", "nodes", "routed µs", "of the bandwidth", "full µs", "torch µs", "over full")
    rows: list[dict[str, Any]] = []
    for (name, (vocab, width)), share, nodes in itertools.product(heads.items(), SHARES, nodes_of):
        row = {"head": name, "share": share, "nodes": nodes, **measure(vocab, width, share, nodes)}
        rows.append(row)
        of_copy, over = row["bytes_per_second"] / bandwidth, row["full"] / row["routed"]
        times = [f"{row[key]:.1f}" for key in ("routed", "full", "torch")]
        out.add_row(name, f"1/{share}", str(nodes), times[0], f"{of_copy:.0%}", *times[1:], f"{over:.2f}x")
    Console(width=120).print(out)
    print(f"device copy: {bandwidth / 1e12:.2f} TB/s read and written")
    if options.json is not None:
        about = {"groups": GROUPS, "count": COUNT, "copy_bytes_per_second": bandwidth}
        write_json(options.json, {"measured": rows, "settings": about, **evidence(0)})
        if DEVICE.type == "cuda":
            draw(rows, bandwidth, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
