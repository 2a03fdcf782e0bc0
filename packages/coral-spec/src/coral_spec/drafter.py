"""The drafter: EAGLE-1's shape, built from the target's own sizes.

At sequence index i it reads ``fc([embedding(x_{i+1}); f_i])`` - f being the target's last hidden state after its
final norm, i.e. the head's input - and one decoder layer without an input norm predicts f_{i+1}; the target's
frozen head turns that into logits for x_{i+2}. Embeddings and head stay the target's and are never saved here.

Source: EAGLE (Li et al., 2024), as shared by EAGLE-2, HASS and CORAL. Tensor names are those of EAGLE-1 checkpoints,
and the configuration is typed as a one-layer Llama, so that serving engines can read the folder.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from expkit.checkpoint import atomic_path, load_tensors, require_finite, save_tensors
from expkit.errors import UsageError

if TYPE_CHECKING:
    from coral_spec.targets import Target

FORMAT = 1
WEIGHTS = "drafter.safetensors"
RANKED = 65_536  # tokens in the order of their counts; of rarer ones the order means nothing, and takes a megabyte


class KeyValueStore(Protocol):
    """Where a drafter layer puts new keys and values, and from where it reads all that are to be attended."""

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take ``(batch, kv_heads, new, head_dim)`` twice; return the same with ``length`` in place of ``new``."""
        ...


@dataclass(frozen=True)
class DrafterConfig:
    """Sizes of a drafter and the target it belongs to.

    Attributes:
        hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim: as in Llama.
        rope_theta: base of the rotary embedding (default type, whatever scaling the target uses).
        rms_norm_eps: epsilon of the layer's norm.
        vocab_size: rows of the target's head.
        max_position_embeddings: the target's context length in tokens.
        target: name of the target the drafter was trained for.
        tokenizer_hash: hash of the target's tokenizer; a drafter is refused for another one.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    vocab_size: int
    max_position_embeddings: int
    target: str
    tokenizer_hash: str

    @classmethod
    def from_target(cls, target: Target) -> DrafterConfig:
        """Sizes of the drafter that fits ``target``."""
        config = target.model.config.get_text_config()
        heads = config.num_attention_heads
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            num_attention_heads=heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            rope_theta=_rope_theta(config),
            rms_norm_eps=getattr(config, "rms_norm_eps", 1e-5),
            vocab_size=_head_rows(target),
            max_position_embeddings=target.context_length,
            target=target.name,
            tokenizer_hash=target.tokenizer_hash,
        )

    def require_fit(self, target: Target, folder: Path) -> None:
        """UsageError naming both values when this drafter was made for another model."""
        needed = DrafterConfig.from_target(target)
        for field, label in (
            ("hidden_size", "width"),
            ("vocab_size", "vocabulary"),
            ("tokenizer_hash", "tokenizer hash"),
        ):
            mine, theirs = getattr(self, field), getattr(needed, field)
            if mine != theirs:
                raise UsageError(
                    f"drafter {folder} is for {self.target}: its {label} is {mine}, but {target.name} has {theirs}"
                )

    def to_json(self) -> str:
        """``config.json``: a one-layer Llama, with what is ours under the key ``coral_spec``."""
        sizes = asdict(self)
        ours = {
            "format": FORMAT,
            "target": sizes.pop("target"),
            "tokenizer_hash": sizes.pop("tokenizer_hash"),
        }
        llama = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }
        return json.dumps({**llama, **sizes, "coral_spec": ours}, indent=2) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> DrafterConfig:
        """Read ``config.json``; UsageError when it is missing or no drafter's."""
        if not path.is_file():
            raise UsageError(f"{path.parent} is no drafter: it has no config.json")
        try:
            fields: dict[str, Any] = json.loads(path.read_text())
            ours = fields["coral_spec"]
            sizes = {name: fields[name] for name in cls.__dataclass_fields__ if name in fields}
            return cls(**sizes, target=ours["target"], tokenizer_hash=ours["tokenizer_hash"])
        except KeyError as error:
            raise UsageError(f"{path} is no drafter's configuration: it has no {error}") from error
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} is no drafter's configuration: {error}") from error


def load_ranking(folder: Path, vocab_size: int) -> Tensor | None:
    """All token ids ``(vocab_size,)``, most frequent in the training answers first; None when none were saved.

    Those that the file leaves out come last, in their own order.

    Raises:
        UsageError: the file holds something else than different ids of so many tokens.
    """
    path = folder / "frequency.safetensors"
    if not path.is_file():
        return None
    ranking = load_tensors(path).get("ranking")
    if ranking is None or ranking.dim() != 1 or ranking.numel() == 0:
        raise UsageError(f"{path} holds no ranking of token ids")
    if int(ranking.min()) < 0 or int(ranking.max()) >= vocab_size:
        raise UsageError(f"{path} ranks tokens that a vocabulary of {vocab_size} does not have")
    left = torch.ones(vocab_size, dtype=torch.bool)
    left[ranking.long()] = False
    if int(left.sum()) != vocab_size - ranking.numel():
        raise UsageError(f"{path} ranks a token more than once")
    return torch.cat([ranking.long(), left.nonzero().flatten()])


def _rope_theta(config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = parameters.get("full_attention")
    if isinstance(nested, dict):
        parameters = nested
    return float(parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 10_000.0)


def _head_rows(target: Target) -> int:
    model: Any = target.model
    head = model.get_output_embeddings()
    return int(head.weight.shape[0])


def rotate(states: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding (half-split form, as in Llama).

    Args:
        states: ``(batch, heads, length, head_dim)``.
        positions: ``(batch, length)``.
        theta: base of the frequencies.
    """
    half = states.shape[-1] // 2
    cos, sin = (table[:, None].to(states.dtype) for table in rotary(positions, states.shape[-1], theta))
    first, second = states[..., :half], states[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """fp32 cosines and sines ``(..., head_dim / 2)`` of the rotary angles at ``positions (...)``."""
    half = head_dim // 2
    exponents = torch.arange(half, device=positions.device, dtype=torch.float32) / half
    angles = positions[..., None].float() * theta**-exponents
    return angles.cos(), angles.sin()


class DraftAttention(nn.Module):
    """Bias-free grouped-query attention; projections only, so that callers choose how to attend."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        width, size = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * size, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * size, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * size, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * size, width, bias=False)
        self.head_dim, self.theta = size, config.rope_theta
        self.groups = config.num_attention_heads // config.num_key_value_heads

    def project(self, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values ``(batch, heads, length, head_dim)``, rotated, of ``(batch, length, hidden)``."""
        batch, length, _ = states.shape

        def split(projected: Tensor) -> Tensor:
            return projected.view(batch, length, -1, self.head_dim).transpose(1, 2)

        query = rotate(split(self.q_proj(states)), positions, self.theta)
        key = rotate(split(self.k_proj(states)), positions, self.theta)
        return query, key, split(self.v_proj(states))

    def repeat(self, states: Tensor) -> Tensor:
        """Keys or values repeated once per query head of their group."""
        return states.repeat_interleave(self.groups, dim=1) if self.groups > 1 else states

    def merge(self, attended: Tensor) -> Tensor:
        """Output projection of ``(batch, heads, length, head_dim)``."""
        return self.o_proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class DraftMLP(nn.Module):
    """Llama's gated feed-forward block."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        gated = functional.silu(self.gate_proj(states)) * self.up_proj(states)
        return self.down_proj(gated)  # type: ignore[no-any-return]


class DraftLayer(nn.Module):
    """One decoder layer without its input norm."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.self_attn = DraftAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = DraftMLP(config)

    def finish(self, states: Tensor, attended: Tensor) -> Tensor:
        """What follows attention: ``states`` went in, ``attended`` is ``(batch, heads, length, head_dim)``."""
        states = states + self.self_attn.merge(attended)
        return states + self.mlp(self.post_attention_layernorm(states))  # type: ignore[no-any-return]

    def forward(self, states: Tensor, positions: Tensor, mask: Tensor, store: KeyValueStore | None) -> Tensor:
        attention = self.self_attn
        query, key, value = attention.project(states, positions)
        if store is not None:
            key, value = store.append(key, value)
        attended = functional.scaled_dot_product_attention(
            query, attention.repeat(key), attention.repeat(value), attn_mask=mask
        )
        return self.finish(states, attended)


class Drafter(nn.Module):
    """A one-layer feature predictor for one target. New ones are initialised at random (standard deviation 0.02)."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([DraftLayer(config)])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    @property
    def layer(self) -> DraftLayer:
        """The one decoder layer."""
        layer = self.layers[0]
        assert isinstance(layer, DraftLayer)
        return layer

    def fuse(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """The layer's input ``(batch, length, hidden)``: the next token's embedding and the feature before it."""
        return self.fc(torch.cat([embeddings, features], dim=-1))  # type: ignore[no-any-return]

    def forward(
        self,
        embeddings: Tensor,
        features: Tensor,
        positions: Tensor,
        mask: Tensor,
        store: KeyValueStore | None = None,
    ) -> Tensor:
        """Predicted features.

        Args:
            embeddings: ``(batch, length, hidden)``, of the token at index i + 1.
            features: ``(batch, length, hidden)``, the target's (or an earlier prediction) at index i.
            positions: ``(batch, length)``, the index i.
            mask: additive, ``(batch, 1, length, keys)``.
            store: keeps keys and values between calls; without it only this call's entries are attended.

        Returns:
            ``(batch, length, hidden)``: the feature predicted for index i + 1.
        """
        return self.layer(self.fuse(embeddings, features), positions, mask, store)  # type: ignore[no-any-return]

    def save(self, folder: Path, *, model_card: str, ranking: Tensor | None = None) -> None:
        """Write ``config.json``, ``drafter.safetensors`` (bf16), ``README.md`` and, if given, the frequency ranking.

        Args:
            folder: made if absent.
            model_card: Markdown text.
            ranking: token ids, most frequent first; the first 65,536 are kept in ``frequency.safetensors`` as int32.
        """
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in self.state_dict().items()}
        save_tensors(folder / WEIGHTS, weights, {"format": "pt"})
        if ranking is not None:
            kept = ranking[:RANKED].to("cpu", torch.int32)
            save_tensors(folder / "frequency.safetensors", {"ranking": kept}, None)
        for name, text in (("README.md", model_card), ("config.json", self.config.to_json())):
            with atomic_path(folder / name) as path:
                path.write_text(text)

    @classmethod
    def load(cls, folder: Path, target: Target) -> Drafter:
        """A drafter on the target's device and in its dtype.

        Raises:
            UsageError: no drafter there, damaged, diverged, or made for another width, vocabulary or tokenizer.
        """
        config = DrafterConfig.from_json(folder / "config.json")
        config.require_fit(target, folder)
        drafter = cls(config)
        weights = load_tensors(folder / WEIGHTS)
        expected = {name: tensor.shape for name, tensor in drafter.state_dict().items()}
        found = {name: tensor.shape for name, tensor in weights.items()}
        if expected != found:
            wrong = sorted(set(expected.items()) ^ set(found.items()))[0][0]
            raise UsageError(
                f"{folder / 'drafter.safetensors'}: tensor {wrong} is {found.get(wrong)}, needed {expected.get(wrong)}"
            )
        require_finite(weights, folder / WEIGHTS)
        drafter.load_state_dict(weights)
        return drafter.to(target.device, target.dtype).eval().requires_grad_(False)
