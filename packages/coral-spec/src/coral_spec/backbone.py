"""The target as the engine sees it: tree-masked forwards to hidden states, and the head on chosen rows.

A decoder whose layers are recognised (`coral_spec.recognise`), and give what the model's own forward gives, runs in
fewer and larger operations. Any other one runs as it is: a 4-D mask (or a mask per layer type), explicit positions and
our cache are all that its unmodified class is passed. Hidden states are those after the final norm, the head's input,
which is what drafters read. Ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coral_spec import kernels
from coral_spec.cache import StaticCache, cache_argument
from coral_spec.layers import Layer, Nodes, run
from coral_spec.masks import additive, chain_ancestors, visibility, within_window
from coral_spec.packing import packed
from coral_spec.recognise import recognise
from expkit.errors import UsageError

if TYPE_CHECKING:
    from coral_spec.targets import Target

# Held by the test suite; any other architecture is compared with its own plain forward when it is first loaded.
HELD = frozenset({"llama", "qwen2", "qwen3", "mistral", "gemma3_text"})
# Difference of logits that rounding may make, as a share of their spread.
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
PROBE_CUT = 9  # of the 16 tokens of a probe


class Backbone:
    """A target's decoder and head.

    Attributes:
        target: the loaded model.
        context_length: tokens that prompt and answer may have together.
        hidden_size: width of the features.
        vocab_size: rows of the head.
        table: weight ``(vocab, hidden)`` and scale of the embeddings; None where they are more than that.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.config: Any = target.model.config.get_text_config()
        model: Any = target.model
        self.decoder, self.output = model.get_decoder(), model.get_output_embeddings()
        if self.decoder is None or self.output is None:
            raise UsageError(f"{target.name} ({self.config.model_type}) has no separate decoder and head to draft for")
        self.embedding = model.get_input_embeddings()
        self.table = _table(self.embedding)
        self.hidden_size, self.vocab_size = int(self.output.weight.shape[1]), int(self.output.weight.shape[0])
        self.context_length = int(min(target.context_length, _steady_context(self.config)))
        self._cache_argument = cache_argument(self.decoder)
        self._windows = _windows(self.config)
        self.head_projection = packed(self.output)
        self.layers: list[Layer] = []
        self._recognise()
        if not self.layers:
            self.decoder = packed(self.decoder)
            if self.config.model_type not in HELD:
                self._require_own_logits()

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings as the target itself reads them (Gemma's are scaled): ``(..., hidden)``."""
        return self.embedding(tokens)  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``(..., vocab)`` of features ``(..., hidden)``, in the working dtype."""
        return self.finish_logits(kernels.multiply(self.head_projection, hidden))

    def finish_logits(self, logits: Tensor) -> Tensor:
        """See :func:`finish_logits`."""
        return finish_logits(self.config, logits)

    @property
    def leaves_logits_alone(self) -> bool:
        """Whether :meth:`finish_logits` does nothing."""
        probe = torch.full((1,), 2.0)
        return torch.equal(self.finish_logits(probe), probe)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        ancestors: Tensor,
        lengths: Tensor,
        cache: StaticCache,
        filled: int,
    ) -> Tensor:
        """Hidden states of new nodes written behind the filled prefix.

        Args:
            tokens, positions: ``(batch, nodes)``.
            ancestors: bool ``(batch, nodes, nodes)``.
            lengths: ``(batch,)``, filled prefix per row; node s is written to slot ``lengths + s``.
            cache: read and written in place.
            filled: the largest of ``lengths``, known to the host.

        Returns:
            ``(batch, nodes, hidden)``.
        """
        count = tokens.shape[1]
        keys = min(cache.capacity, -(-(filled + count) // 64) * 64)
        positions = positions.clamp(max=self.context_length - 1)
        if self.layers:
            nodes = Nodes(positions, ancestors, lengths, 0, keys, self.target.dtype)
            states = self.embed(tokens)
            if self._cache_sizes is not None and tokens.shape[0] == 1:
                cache.allocate(len(self.layers), *self._cache_sizes, states)
            stores = [cache.store(index) for index in range(len(self.layers))]
            return run(self.layers, self._final_norm, states, nodes, stores)
        cache.aim(lengths[:, None] + torch.arange(count, device=tokens.device), keys)
        visible = visibility(ancestors, lengths, keys)
        output = self.decoder(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=self.mask(visible, positions, lengths),
            use_cache=True,
            **{self._cache_argument: cache},
        )
        return output.last_hidden_state  # type: ignore[no-any-return]

    def mask(self, visible: Tensor, positions: Tensor, lengths: Tensor) -> Tensor | dict[str, Tensor]:
        """What the decoder takes as its mask, by kind of layer where these differ.

        Args:
            visible: bool ``(batch, nodes, keys)``, windows left out of account.
            positions: ``(batch, nodes)``.
            lengths: ``(batch,)``, filled prefix.
        """
        dtype = self.target.dtype

        def mask(window: int | None) -> Tensor:
            if window is None:
                return additive(visible, dtype)
            return additive(within_window(visible, positions, lengths, window), dtype)

        if isinstance(self._windows, dict):
            return {kind: mask(window) for kind, window in self._windows.items()}
        return mask(self._windows)

    def _recognise(self) -> None:
        """Take the decoder apart, where the parts give what the whole gives."""
        # Some architectures look alike and differ far into a text only (windows, scaled queries), which no short probe
        # sees: so only those that the test suite holds.
        if self.config.model_type not in HELD:
            return
        found = recognise(self.decoder, self.context_length)
        if found is None:
            return
        self.layers, self._final_norm = found
        sizes = {(layer.attention.kv_heads, layer.attention.head_dim) for layer in self.layers}
        self._cache_sizes = sizes.pop() if len(sizes) == 1 else None
        try:
            difference = of_most(self._differences())
        except Exception as error:
            if kernels.give_up(error):
                difference = of_most(self._differences())
            elif isinstance(error, RuntimeError):  # parts that do not fit together: the model runs as it is
                difference = float("inf")
            else:
                raise
        if not difference < PROBE_TOLERANCE.get(self.target.dtype, 0.1):
            self.layers = []

    def _require_own_logits(self) -> None:
        """Refuse an architecture whose cached, tree-masked forward is not its own plain forward."""
        name = f"{self.target.name} ({self.config.model_type})"
        try:
            difference = float(self._differences().square().mean().sqrt())  # nothing is known of it: all count
        except Exception as error:
            raise UsageError(f"{name} cannot verify trees: {type(error).__name__}: {_first_line(error)}") from error
        if not difference < PROBE_TOLERANCE.get(self.target.dtype, 0.1):
            raise UsageError(
                f"{name} cannot verify trees: its logits with an explicit cache and mask differ from its own "
                f"by {difference:.3g} standard deviations"
            )

    @torch.inference_mode()
    def _differences(self) -> Tensor:
        """How far our logits are from the model's own at each of a few tokens: see :func:`distances`.

        The first :data:`PROBE_CUT` of them meet an empty cache, the others what those have left there.
        """
        generator = torch.Generator().manual_seed(0)
        known = min(self.vocab_size, int(getattr(self.embedding, "num_embeddings", self.vocab_size)))
        ids = torch.randint(0, known, (1, 16), generator=generator)
        start = getattr(self.config, "bos_token_id", None)
        if isinstance(start, int) and 0 <= start < known:
            ids[0, 0] = start
        ids = ids.to(self.target.device)
        plain = self.target.model(input_ids=ids, use_cache=False).logits.float()
        cache = StaticCache(64)
        parts = [self._chain(ids[:, :PROBE_CUT], 0, cache), self._chain(ids[:, PROBE_CUT:], PROBE_CUT, cache)]
        ours = self.head(torch.cat(parts, dim=1)).float()
        return distances(plain, ours)

    def _chain(self, tokens: Tensor, start: int, cache: StaticCache) -> Tensor:
        length = tokens.shape[1]
        lengths = torch.tensor([start], device=tokens.device)
        positions = lengths[:, None] + torch.arange(length, device=tokens.device)
        ancestors = chain_ancestors(1, length, tokens.device)
        return self.forward(tokens, positions, ancestors, lengths, cache, start)


def distances(plain: Tensor, ours: Tensor) -> Tensor:
    """Root mean square difference of logits ``(1, positions, vocab)``, in standard deviations of ``plain``.

    Returns:
        ``(positions,)``.
    """
    return (plain - ours).square().mean(-1).sqrt()[0] / plain.std()


def of_most(differences: Tensor) -> float:
    """The larger of two medians, of positions before and behind :data:`PROBE_CUT`; infinite where one is no number.

    Where a text makes little sense, Gemma multiplies rounding errors at single positions.
    """
    if not bool(differences.isfinite().all()):
        return float("inf")
    parts = differences[:PROBE_CUT], differences[PROBE_CUT:]
    return float(torch.stack([part.median() for part in parts]).max())


@torch.inference_mode()
def _table(embedding: Any) -> tuple[Tensor, float] | None:
    weight = getattr(embedding, "weight", None)
    if not isinstance(embedding, nn.Embedding) or weight is None or embedding._forward_hooks:
        return None
    weight = weight.detach()
    ids = torch.arange(min(8, weight.shape[0]), device=weight.device)
    scale = float(torch.as_tensor(getattr(embedding, "embed_scale", 1.0)).to(weight.dtype))  # Gemma's
    return (weight, scale) if torch.equal(embedding(ids), weight[ids] * scale) and weight.is_contiguous() else None


def finish_logits(config: Any, logits: Tensor) -> Tensor:
    """What some architectures do after the head; elementwise, so it holds for a subset of rows too."""
    scale = getattr(config, "logit_scale", None)  # Cohere
    if scale is not None:
        logits = logits * scale
    divisor = getattr(config, "logits_scaling", None)  # Granite
    if divisor is not None:
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def _steady_context(config: Any) -> float:
    """Tokens over which the rotary frequencies are the same for every forward.

    With `longrope` transformers switches to other frequencies when a forward passes the original length, so what was
    cached before would not be what a forward of the whole text computes.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    for part in parts:
        if (part.get("rope_type") or part.get("type")) == "longrope":
            original = part.get("original_max_position_embeddings")
            return float(original or getattr(config, "original_max_position_embeddings", None) or float("inf"))
    return float("inf")


def _windows(config: Any) -> int | dict[str, int | None] | None:
    """The attention window of every layer, or one per layer type where layers differ."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return window
    windows = {kind: window if kind == "sliding_attention" else None for kind in kinds}
    if set(windows) == {"full_attention"}:
        return None
    return windows


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:160]
