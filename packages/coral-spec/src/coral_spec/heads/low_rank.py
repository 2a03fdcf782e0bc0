"""A head of low rank: two thin matrices in place of one wide one, all tokens. After SlimSpec.

Its factors are trained (`coral-spec train`, stage low-rank), or the best ones in the least-squares sense of the head's
rows: the leading eigenvectors of its Gram matrix, no decomposition of the head itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from coral_spec.backbone import Backbone
from coral_spec.heads.interface import ProposalHead, top_log_probs
from coral_spec.packing import packed
from expkit.checkpoint import load_tensors, read_metadata, require_finite, save_tensors
from expkit.errors import UsageError

if TYPE_CHECKING:
    from coral_spec.targets import Target

FILE = "low_rank.safetensors"
CHUNK = 8192  # head rows in fp32 at once


class LowRankFactors(nn.Module):
    """``logits = up(down(features))``.

    Attributes:
        down: ``(rank, hidden)``.
        up: ``(vocab, rank)``.
    """

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        rank = len(down)
        self.down = nn.Linear(down.shape[1], rank, bias=False, device="meta")
        self.up = nn.Linear(rank, len(up), bias=False, device="meta")
        self.down.weight, self.up.weight = nn.Parameter(down), nn.Parameter(up)

    @property
    def rank(self) -> int:
        """Width between the two."""
        return self.down.out_features

    def forward(self, features: Tensor) -> Tensor:
        """``(..., hidden)`` to ``(..., vocab)``."""
        return self.up(self.down(features))  # type: ignore[no-any-return]

    @classmethod
    def of_head(cls, weight: Tensor, rank: int) -> LowRankFactors:
        """The truncated singular value decomposition of a head ``(vocab, hidden)``, in fp32 on its device.

        Raises:
            UsageError: a rank that the head does not have.
        """
        if not 1 <= rank <= weight.shape[1]:
            raise UsageError(f"low rank is {rank}, needed 1 to {weight.shape[1]}, the head's width")
        gram = weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float32)
        for part in weight.split(CHUNK):  # type: ignore[no-untyped-call]
            gram += part.float().T @ part.float()
        directions = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
        up = torch.cat([part.float() @ directions for part in weight.split(CHUNK)])  # type: ignore[no-untyped-call]
        return cls(directions.T.contiguous(), up)

    def save(self, folder: Path, tokenizer_hash: str) -> None:
        """Write :data:`FILE` (bf16) beside a drafter."""
        tensors = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in self.state_dict().items()}
        save_tensors(folder / FILE, tensors, {"tokenizer_hash": tokenizer_hash, "format": "pt"})

    @classmethod
    def load(cls, folder: Path, target: Target, sizes: tuple[int, int]) -> LowRankFactors:
        """The trained factors in ``folder``, on the target's device in its dtype.

        Args:
            sizes: rows and width of the head.

        Raises:
            UsageError: there are none, they diverged, or they are of another model.
        """
        path = folder / FILE
        tensors, about = load_tensors(path), read_metadata(path)
        down, up = tensors.get("down.weight"), tensors.get("up.weight")
        if down is None or up is None or down.dim() != 2 or up.shape != (sizes[0], len(down)):
            raise UsageError(f"{path} holds no factors of a head of {sizes[0]} rows")
        if down.shape[1] != sizes[1] or about.get("tokenizer_hash") != target.tokenizer_hash:
            raise UsageError(f"{path} was made for another model than {target.name}")
        require_finite(tensors, path)
        return cls(down.to(target.device, target.dtype), up.to(target.device, target.dtype)).requires_grad_(False)


class LowRankHead(ProposalHead):
    """All tokens through a bottleneck."""

    kind = "low-rank"

    def __init__(self, backbone: Backbone, factors: LowRankFactors) -> None:
        output = backbone.output
        self._backbone = backbone
        self._bias = getattr(output, "bias", None)
        weights = factors.down.weight.numel() + factors.up.weight.numel()
        self.rows = -(-weights // int(output.weight.shape[1]))
        factors = factors.to(output.weight.device, output.weight.dtype).requires_grad_(False)
        self._vocab_size = backbone.vocab_size
        self._down, self._up = packed(factors.down), packed(factors.up)

    @property
    def choices(self) -> int:
        """All tokens."""
        return self._vocab_size

    def top(self, features: Tensor, count: int, scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :class:`ProposalHead`."""
        logits = self._up(self._down(features))
        logits = logits if self._bias is None else logits + self._bias
        return top_log_probs(self._backbone.finish_logits(logits), count)
