"""Peak memory of one answer with and without drafting, each in a process of its own with the same cache length.

    python packages/coral-spec/benchmarks/peak_memory.py --json packages/coral-spec/results/peak-memory.json

On a CPU it is the process's largest resident size, on CUDA the largest allocation. `--quick`: a short answer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

PROMPT = "Explain how a bicycle stays upright, in simple words, and write a long essay on it."


def measure(model: str, draft: str, tokens: int) -> int:
    """Bytes at the peak of loading and one answer, in this process."""
    import coral_spec
    from expkit.device import peak_memory

    loaded = coral_spec.load(model, draft=draft)
    loaded.generate(PROMPT, max_new_tokens=tokens, ignore_eos=True)
    return peak_memory(loaded.target.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--draft", help="measure this draft alone and print bytes (used for the processes)")
    options = parser.parse_args()
    if options.draft is not None:
        print(measure(options.model, options.draft, options.max_new_tokens))
        return

    from expkit.checkpoint import write_json
    from expkit.rundir import evidence

    found = {}
    for draft in ("none", "auto"):
        command = [sys.executable, __file__, "--model", options.model, "--draft", draft]
        command += ["--max-new-tokens", str(8 if options.quick else options.max_new_tokens)]
        found[draft] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    result = {"peak_bytes": found, "ratio": found["auto"] / found["none"], **evidence()}
    print(json.dumps(result["peak_bytes"]), f"ratio {result['ratio']:.3f}")
    if options.json is not None:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
