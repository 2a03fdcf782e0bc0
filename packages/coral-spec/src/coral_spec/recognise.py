"""A decoder's layers, read out of an unmodified model: which architectures are understood is decided here. Ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from coral_spec import packing
from coral_spec.layers import ACTIVATIONS, Attention, Layer, Norm, Projection, Rope

STEADY_ROPE = frozenset({"default", "linear", "llama3", "yarn"})  # frequencies that do not depend on the length


def recognise(decoder: Any, positions: int) -> tuple[list[Layer], Norm] | None:
    """The layers and the final norm of a model's decoder; None when it is built in another way.

    What is read: rotary grouped-query attention with separate projections and optional head norms, a gated block, and
    norms before them and, as in Gemma, behind them.

    Args:
        decoder: as `transformers` built it.
        positions: rows of the rotary tables.
    """
    weight = decoder.norm.weight if hasattr(decoder, "norm") else torch.empty(0)
    if not all(_plain(each, weight) for each in decoder.modules() if isinstance(each, nn.Linear)):
        return None
    pack = packing.pays(decoder)
    tables: dict[str | None, Rope] = {}
    try:
        layers = [_read_layer(decoder, layer, positions, tables, pack) for layer in decoder.layers]
        return layers, _read_norm(decoder.norm)
    except (_Unknown, AttributeError, TypeError, KeyError):
        return None


def _plain(linear: nn.Linear, like: Tensor) -> bool:
    """Whether a linear layer is its weight and bias and nothing more: no adapter, hook, quantisation or offloading."""
    return (
        type(linear) is nn.Linear
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and (linear.weight.dtype, linear.weight.device) == (like.dtype, like.device)
    )


class _Unknown(Exception):
    """A part that is not what it seems to be."""


def _read_layer(decoder: Any, layer: Any, positions: int, tables: dict[str | None, Rope], pack: bool) -> Layer:
    attention, mlp, config = layer.self_attn, layer.mlp, decoder.config
    gemma = hasattr(layer, "pre_feedforward_layernorm")
    known = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    known |= {"pre_feedforward_layernorm", "post_feedforward_layernorm"} if gemma else set()
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if {name for name, _ in layer.named_children()} != known or activation not in ACTIVATIONS:
        raise _Unknown
    if {name for name, _ in mlp.named_children()} - {"act_fn"} != {"gate_proj", "up_proj", "down_proj"}:
        raise _Unknown
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise _Unknown
    for linears in ([attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]):
        if len({each.bias is None for each in linears}) > 1:
            raise _Unknown
    sizes = attention.q_proj.out_features, attention.k_proj.out_features
    head_dim = attention.head_dim
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kind = getattr(attention, "layer_type", None)
    if kind is None and getattr(config, "layer_types", None):
        kind = config.layer_types[attention.layer_idx]
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    head_norms = [None if each is None else _read_norm(each) for each in norms]
    shapes = {None if each is None else (each.eps, tuple(each.weight.shape)) for each in head_norms}
    if len(shapes) > 1 or (head_norms[0] is not None and head_norms[0].weight.shape != (head_dim,)):
        raise _Unknown
    return Layer(
        input_norm=_read_norm(layer.input_layernorm),
        attention=Attention(
            qkv=Projection([attention.q_proj, attention.k_proj, attention.v_proj], pack),
            out=Projection([attention.o_proj], pack),
            heads=sizes[0] // head_dim,
            kv_heads=sizes[1] // head_dim,
            head_dim=head_dim,
            scaling=float(attention.scaling),
            rope=_rope_of(decoder, kind, positions, head_dim, tables),
            window=window if kind in (None, "sliding_attention") else None,
            query_norm=head_norms[0],
            key_norm=head_norms[1],
        ),
        attention_norm=_read_norm(layer.post_attention_layernorm) if gemma else None,
        mlp_norm=_read_norm(layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm),
        gate_up=Projection([mlp.gate_proj, mlp.up_proj], pack),
        down=Projection([mlp.down_proj], pack),
        activation=activation,
        output_norm=_read_norm(layer.post_feedforward_layernorm) if gemma else None,
    )


def _read_norm(module: Any) -> Norm:
    """Weight and epsilon of a norm, whether its class multiplies by the weight or by one more than it."""
    eps = getattr(module, "variance_epsilon", None) or module.eps
    weight = module.weight.detach()
    probe = torch.linspace(-1.0, 3.0, weight.numel(), device=weight.device, dtype=torch.float32)[None]
    found = module(probe)
    for candidate in (weight, 1.0 + weight.float()):
        expected = functional.rms_norm(probe, weight.shape, candidate.float(), eps)
        if torch.allclose(expected, found.float(), rtol=1e-4, atol=1e-4):
            return Norm(candidate, float(eps))
    raise _Unknown


def _rope_of(decoder: Any, kind: str | None, positions: int, head_dim: int, tables: dict[str | None, Rope]) -> Rope:
    """The table of a layer type, made once per decoder."""
    embedding, weight = decoder.rotary_emb, decoder.norm.weight
    types = embedding.rope_type
    if not set(types.values() if isinstance(types, dict) else [types]) <= STEADY_ROPE:
        raise _Unknown
    key = kind if isinstance(types, dict) else None
    if key not in tables:
        like = weight.new_zeros(1)
        tables[key] = Rope(lambda at: embedding(like, at, *([] if key is None else [key])), positions, weight.device)
    if tables[key].cos.shape[1] != head_dim or tables[key].cos.dtype != weight.dtype:
        raise _Unknown
    return tables[key]
