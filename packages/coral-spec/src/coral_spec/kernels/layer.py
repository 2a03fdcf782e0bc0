"""One decoder layer in five launches (seven with Gemma's norms behind the blocks)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from coral_spec.kernels.attention import attend
from coral_spec.kernels.linear import linear, norm

if TYPE_CHECKING:
    from coral_spec.cache import SlotStore
    from coral_spec.layers import Layer, Nodes, Norm, Projection


def run_layer(layer: Layer, states: Tensor, nodes: Nodes, store: SlotStore, cast: bool = False) -> Tensor:
    """What `coral_spec.layers.Layer` computes for ``states (1, nodes, width)``."""
    rows, attention = states[0], layer.attention
    store.allocate(attention.kv_heads, attention.head_dim, states)
    assert store.keys is not None and store.values is not None
    head_norms = [None if each is None else each.weight for each in (attention.query_norm, attention.key_norm)]
    attended = attend(
        _project(attention.qkv, rows, before=layer.input_norm, cast=cast),
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
    rows = _add(attention.out, attended, rows, layer.attention_norm, cast)
    gated = _project(layer.gate_up, rows, before=layer.mlp_norm, activation=layer.activation, cast=cast)
    return _add(layer.down, gated, rows, layer.output_norm, cast)[None]


def _project(
    projection: Projection,
    rows: Tensor,
    *,
    before: Norm | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    cast: bool = False,
) -> Tensor:
    assert projection.weight is not None
    return linear(
        rows,
        projection.weight,
        bias=projection.bias,
        norm=before.weight if before else None,
        eps=before.eps if before else 0.0,
        residual=residual,
        activation=activation,
        cast=cast,
    )


def _add(projection: Projection, rows: Tensor, residual: Tensor, behind: Norm | None, cast: bool) -> Tensor:
    if behind is None:
        return _project(projection, rows, residual=residual, cast=cast)
    return norm(_project(projection, rows, cast=cast), behind.weight, behind.eps, residual)
