"""Tokens per second of plain decoding for the sizes of known models, with random weights: no download is needed.

    python packages/coral-spec/benchmarks/plain_speed.py --json packages/coral-spec/results/plain-speed.json

Speed does not depend on the weights. `model` is transformers' own class launched operation by operation with this
package's cache; `engine` is this package's. `--quick` takes the smallest model and few tokens.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedConfig, Qwen2Config

from coral_spec.backbone import Backbone
from coral_spec.drafts import NoDraft
from coral_spec.engine import Session
from coral_spec.sampling import Sampling
from coral_spec.targets import Target
from expkit.checkpoint import write_json
from expkit.device import synchronize
from expkit.rundir import evidence

CONTEXT = 2048
MODELS: dict[str, PreTrainedConfig] = {
    "SmolLM2-135M": LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=CONTEXT,
    ),
    "Gemma3-270M": Gemma3TextConfig(
        hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1,
        head_dim=256, vocab_size=262144, sliding_window=512, max_position_embeddings=CONTEXT,
    ),
    "Qwen2.5-0.5B": Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=CONTEXT,
    ),
    "Llama-3.2-1B": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=True, max_position_embeddings=CONTEXT,
    ),
    "Llama-3-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=CONTEXT,
    ),
}  # fmt: skip
PROMPT = 100


def random_target(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> Target:
    """A model of these sizes with random weights, and no tokenizer."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(default)
    model = model.eval().requires_grad_(False)
    return Target("random", model, None, device, dtype, CONTEXT, "", ())  # type: ignore[arg-type]


@torch.inference_mode()
def tokens_per_second(backbone: Backbone, tokens: int) -> float:
    """Of the second answer, prefill not counted."""
    device = backbone.target.device
    session = Session(backbone, NoDraft(), PROMPT + tokens + 8)
    sampling, seeds = Sampling(), torch.zeros(1, dtype=torch.long, device=device)
    ids = [(7 * place + 1) % backbone.vocab_size for place in range(PROMPT)]
    took = 0.0
    for _ in range(2):
        session.begin(*session.prefill(ids), 0, sampling, seeds)
        synchronize(device)
        started = time.perf_counter()
        for number in range(tokens):
            while session.under_way < min(session.ahead, tokens - number):
                session.launch(sampling, seeds)
            session.collect()
        took = time.perf_counter() - started
    return tokens / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.models, options.tokens = list(MODELS)[:1], 12
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: dict[str, dict[str, Any]] = {}
    out = Table("model", "weights MB", "model tok/s", "engine tok/s", "GB/s of weights read")
    for name in options.models:
        target = random_target(MODELS[name], device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        backbone = Backbone(target)
        bytes_read = sum(each.nbytes for each in target.model.parameters())
        if not MODELS[name].tie_word_embeddings:
            bytes_read -= target.model.get_input_embeddings().weight.nbytes
        engine = tokens_per_second(backbone, options.tokens)
        backbone.layers = []
        stock = tokens_per_second(backbone, min(options.tokens, 32))
        rows[name] = {"bytes": bytes_read, "model": stock, "engine": engine, "bytes_per_second": engine * bytes_read}
        speeds = [f"{each:.0f}" for each in (stock, engine, engine * bytes_read / 1e9)]
        out.add_row(name, f"{bytes_read / 1e6:.0f}", *speeds)
        del target, backbone
    Console().print(out)
    if options.json is not None:
        settings = {"tokens": options.tokens, "prompt": PROMPT, "device": str(device)}
        write_json(options.json, {"models": rows, "settings": settings, **evidence(0)})


if __name__ == "__main__":
    main()
