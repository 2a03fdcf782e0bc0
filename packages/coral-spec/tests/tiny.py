"""Tiny random targets of every architecture that the package holds: real classes, a few thousand weights.

from tiny import tiny_target
target = tiny_target("gemma3", seed=1)
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from coral_spec.targets.target import Target, make_target

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "mistral-window", "gemma3")
SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Gemma's norms multiply by 1 + weight. Without these the scaled embedding drowns the layers and attention is
# nearly uniform, so that every token repeats itself.
_GEMMA_SHIFT = {"post_attention_layernorm": 12.0, "post_feedforward_layernorm": 4.0, "q_norm": 3.0, "k_norm": 1.0}


def tiny_tokenizer(vocab: int = 259, chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with exactly `vocab` ids: three specials, then bytes, then pairs of letters.

    Below 259 ids some bytes are missing and vanish when encoded; frequent letters and the space go last.
    """
    letters = "etaoinshrdlcumwfgypbvkxjqz"
    first = [*letters[:4], "\u0120", *letters[4:], "\u010a"]  # the space and the line break as bytes are written
    alphabet = [*first, *sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(first))]
    pairs = [(a, b) for a in letters for b in letters]
    words = [*alphabet, *(a + b for a, b in pairs)][: vocab - len(SPECIAL_TOKENS)]
    assert len(words) + len(SPECIAL_TOKENS) == vocab, f"vocab {vocab} is outside 4..935"
    merges = pairs[: max(0, len(words) - len(alphabet))]
    ids = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *words])}
    backend = Tokenizer(models.BPE(vocab=ids, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(
    architecture: str, *, vocab: int = 259, width: int = 32, layers: int = 2, context: int = 512, window: int = 16
) -> PreTrainedConfig:
    """The configuration of a tiny model; `window` counts for "mistral-window" and "gemma3" only."""
    sizes: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "initializer_range": 0.4,  # wide, so that greedy text is not one token for ever
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    head_dim = width // 4
    match architecture:
        case "llama":
            return LlamaConfig(**sizes, tie_word_embeddings=False)
        case "qwen2":
            return Qwen2Config(**sizes, tie_word_embeddings=True)
        case "qwen3":
            return Qwen3Config(**sizes, head_dim=2 * head_dim, tie_word_embeddings=False)
        case "mistral":
            return MistralConfig(**sizes, head_dim=head_dim, sliding_window=None)
        case "mistral-window":
            return MistralConfig(**sizes, head_dim=head_dim, sliding_window=window)
        case "gemma3":
            kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
            return Gemma3TextConfig(
                **sizes,
                head_dim=head_dim,
                query_pre_attn_scalar=head_dim,
                sliding_window=window,
                layer_types=kinds,
            )
    raise ValueError(f"unknown architecture {architecture!r}, expected one of {', '.join(ARCHITECTURES)}")


def tiny_model(config: PreTrainedConfig, *, seed: int = 0, attention: str = "sdpa") -> PreTrainedModel:
    """Random fp32 weights for `config`, the same for the same seed; torch's global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:  # norms and biases start as constants, which would hide mistakes
                    parameter.add_(0.3 * torch.randn_like(parameter))
                if config.model_type == "gemma3_text":
                    parameter.add_(_GEMMA_SHIFT.get(name.split(".")[-2], 0.0))
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    return model


def tiny_target(
    architecture: str = "llama",
    seed: int = 0,
    *,
    vocab: int = 259,
    width: int = 32,
    layers: int = 2,
    context: int = 512,
    window: int = 16,
    chat: bool = True,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Target:
    """A random target of one of `ARCHITECTURES`, named `tiny-<architecture>`, built in memory."""
    config = tiny_config(architecture, vocab=vocab, width=width, layers=layers, context=context, window=window)
    model = tiny_model(config, seed=seed, attention=attention)
    for parameter in model.parameters():  # not `model.to(dtype)`, which rounds the rotary frequencies; loading does not
        parameter.data = parameter.data.to(dtype)
    model.to(device=device)  # type: ignore[arg-type]
    return make_target(f"tiny-{architecture}", model, tiny_tokenizer(vocab, chat))
