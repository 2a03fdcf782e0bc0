"""The target: a frozen causal language model with its tokenizer and what decoding must know of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expkit.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Target:
    """A language model ready to be decoded from; its weights are frozen and it is in evaluation mode.

    Attributes:
        name: the alias, hub id or path that it was loaded by.
        model: the unmodified Hugging Face causal language model.
        tokenizer: its tokenizer.
        device: where the weights are.
        dtype: the floating type of the weights.
        context_length: the most positions (prompt and answer together) that the model was built for.
        tokenizer_hash: hexadecimal SHA-256 of the vocabulary and special ids (see `hash_tokenizer`).
        eos_token_ids: ids that end a text, ascending; empty when the model names none.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    context_length: int
    tokenizer_hash: str
    eos_token_ids: tuple[int, ...]

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts can be wrapped as a conversation; base models have no template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode(self, prompt: str | list[dict[str, str]], chat: bool = True) -> list[int]:
        """Token ids of a prompt, ready for the model.

        Args:
            prompt: a text, or messages `{"role", "content"}`.
            chat: wrap a text as one user message where the model has a chat template. Otherwise, and for base
                models, the text is encoded as it is, with the special tokens that the tokenizer itself adds.

        Raises:
            UsageError: messages for a model without chat template, malformed messages, or no token at all.
        """
        if isinstance(prompt, str) and not (chat and self.has_chat_template):
            ids = [int(token) for token in self.tokenizer(prompt)["input_ids"]]
        else:
            ids = self._encode_chat([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        if not ids:
            raise UsageError(f"the prompt {prompt!r} has no tokens; give at least one character")
        return ids

    def _encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        if not self.has_chat_template:
            raise UsageError(f"{self.name} is a base model without chat template; give the prompt as plain text")
        for message in messages:
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise UsageError(f'a message needs "role" and "content", got {message!r}')
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # the template writes the special tokens itself: adding them again would double the first one
        encoded = self.tokenizer(text, add_special_tokens=False)
        return [int(token) for token in encoded["input_ids"]]


def make_target(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Target:
    """Freeze `model` and gather what decoding needs; the model stays on its device in its type.

    Raises:
        UsageError: the configuration states no context length.
    """
    model.train(False)
    model.requires_grad_(False)
    config = model.config.get_text_config()
    context_length = getattr(config, "max_position_embeddings", None)
    if not isinstance(context_length, int) or context_length < 1:
        raise UsageError(f"{name}: max_position_embeddings is {context_length!r}, expected a positive number")
    weight: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return Target(
        name=name,
        model=model,
        tokenizer=tokenizer,
        device=weight.device,
        dtype=weight.dtype,
        context_length=context_length,
        tokenizer_hash=hash_tokenizer(tokenizer),
        eos_token_ids=find_eos_token_ids(model, tokenizer),
    )


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hexadecimal SHA-256 over the vocabulary in the order of ids and the ids of bos, eos, unknown and padding.

    Two tokenizers with the same hash give every id the same meaning, which is what a drafter depends on. Other
    special tokens are left out: which ones a tokenizer counts differs between releases of transformers.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    special = sorted({int(token) for token in named if token is not None})
    text = json.dumps([vocabulary, special], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def find_eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a text: those of the generation configuration and the tokenizer's own, ascending."""
    found: set[int] = set()
    named: list[Any] = [getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id]
    for value in named:
        if value is not None:
            found.update(int(token) for token in (value if isinstance(value, list | tuple) else [value]))
    return tuple(sorted(found))
