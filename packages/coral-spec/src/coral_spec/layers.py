"""A decoder layer by layer, with fewer and larger operations than its model class: for decoding a few rows at a time.

At batch 1 the time of a small model is the launching of its operations, not its arithmetic. So the projections of one
input are multiplied together, norms are one operation, rotary tables are computed once, and on CUDA the rest of the
layer is a handful of Triton kernels (`coral_spec.kernels`) that can be captured in a graph. Model classes are not
forked: `coral_spec.recognise` reads the parameters out of an unmodified model, and `Backbone` compares the result with
the model's own forward before it is used. Ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from coral_spec import kernels, packing
from coral_spec.cache import SlotStore
from coral_spec.drafter import rotary
from coral_spec.masks import additive, visibility, within_window

if TYPE_CHECKING:
    from coral_spec.drafter import Drafter

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_pytorch_tanh": lambda states: functional.gelu(states, approximate="tanh"),
}


class Norm:
    """Root mean square norm: ``states / rms(states) * weight``, computed in fp32.

    Attributes:
        weight: ``(width,)`` fp32.
        eps: added to the mean square.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight.detach().float().contiguous(), eps
        self._eps = torch.full((1,), eps, device=weight.device)

    def __call__(self, states: Tensor) -> Tensor:
        """``(..., width)`` to the same, in the states' dtype."""
        wide = states.to(torch.float32, copy=True)
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        # torch's own rms_norm is made of more operations than these on a CPU
        scale = torch.addcmul(self._eps, size, size, value=1.0 / states.shape[-1]).rsqrt_()
        return wide.mul_(scale).mul_(self.weight).to(states.dtype)


class Projection:
    """Linear layers of one input, multiplied together: ``(..., width)`` to their outputs side by side.

    On CUDA the layers' own weights become views of the joint one, so that no weight is held twice (a loaded model is
    not to be changed afterwards). On a CPU the joint weight exists in oneDNN's layout only (`coral_spec.packing`), or
    not at all where that does not pay.

    Args:
        linears: of one input width, all with a bias or none.
        pack: whether packing pays, from `coral_spec.packing.pays`.
    """

    def __init__(self, linears: Sequence[nn.Linear], pack: bool) -> None:
        self.weight: Tensor | None = None
        self.bias = None if linears[0].bias is None else torch.cat([each.bias.detach() for each in linears])
        self._parts, self._packed = linears, None
        if pack:
            self._packed = packing.pack(torch.cat([each.weight.detach() for each in linears]))
        elif linears[0].weight.device.type == "cuda":
            self.weight = _join(linears)

    def __call__(self, states: Tensor) -> Tensor:
        """``(..., outputs)``."""
        if self._packed is not None:
            return packing.multiply(states, self._packed, self.bias)
        if self.weight is not None:
            if kernels.serve(states):
                return kernels.project(states, self.weight, self.bias)
            return functional.linear(states, self.weight, self.bias)
        parts = [functional.linear(states, each.weight, each.bias) for each in self._parts]
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def _join(linears: Sequence[nn.Linear]) -> Tensor:
    first = linears[0].weight.detach()
    ends = itertools.accumulate(each.weight.nbytes for each in linears)
    begins = [first.data_ptr() + end for end in (0, *ends)]
    # Neighbours in memory may still be two allocations.
    one = len({each.weight.untyped_storage().data_ptr() for each in linears}) == 1
    if one and all(each.weight.data_ptr() == begin for each, begin in zip(linears, begins, strict=False)):
        rows = sum(each.out_features for each in linears)  # joined before, or one alone
        return first.as_strided((rows, first.shape[1]), first.stride())
    joint = torch.cat([each.weight.detach() for each in linears])
    for each, part in zip(linears, torch.split(joint, [each.out_features for each in linears]), strict=True):
        each.weight.data = part
    return joint


class Rope:
    """Rotary tables ``(positions, head_dim)``: cosines, and sines with the sign of the half-split form.

    Rows are computed by the model's own embedding, ``make(positions)`` giving cosines and sines ``(1, n, head_dim)``.
    """

    def __init__(self, make: Callable[[Tensor], tuple[Tensor, Tensor]], positions: int, device: torch.device) -> None:
        cos, sin = make(torch.arange(positions, device=device)[None])
        half = cos.shape[-1] // 2
        self.cos = cos[0].contiguous()
        self.sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1).contiguous()

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rows for ``positions (batch, nodes)``, with a place for heads: ``(batch, nodes, 1, head_dim)`` twice."""
        return self.cos[positions][:, :, None], self.sin[positions][:, :, None]


@dataclass
class Nodes:
    """The new nodes of one forward: where they stand, what they see, and where they are written.

    Attributes:
        positions: ``(batch, nodes)``.
        ancestors: bool ``(batch, nodes, offset + nodes)``: slots behind the prefix that a node sees, its own included.
        lengths: ``(batch,)``, filled prefix.
        offset: slots behind the prefix that earlier nodes of the same tree hold.
        visible: leading cache slots that hold all that is seen, known to the host.
        dtype: of the masks.
    """

    positions: Tensor
    ancestors: Tensor
    lengths: Tensor
    offset: int
    visible: int
    dtype: torch.dtype
    _turns: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    @cached_property
    def slots(self) -> Tensor:
        """Cache slots of the nodes, ``(batch, nodes)``: from ``lengths + offset`` on."""
        own = torch.arange(self.offset, self.offset + self.positions.shape[1], device=self.lengths.device)
        return self.lengths[:, None] + own

    def turn(self, rope: Rope) -> tuple[Tensor, Tensor]:
        """See :meth:`Rope.at`; the same for all layers."""
        if id(rope) not in self._turns:
            self._turns[id(rope)] = rope.at(self.positions)
        return self._turns[id(rope)]

    def mask(self, window: int | None, groups: int) -> Tensor:
        """Additive ``(batch, 1, groups * nodes, visible)``; the same for all layers of a window."""
        key = window, groups
        if key not in self._masks:
            seen = visibility(self.ancestors, self.lengths, self.visible)
            if window is not None:
                seen = within_window(seen, self.positions, self.lengths, window)
            self._masks[key] = additive(seen, self.dtype).repeat(1, 1, groups, 1)
        return self._masks[key]


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention of one layer."""

    qkv: Projection
    out: Projection
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    rope: Rope
    window: int | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None

    def __call__(self, states: Tensor, nodes: Nodes, store: SlotStore) -> Tensor:
        """Attended heads ``(batch, nodes, heads * head_dim)`` of normed ``states (batch, nodes, width)``."""
        batch, count, _ = states.shape
        together = self.qkv(states).view(batch, count, self.heads + 2 * self.kv_heads, self.head_dim)
        turning = self.heads + self.kv_heads
        turned, value = together[:, :, :turning], together[:, :, turning:]
        if self.query_norm is not None and self.key_norm is not None:
            parts = [self.query_norm(turned[:, :, : self.heads]), self.key_norm(turned[:, :, self.heads :])]
            turned = torch.cat(parts, dim=2)
        cos, sin = nodes.turn(self.rope)
        half = self.head_dim // 2
        turned = torch.addcmul(turned * cos, turned.roll(half, dims=-1), sin)
        key = turned[:, :, self.heads :].transpose(1, 2)
        keys, values = store.write(key, value.transpose(1, 2), nodes.slots, nodes.visible)
        # The query heads of a key's group are rows of one product, so that keys are read once and never repeated.
        groups = self.heads // self.kv_heads
        query = turned[:, :, : self.heads].reshape(batch, count, self.kv_heads, groups, self.head_dim)
        query = query.permute(0, 2, 3, 1, 4).reshape(batch, self.kv_heads, groups * count, self.head_dim)
        mask = nodes.mask(self.window, groups)
        attended = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self.scaling)
        attended = attended.view(batch, self.kv_heads, groups, count, self.head_dim).permute(0, 3, 1, 2, 4)
        return attended.reshape(batch, count, self.heads * self.head_dim)


@dataclass(frozen=True)
class Layer:
    """One decoder layer; norms that an architecture does not have are None.

    Attributes:
        input_norm: before attention; a drafter has none.
        attention: see :class:`Attention`.
        attention_norm: of the attention's output, before it is added (Gemma).
        mlp_norm: before the feed-forward block.
        gate_up, down: its projections, the gate first.
        activation: name in :data:`ACTIVATIONS`.
        output_norm: of the block's output, before it is added (Gemma).
    """

    input_norm: Norm | None
    attention: Attention
    attention_norm: Norm | None
    mlp_norm: Norm
    gate_up: Projection
    down: Projection
    activation: str
    output_norm: Norm | None = None

    def __call__(self, states: Tensor, nodes: Nodes, store: SlotStore) -> Tensor:
        """``(batch, nodes, width)`` to the same; keys and values of the nodes are written to ``store``."""
        attended = self.attention(_normed(self.input_norm, states), nodes, store)
        states = states + _normed(self.attention_norm, self.attention.out(attended))
        gate, up = self.gate_up(self.mlp_norm(states)).chunk(2, dim=-1)
        return states + _normed(self.output_norm, self.down(ACTIVATIONS[self.activation](gate) * up))


def run(
    layers: Sequence[Layer], final: Norm | None, states: Tensor, nodes: Nodes, stores: Sequence[SlotStore]
) -> Tensor:
    """Layers one after another, and the norm behind them: ``(batch, nodes, width)`` to the same (no norm: None)."""
    if kernels.serve(states):
        return kernels.decode(layers, final, states, nodes, stores)
    for layer, store in zip(layers, stores, strict=True):
        states = layer(states, nodes, store)
    return _normed(final, states)


def _normed(norm: Norm | None, states: Tensor) -> Tensor:
    return states if norm is None else norm(states)


class FusedDrafter:
    """A trained drafter's projection and layer, in the form that decoding uses.

    Attributes:
        positions: rows of its rotary table.
    """

    def __init__(self, drafter: Drafter) -> None:
        pack, layer, config = packing.pays(drafter), drafter.layer, drafter.config
        self.positions = config.max_position_embeddings
        attention, mlp, weight = layer.self_attn, layer.mlp, drafter.fc.weight

        def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
            cos, sin = rotary(positions, config.head_dim, config.rope_theta)
            return torch.cat([cos, cos], dim=-1).to(weight.dtype), torch.cat([sin, sin], dim=-1).to(weight.dtype)

        self.fc = Projection([drafter.fc], pack)
        self.layer = Layer(
            input_norm=None,
            attention=Attention(
                qkv=Projection([attention.q_proj, attention.k_proj, attention.v_proj], pack),
                out=Projection([attention.o_proj], pack),
                heads=config.num_attention_heads,
                kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                scaling=config.head_dim**-0.5,
                rope=Rope(tables, self.positions, weight.device),
            ),
            attention_norm=None,
            mlp_norm=Norm(layer.post_attention_layernorm.weight, config.rms_norm_eps),
            gate_up=Projection([mlp.gate_proj, mlp.up_proj], pack),
            down=Projection([mlp.down_proj], pack),
            activation="silu",
        )

    def __call__(self, inputs: Tensor, nodes: Nodes, store: SlotStore) -> Tensor:
        """Predicted features ``(batch, n, hidden)`` from embeddings beside features ``(batch, n, 2 * hidden)``."""
        return run([self.layer], None, self.fc(inputs), nodes, [store])
