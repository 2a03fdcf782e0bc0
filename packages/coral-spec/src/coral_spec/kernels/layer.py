"""Decoder layers in five launches each (seven with Gemma's norms behind the blocks)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from coral_spec.kernels.attention import attend
from coral_spec.kernels.linear import Rows, linear, normed

if TYPE_CHECKING:
    from coral_spec.cache import SlotStore
    from coral_spec.layers import Layer, Nodes, Norm, Projection


def run_layers(
    layers: Sequence[Layer],
    final: Norm | None,
    states: Tensor,
    nodes: Nodes,
    stores: Sequence[SlotStore],
    cast: bool = False,
) -> Tensor:
    """What `coral_spec.layers.run` computes for ``states (1, nodes, width)``."""
    norms = [*(layer.input_norm for layer in layers), None]
    rows = Rows(states[0].contiguous())
    if norms[0] is not None:
        rows = normed(rows.states, next_norm=norms[0].weight)
    for layer, store, after in zip(layers, stores, norms[1:], strict=True):
        rows = _run_layer(layer, rows, nodes, store, after, cast)
    out = rows.states if final is None else normed(rows.states, final.weight, final.eps).states
    return out[None]


def _run_layer(layer: Layer, rows: Rows, nodes: Nodes, store: SlotStore, after: Norm | None, cast: bool) -> Rows:
    attention = layer.attention
    store.allocate(attention.kv_heads, attention.head_dim, rows.states[None])
    assert store.keys is not None and store.values is not None
    head_norms = [None if each is None else each.weight for each in (attention.query_norm, attention.key_norm)]
    attended = attend(
        _project(attention.qkv, rows, layer.input_norm, cast=cast).states,
        attention.rope.cos,
        attention.rope.sin,
        nodes.positions[0],
        nodes.lengths,
        nodes.ancestors[0],
        store.keys,
        store.values,
        store.counter,
        offset=nodes.offset,
        scaling=attention.scaling,
        window=attention.window,
        query_norm=head_norms[0],
        key_norm=head_norms[1],
        eps=attention.query_norm.eps if attention.query_norm else 0.0,
        cast=cast,
    )
    rows = _add(attention.out, attended, rows.states, layer.attention_norm, layer.mlp_norm, cast)
    gated = _project(layer.gate_up, rows, layer.mlp_norm, activation=layer.activation, cast=cast)
    return _add(layer.down, gated.states, rows.states, layer.output_norm, after, cast)


def _project(
    projection: Projection, rows: Rows, norm: Norm | None, *, activation: str | None = None, cast: bool
) -> Rows:
    """Rows through a norm, if there is one, and a projection."""
    assert projection.weight is not None
    states = rows.states if rows.scaled is None or norm is None else rows.scaled
    squares, eps = (None, 0.0) if norm is None else (rows.squares, norm.eps)
    return linear(
        states, projection.weight, bias=projection.bias, squares=squares, eps=eps,
        activation=activation, gated=activation is not None, cast=cast,
    )  # fmt: skip


def _add(
    projection: Projection, states: Tensor, residual: Tensor, behind: Norm | None, after: Norm | None, cast: bool
) -> Rows:
    """``residual`` plus the projection (normed by ``behind``), ready for the norm ``after``."""
    assert projection.weight is not None
    next_norm = None if after is None else after.weight
    if behind is None:
        return linear(
            states, projection.weight, bias=projection.bias, residual=residual, next_norm=next_norm, cast=cast
        )
    projected = linear(states, projection.weight, bias=projection.bias, cast=cast).states
    return normed(projected, behind.weight, behind.eps, residual=residual, next_norm=next_norm)
