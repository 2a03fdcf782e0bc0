"""The target answers many prompts at once: one static cache, per-row positions, sampling on the device.

Rows are padded on the left, so that every row writes its next key to the same column of the cache. Rows that have
ended are dropped once half of the batch has, and the loop ends when all have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from coral_spec.backbone import finish_logits
from coral_spec.cache import cache_argument
from coral_spec.training.layout import LayerMasks, layer_masks

if TYPE_CHECKING:
    from coral_spec.targets import Target

ALIGNMENT = 16  # fused attention with a bias wants key lengths of whole tiles
CHECK_EVERY = 16  # steps between two looks at which rows have ended: each look waits for the device
PREFILL_TOKENS = 131_072  # prompt tokens (padding included) read in one forward
SAMPLE_ELEMENTS = 2**27  # logits (rows x vocabulary) held in fp32 at once
GROUPED_ATTENTION = "coral_spec_grouped"


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: keep the smallest set of tokens whose probability reaches this; 1 keeps all.
        max_new_tokens: longest answer in tokens, its end-of-text token included.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512


@dataclass(frozen=True)
class Answer:
    """One sampled answer: `tokens` with the end-of-text token when `ended`, otherwise cut at the limit."""

    tokens: list[int]
    ended: bool


class BatchCache:
    """Keys and values of every layer in tensors of full length ``(rows, kv_heads, columns, head_dim)``.

    Only what stock model classes ask of a cache when mask and positions are given: `update`. It writes at
    `column` for the rows `rows` and returns what has been written so far (up to whole tiles).
    """

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        self.rows, self.column, self.columns = slice(0, rows), 0, columns
        self._count = rows
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; return the filled part of the chosen rows."""
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        if keys is None or values is None:
            _, heads, _, size = key_states.shape
            # zeros, not empty: masked columns are read by the kernel, and 0 * nan would be nan
            keys = key_states.new_zeros(self._count, heads, self.columns, size)
            values = value_states.new_zeros(self._count, heads, self.columns, value_states.shape[-1])
            self._keys[layer_idx], self._values[layer_idx] = keys, values
        end = self.column + key_states.shape[2]
        keys[self.rows, :, self.column : end] = key_states
        values[self.rows, :, self.column : end] = value_states
        filled = self.filled(end)
        return keys[self.rows, :, :filled], values[self.rows, :, :filled]

    def filled(self, end: int) -> int:
        """Columns handed out when `end` of them are written."""
        return min(self.columns, _round_up(end))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns written before this forward."""
        return self.column

    def keep(self, rows: Tensor) -> None:
        """Drop every row but `rows`, one layer at a time so that the peak grows by one layer only."""
        for store in (self._keys, self._values):
            for layer, tensor in enumerate(store):
                if tensor is not None:
                    store[layer] = tensor.index_select(0, rows)
        self._count = len(rows)
        self.rows = slice(0, self._count)


def answer_batch(
    target: Target,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seed: int,
    stop_ids: Sequence[int] | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Sample one answer to every prompt.

    Args:
        target: the model that answers.
        prompts: token ids, none empty; similar lengths waste least.
        seed: seeds a generator of its own on the target's device: same seed, batch and machine, same answers.
        stop_ids: tokens that end an answer; the target's end-of-text tokens by default.
        on_tokens: called now and then with the number of answer tokens made since the last call.
    """
    generator = torch.Generator(target.device).manual_seed(seed)
    stops = target.eos_token_ids if stop_ids is None else stop_ids
    with torch.inference_mode(), _grouped_attention(target), fused_kernels():
        loop = _Loop(target, prompts, sampling, generator, torch.tensor(stops, dtype=torch.long, device=target.device))
        return loop.run(on_tokens)


class _Loop:
    """State of one batch: `alive` maps the rows still in the cache to rows of the result."""

    def __init__(
        self,
        target: Target,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        generator: torch.Generator,
        stops: Tensor,
    ) -> None:
        self.target, self.sampling, self.generator, self.stops = target, sampling, generator, stops
        self.device = target.device
        self.rows, self.width = len(prompts), max(map(len, prompts))
        self.columns = _round_up(self.width + sampling.max_new_tokens)
        model: Any = target.model
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        self.cache_argument = cache_argument(self.decoder)
        self.config = target.model.config.get_text_config()
        padding = [self.width - len(prompt) for prompt in prompts]
        ids = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        self.prompt_ids = torch.tensor(ids, device=self.device)
        self.start = torch.tensor(padding, device=self.device)
        self.cache = BatchCache(self.config.num_hidden_layers, self.rows, self.columns)
        self.alive = torch.arange(self.rows, device=self.device)
        self.result = torch.zeros(self.rows, sampling.max_new_tokens, dtype=torch.long, device=self.device)
        self.lengths = torch.zeros(self.rows, dtype=torch.long, device=self.device)
        self.ended = torch.zeros(self.rows, dtype=torch.bool, device=self.device)

    def run(self, on_tokens: Callable[[int], None] | None) -> list[Answer]:
        hidden = self.prefill()
        masks = self.step_masks(self.width)
        limit, reported = self.sampling.max_new_tokens, 0
        for step in range(limit):
            tokens = self.sample(hidden)
            self.record(step, tokens)
            last = step + 1 == limit
            if last or step % CHECK_EVERY == CHECK_EVERY - 1:
                made = int(self.lengths.sum())
                if on_tokens is not None:
                    on_tokens(made - reported)
                reported = made
                kept = self.compact()
                if last or len(self.alive) == 0:
                    break
                if kept is not None:
                    tokens, masks = tokens[kept], self.step_masks(self.width + step)
            hidden = self.step(tokens, self.width + step, masks)
        tokens_list, lengths, ended = self.result.tolist(), self.lengths.tolist(), self.ended.tolist()
        return [Answer(row[:n], end) for row, n, end in zip(tokens_list, lengths, ended, strict=True)]

    def prefill(self) -> Tensor:
        """Read the prompts, some rows at a time; the last token's hidden states ``(rows, hidden)``."""
        per_forward = max(1, PREFILL_TOKENS // self.width)
        last = []
        filled = self.cache.filled(self.width)
        column = torch.arange(self.width, device=self.device)
        for first in range(0, self.rows, per_forward):
            rows = slice(first, min(first + per_forward, self.rows))
            self.cache.rows, self.cache.column = rows, 0
            start = self.start[rows]
            masks = layer_masks(self.config, self.target.dtype, start, column, filled)
            positions = (column - start[:, None]).clamp(min=0)
            last.append(self.forward(self.prompt_ids[rows], positions, masks.model_argument())[:, -1])
        self.cache.rows = slice(0, self.rows)
        return torch.cat(last)

    def step_masks(self, column: int) -> LayerMasks:
        """Masks over all columns for one query; `step` opens one column more each time."""
        query = torch.tensor([column - 1], device=self.device)
        return layer_masks(self.config, self.target.dtype, self.start, query, self.columns)

    def step(self, tokens: Tensor, column: int, masks: LayerMasks) -> Tensor:
        """Feed one token a row at `column`; hidden states ``(rows, hidden)``."""
        masks.open_column(column)
        self.cache.column = column
        positions = (column - self.start)[:, None]
        argument = masks.model_argument(self.cache.filled(column + 1))
        return self.forward(tokens[:, None], positions, argument)[:, -1]

    def forward(self, ids: Tensor, positions: Tensor, masks: Any) -> Tensor:
        output = self.decoder(
            input_ids=ids,
            position_ids=positions,
            attention_mask=masks,
            use_cache=True,
            **{self.cache_argument: self.cache},
        )
        return output.last_hidden_state  # type: ignore[no-any-return]

    def sample(self, hidden: Tensor) -> Tensor:
        """Next tokens ``(rows,)``; a bounded number of logit rows is in fp32 at a time."""
        per_chunk = max(1, SAMPLE_ELEMENTS // self.head.weight.shape[0])
        parts = torch.split(hidden, per_chunk)
        return torch.cat(
            [
                sample_tokens(finish_logits(self.config, self.head(part)), self.sampling, self.generator)
                for part in parts
            ]
        )

    def record(self, step: int, tokens: Tensor) -> None:
        going = ~self.ended[self.alive]
        self.result[self.alive, step] = tokens
        self.lengths[self.alive] += going
        self.ended[self.alive] |= torch.isin(tokens, self.stops) & going

    def compact(self) -> Tensor | None:
        """Drop rows that have ended once they are half of the batch; the indices kept, or None."""
        going = ~self.ended[self.alive]
        if 2 * int(going.sum()) > len(going):
            return None
        kept = going.nonzero().squeeze(1)
        self.alive, self.start = self.alive[kept], self.start[kept]
        self.cache.keep(kept)
        return kept


def sample_tokens(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token a row of ``(rows, vocabulary)``: dividing by exponential noise and taking the largest."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(outside, 0))
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / noise).argmax(dim=-1)


def cache_bytes_per_token(target: Target) -> int:
    """Bytes of keys and values that one token takes in the cache, all layers."""
    config = target.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * target.dtype.itemsize)


def _round_up(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA that reads every cached key once: with one query a row, the heads of a group act as its queries.

    Older transformers repeat keys and values per query head whenever a mask is given, which at thousands of rows
    is most of the traffic. Shapes as in transformers: query ``(batch, heads, length, head_dim)``.
    """
    batch, heads, length, size = query.shape
    groups = heads // key.shape[1]
    if length == 1:
        packed = query.reshape(batch, key.shape[1], groups, size)
        attended = functional.scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=scaling)
        return attended.reshape(batch, 1, heads, size), None
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    attended = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, is_causal=attention_mask is None
    )
    return attended.transpose(1, 2).contiguous(), None


@contextmanager
def _grouped_attention(target: Target) -> Iterator[None]:
    from transformers import AttentionInterface

    before = target.model.config._attn_implementation
    if before != "sdpa":  # eager was asked for, or the architecture needs it
        yield
        return
    AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)
    target.model.set_attn_implementation(GROUPED_ATTENTION)
    try:
        yield
    finally:
        target.model.set_attn_implementation(before)


@contextmanager
def fused_kernels() -> Iterator[None]:
    """Attention without cuDNN's, which builds a plan for every new length; ours change all the time."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield
