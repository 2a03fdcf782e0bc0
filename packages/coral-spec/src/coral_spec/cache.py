"""A static key-value cache with explicit write positions and in-place commit of an accepted path.

transformers' own static cache writes where its running length stands and keeps sliding layers short, so a tree of
candidates can neither be placed nor verified past the window. Here every layer is full length, the window lives in
the attention mask (`coral_spec.masks`), and the caller says which slots are written. Ours.
"""

from __future__ import annotations

import inspect
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from coral_spec import kernels


class SlotStore:
    """Keys and values of one layer, ``(batch, kv_heads, capacity, head_dim)`` each, allocated at the first write."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.counter: Tensor = torch.empty(0)  # of programs that are done, for the attention kernel

    def write(self, key: Tensor, value: Tensor, slots: Tensor, visible: int) -> tuple[Tensor, Tensor]:
        """Write ``(batch, kv_heads, new, head_dim)`` to ``slots (batch, new)``; return the first ``visible`` slots."""
        if self.keys is None and key.shape == value.shape:
            self.allocate(key.shape[1], key.shape[3], key)
        elif self.keys is None:
            self.keys = key.new_zeros((*key.shape[:2], self.capacity, key.shape[3]))
            self.values = value.new_zeros((*value.shape[:2], self.capacity, value.shape[3]))
        assert self.keys is not None and self.values is not None
        _scatter(self.keys, slots, key)
        _scatter(self.values, slots, value)
        return self.keys[:, :, :visible], self.values[:, :, :visible]

    def allocate(self, kv_heads: int, head_dim: int, like: Tensor) -> None:
        """Room to write to, on the device and in the dtype of ``like (batch, ...)``, if there is none yet."""
        if self.keys is None:
            shape = (like.shape[0], kv_heads, self.capacity, head_dim)
            self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
            self.counter = torch.zeros(1024, dtype=torch.int32, device=like.device)

    def move(self, source: Tensor, destination: Tensor) -> None:
        """Copy slots ``source (batch, n)`` to ``destination (batch, n)``; reads happen before writes."""
        for states in (self.keys, self.values):
            if states is not None:
                _scatter(states, destination, _gather(states, source))

    def resize(self, batch: int, capacity: int, filled: int) -> None:
        """Room for ``batch`` rows of ``capacity`` slots, keeping the first ``filled``.

        A single row is repeated; surplus rows are dropped. Without memory for it nothing has changed.
        """
        self.keys, self.values = [_grown(each, batch, capacity, filled) for each in (self.keys, self.values)]
        self.capacity = capacity

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(states.nbytes for states in (self.keys, self.values) if states is not None)


def cache_argument(module: nn.Module) -> str:
    """What ``module.forward`` calls its cache: transformers 5.24 renamed ``past_key_values`` to ``cache``."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def _grown(old: Tensor | None, batch: int, capacity: int, filled: int) -> Tensor | None:
    if old is None:
        return None
    new = old.new_zeros((batch, old.shape[1], capacity, old.shape[3]))
    new[:, :, :filled] = old[:batch, :, :filled]
    return new


def _scatter(states: Tensor, slots: Tensor, new: Tensor) -> None:
    if slots.shape[0] == 1:
        states.index_copy_(2, slots[0], new)
    else:
        states.scatter_(2, slots[:, None, :, None].expand_as(new), new)


def _gather(states: Tensor, slots: Tensor) -> Tensor:
    if slots.shape[0] == 1:
        return states.index_select(2, slots[0])
    heads, size = states.shape[1], states.shape[3]
    return states.gather(2, slots[:, None, :, None].expand(-1, heads, -1, size))


class StaticCache(Cache):
    """All layers of a target, as a transformers cache for unmodified model classes.

    Set :meth:`aim` before a forward; the model then calls :meth:`update` layer by layer.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(layers=[])
        self.capacity = capacity
        self.stores: dict[int, SlotStore] = {}
        self._joint: Tensor | None = None  # (2 * layers, kv_heads, capacity, head_dim): where `allocate` put them
        self._slots: Tensor = torch.empty(0)
        self._visible = 0
        self._addresses: Tensor | None = None

    def aim(self, slots: Tensor, visible: int) -> None:
        """Where the next forward writes, ``(batch, new)``, and how many leading slots its attention reads."""
        self._slots, self._visible = slots, visible

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by attention layers: keys and values ``(batch, kv_heads, new, head_dim)``."""
        return self.store(layer_idx).write(key_states, value_states, self._slots, self._visible)

    def store(self, layer: int) -> SlotStore:
        """Keys and values of a layer."""
        if layer not in self.stores:
            self.stores[layer] = SlotStore(self.capacity)
        return self.stores[layer]

    def allocate(self, layers: int, kv_heads: int, head_dim: int, like: Tensor) -> None:
        """Room for one row of layers of the same sizes, if there is none yet; device and dtype are those of ``like``.

        It is one tensor, so that a path is committed in two operations.
        """
        if self.stores:
            return
        self._joint = like.new_zeros(2 * layers, kv_heads, self.capacity, head_dim)
        for layer in range(layers):
            store = self.store(layer)
            store.keys, store.values = self._joint[2 * layer][None], self._joint[2 * layer + 1][None]
            store.counter = torch.zeros(1024, dtype=torch.int32, device=like.device)

    def commit(self, lengths: Tensor, path: Tensor) -> None:
        """Move slots ``lengths + path`` to those from ``lengths`` on.

        Args:
            lengths: ``(batch,)``.
            path: ``(batch, n)``, slots behind the prefix, the root's own first.
        """
        first = next(iter(self.stores.values())).keys
        if first is not None and kernels.serve(first[:, 0, :1]) and self._alike(first):
            kernels.commit(self.addresses(), first, lengths, path[0])
            return
        starts = lengths[:, None]
        source, destination = starts + path, starts + torch.arange(path.shape[1], device=path.device)
        if self._joint is not None:
            self._joint.index_copy_(2, destination[0], self._joint.index_select(2, source[0]))
            return
        for store in self.stores.values():
            store.move(source, destination)

    def _alike(self, first: Tensor) -> bool:
        buffers = [each for store in self.stores.values() for each in (store.keys, store.values)]
        return all(each is not None and (each.shape, each.dtype) == (first.shape, first.dtype) for each in buffers)

    def addresses(self) -> Tensor:
        """Where all layers' keys and values begin: int64, on their device; kernels follow them."""
        if self._addresses is None:
            buffers = [each for store in self.stores.values() for each in (store.keys, store.values)]
            begins = [each.data_ptr() for each in buffers if each is not None]
            device = next(each.device for each in buffers if each is not None)
            self._addresses = torch.tensor(begins, dtype=torch.int64).to(device)
        return self._addresses

    def resize(self, batch: int, capacity: int, filled: int) -> None:
        """See :meth:`SlotStore.resize`."""
        grown = StaticCache(capacity)
        if self._joint is not None and batch == 1:
            grown.allocate(self._joint.shape[0] // 2, self._joint.shape[1], self._joint.shape[3], self._joint)
            assert grown._joint is not None
            grown._joint[:, :, :filled] = self._joint[:, :, :filled]
        else:
            for layer, store in self.stores.items():
                grown.stores[layer] = copy(store)
                grown.stores[layer].resize(batch, capacity, filled)
        self.capacity, self._addresses = capacity, None
        self.stores, self._joint = grown.stores, grown._joint  # only now, when there was memory for all of it

    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(store.nbytes() for store in self.stores.values())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Zero: positions and masks are always passed explicitly, so no model needs to derive them from here."""
        return 0
