"""Tree attention at several lengths of context: this package's kernel, torch's SDPA with a mask, flex_attention.

    python packages/coral-spec/benchmarks/tree_attention.py --json packages/coral-spec/results/tree-attention.json

Microseconds of one layer, the layers of a model captured one after another in a CUDA graph, each with its own cache.
The kernel's time includes head norms, the rotary embedding and the cache write, which the others are spared. SDPA gets
the first slots of the cache up to the next multiple of 64, since a graph cannot follow the length; its keys' heads are
not repeated but queries are folded, as in the package's torch path. Errors are against SDPA in fp32. `--quick` takes
seconds; on a CPU the kernel runs in Triton's interpreter, which measures nothing but shows that the script works.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
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

from coral_spec.kernels.attention import Blocks, attend, choose_blocks
from coral_spec.masks import additive, visibility
from expkit.checkpoint import write_json
from expkit.rundir import evidence

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODELS = {"SmolLM2-135M": (9, 3, 64, 30), "Llama-3-8B": (32, 8, 128, 8)}  # heads, key heads, head size, layers
CONTEXTS = (128, 1024, 4096, 16384)
NODES = (1, 10, 61)


@dataclass
class Problem:
    """One forward's attention: random nodes behind a random prefix."""

    heads: int
    qkv: Tensor
    turn: Tensor
    positions: Tensor
    lengths: Tensor
    ancestors: Tensor
    caches: list[tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def make(cls, sizes: tuple[int, int, int, int], context: int, nodes: int) -> Problem:
        """``nodes`` in a random tree behind ``context`` tokens."""
        heads, kv_heads, size, layers = sizes
        generator = torch.Generator().manual_seed(nodes)
        parents = [int(torch.randint(0, max(1, node), (1,), generator=generator)) for node in range(nodes)]
        ancestors = torch.eye(nodes, dtype=torch.bool)
        for node in range(1, nodes):
            ancestors[node] |= ancestors[parents[node]]
        dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, device=DEVICE).to(dtype)

        capacity = context + 64
        return cls(
            heads,
            rand(nodes, (heads + 2 * kv_heads) * size),
            torch.cat([torch.ones(capacity, size), torch.zeros(capacity, size)], dim=1).to(DEVICE, dtype),
            (context + ancestors.sum(1) - 1).to(DEVICE),
            torch.tensor([context], device=DEVICE),
            ancestors[None].to(DEVICE),
            [(rand(1, kv_heads, capacity, size), rand(1, kv_heads, capacity, size), _counter()) for _ in range(layers)],
        )

    def split(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query folded by key heads, and the cache as far as it is read, the nodes written to it."""
        keys, values, _ = self.caches[layer]
        kv_heads, size, nodes = keys.shape[1], keys.shape[3], self.qkv.shape[0]
        parts = self.qkv.view(nodes, -1, size)
        context = int(self.lengths)
        keys[0, :, context : context + nodes] = parts[:, self.heads : self.heads + kv_heads].transpose(0, 1)
        values[0, :, context : context + nodes] = parts[:, self.heads + kv_heads :].transpose(0, 1)
        query = parts[:, : self.heads].view(nodes, kv_heads, -1, size).permute(1, 2, 0, 3)[None]
        visible = min(keys.shape[2], -(-(context + nodes) // 64) * 64)
        return query, keys[:, :, :visible], values[:, :, :visible]


def _counter() -> Tensor:
    return torch.zeros(1024, dtype=torch.int32, device=DEVICE)


def kernel(problem: Problem, blocks: Blocks | None = None) -> list[Callable[[], Tensor]]:
    """Calls of this package's kernel, one for every layer; ``(nodes, heads * size)`` each."""
    size = problem.caches[0][0].shape[3]
    cos, sin = problem.turn[:, :size].contiguous(), problem.turn[:, size:].contiguous()
    return [
        lambda keys=keys, values=values, counter=counter: attend(
            problem.qkv, cos, sin, problem.positions, problem.lengths, problem.ancestors[0], keys, values, counter,
            offset=0, scaling=size**-0.5, blocks=blocks, cast=DEVICE.type == "cpu",
        )
        for keys, values, counter in problem.caches
    ]  # fmt: skip


def sdpa(problem: Problem, dtype: torch.dtype | None = None) -> list[Callable[[], Tensor]]:
    """Calls of `scaled_dot_product_attention` with a mask that is made once."""
    found = []
    for layer in range(len(problem.caches)):
        query, keys, values = problem.split(layer)
        groups = query.shape[2]
        folded = query.flatten(2, 3).to(dtype or query.dtype)
        keys, values = keys.to(dtype or keys.dtype), values.to(dtype or values.dtype)
        mask = additive(visibility(problem.ancestors, problem.lengths, keys.shape[2]), folded.dtype)
        mask = mask.repeat(1, 1, groups, 1)
        found.append(
            lambda q=folded, k=keys, v=values, m=mask: functional.scaled_dot_product_attention(q, k, v, attn_mask=m)
        )
    return found


def flex(problem: Problem) -> list[Callable[[], Tensor]]:
    """Calls of compiled `flex_attention`; its block mask is made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    nodes, ancestors, context = problem.qkv.shape[0], problem.ancestors[0], int(problem.lengths)

    def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
        behind = key - context
        own = ancestors[query.clamp(max=nodes - 1), behind.clamp(0, nodes - 1)]
        return (behind < 0) | ((behind < nodes) & own)

    found = []
    for layer in range(len(problem.caches)):
        query, keys, values = problem.split(layer)
        whole = query.flatten(1, 2)
        mask = create_block_mask(seen, None, None, nodes, keys.shape[2], device=str(DEVICE))
        found.append(lambda q=whole, k=keys, v=values, m=mask: compiled(q, k, v, block_mask=m, enable_gqa=True))
    return found


def error(problem: Problem) -> float:
    """Relative root mean square error of the kernel."""
    ours = kernel(problem)[0]().float()
    exact = sdpa(problem, torch.float32)[0]()
    nodes = ours.shape[0]
    exact = exact.view(exact.shape[1], -1, nodes, exact.shape[3]).permute(2, 0, 1, 3).reshape(nodes, -1)
    return float((ours - exact).norm() / exact.norm())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--flex", action="store_true", help="compile flex_attention too, for 61 nodes (a minute)")
    parser.add_argument("--blocks", action="store_true", help="try other blocks of the kernel too")
    parser.add_argument("--quick", action="store_true", help="one model, a short context")
    options = parser.parse_args()
    torch.manual_seed(0)
    models = dict(list(MODELS.items())[:1]) if options.quick else MODELS
    out = Table("model", "context", "nodes", "kernel µs", "SDPA µs", "flex µs", "error", "best other blocks")
    rows: list[dict[str, Any]] = []
    for (name, sizes), context, nodes in itertools.product(
        models.items(), CONTEXTS[: 1 if options.quick else 4], NODES
    ):
        if options.quick:
            sizes = (*sizes[:3], 2)
        problem = Problem.make(sizes, context, nodes)
        row: dict[str, Any] = {"model": name, "context": context, "nodes": nodes, "error": error(problem)}
        row |= {"kernel": microseconds(kernel(problem)), "sdpa": microseconds(sdpa(problem)), "flex": None}
        if options.flex and nodes == NODES[-1]:
            try:
                row["flex"] = microseconds(flex(problem))
            except Exception as failure:  # some releases compile no kernel for some of these sizes
                row["flex_failed"] = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
                torch.cuda.synchronize()
        row["blocks"] = _other_blocks(problem) if options.blocks else []
        rows.append(row)
        best = min(row["blocks"], key=lambda each: each["microseconds"], default=None)
        cells = [f"{row[key]:.1f}" if row[key] is not None else "" for key in ("kernel", "sdpa", "flex")]
        other = f"{best['microseconds']:.1f} {tuple(best['blocks'].values())}" if best else ""
        out.add_row(name, f"{context:,}", str(nodes), *cells, f"{row['error']:.1e}", other)
    Console(width=130).print(out)
    if options.json is not None:
        write_json(options.json, {"measured": rows, **evidence(0)})


def _other_blocks(problem: Problem) -> list[dict[str, Any]]:
    kv_heads, capacity, size = problem.caches[0][0].shape[1:]
    rows = problem.qkv.shape[0] * problem.heads // kv_heads
    chosen = choose_blocks(rows, kv_heads, size, capacity, False)
    found = []
    for queries, least, splits in itertools.product((16, 32, 64), (1, 2), (8, 16, 32, 64)):
        blocks = Blocks(queries, chosen.keys, 4, 2, least, splits)
        found.append({"blocks": vars(blocks), "microseconds": microseconds(kernel(problem, blocks))})
    return found


if __name__ == "__main__":
    main()
