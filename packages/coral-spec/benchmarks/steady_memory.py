"""Whether memory grows while tokens are generated: bytes after every answer, in one process.

    python packages/coral-spec/benchmarks/steady_memory.py --json packages/coral-spec/results/steady-memory.json

Answers of different lengths, drafted, greedy and sampled in turn, until 10,000 tokens. On a GPU it is what torch has
allocated and reserved, on a CPU the process's resident size. `--quick`: 300 tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import coral_spec
from expkit.checkpoint import write_json
from expkit.rundir import evidence

PROMPT = "Tell the history of the bicycle, in as much detail as you can."
LENGTHS = (700, 150, 1000, 400)


def held(device: torch.device) -> dict[str, int]:
    """Bytes now."""
    if device.type == "cuda":
        return {"allocated": torch.cuda.memory_allocated(device), "reserved": torch.cuda.memory_reserved(device)}
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return {"resident": next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    lengths = tuple(length // 20 for length in LENGTHS) if options.quick else LENGTHS
    wanted = 300 if options.quick else options.tokens
    model = coral_spec.load(options.model)
    rows: list[dict[str, Any]] = []
    tokens = 0
    while tokens < wanted:
        number = len(rows)
        length = lengths[number % len(lengths)]
        temperature = 0.0 if number % 2 == 0 else 0.8
        answer = model.generate(PROMPT, max_new_tokens=length, temperature=temperature, seed=number, ignore_eos=True)
        tokens += answer.statistics.new_tokens
        rows.append({"tokens": tokens, "tree": answer.statistics.tree, **held(model.target.device)})
    what = [key for key in rows[0] if key not in ("tokens", "tree")]
    out = Table("tokens", "tree", *(f"{key} MB" for key in what))
    for row in rows:
        out.add_row(f"{row['tokens']:,}", row["tree"], *(f"{row[key] / 1e6:.1f}" for key in what))
    Console().print(out)
    # Every length and both ways of sampling have come once, and what they need is there.
    settled = rows[min(2 * len(lengths), len(rows)) - 1]
    growth = {key: rows[-1][key] - settled[key] for key in what}
    print(f"grown since {settled['tokens']:,} tokens:", {key: f"{value / 1e6:.1f} MB" for key, value in growth.items()})
    if options.json is not None:
        about = {"model": options.model, "device": str(model.target.device), "settled_at": settled["tokens"]}
        write_json(options.json, {"answers": rows, "growth": growth, "settings": about, **evidence(0)})


if __name__ == "__main__":
    main()
