"""Prompts to be answered: read from JSON lines, or written by the target itself.

An instruct model that has read nothing but the head of a user's turn goes on with what a user would say
(Magpie, Xu et al., 2024); what it writes up to its end-of-turn token is a prompt.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coral_spec.training.generation import Sampling, answer_batch
from expkit.errors import UsageError

if TYPE_CHECKING:
    from coral_spec.targets import Target

Prompt = str | list[dict[str, str]]
_MARK = "PLACE_OF_THE_USER"
SELF_PROMPT_TOKENS = (8, 512)  # shortest and longest prompt kept, in tokens
_TRIES = 4  # rounds of sampling before fewer prompts than asked for are accepted


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Rows `{"prompt": text}` or `{"messages": [...]}` of a `.jsonl` or `.jsonl.gz` file, in order.

    A conversation that ends with an answer loses that answer: the target writes its own.

    Raises:
        UsageError: missing file, a line that is no such row (named by its number), or no row at all.
    """
    prompts: list[Prompt] = []
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if limit is not None and len(prompts) >= limit:
                    break
                if line.strip():
                    prompts.append(_parse(line, path, number))
    except FileNotFoundError:
        raise UsageError(f"prompt file {path} does not exist") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UsageError(f"prompt file {path} cannot be read: {error}") from None
    if not prompts:
        raise UsageError(f"prompt file {path} holds no prompts")
    return prompts


def _parse(line: str, path: Path, number: int) -> Prompt:
    wanted = 'expected {"prompt": text} or {"messages": [...]}'
    try:
        row = json.loads(line)
    except ValueError:
        raise UsageError(f"{path} line {number} is no JSON: {line[:60]!r}; {wanted}") from None
    if isinstance(row, dict) and isinstance(row.get("prompt"), str) and row["prompt"]:
        return str(row["prompt"])
    messages = row.get("messages") if isinstance(row, dict) else None
    if isinstance(messages, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if messages:
            return messages
    raise UsageError(f"{path} line {number} is no prompt: {line[:60]!r}; {wanted}")


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts as token ids, the shortest first, which is the order they are answered in.

    Attributes:
        ids: token ids of every prompt kept.
        index: the row of the prompt file that each comes from.
        too_long: how many prompts were left out because of their length.
    """

    ids: list[list[int]]
    index: list[int]
    too_long: int

    def digest(self) -> str:
        """SHA-256 over all ids: equal digests mean equal prompts in equal order."""
        found = hashlib.sha256()
        for ids in self.ids:
            found.update(json.dumps(ids).encode())
        return found.hexdigest()


def encode_prompts(target: Target, prompts: Sequence[Prompt], max_tokens: int, copies: int = 1) -> EncodedPrompts:
    """Encode with the target's chat template (base models: plain text), sort by length, repeat each `copies` times.

    Raises:
        UsageError: every prompt is longer than `max_tokens`.
    """
    rows = [(target.encode(prompt), index) for index, prompt in enumerate(prompts)]
    kept = sorted((row for row in rows if len(row[0]) <= max_tokens), key=lambda row: (len(row[0]), row[1]))
    if not kept:
        shortest = min(len(ids) for ids, _ in rows)
        raise UsageError(f"no prompt has {max_tokens} tokens or fewer; the shortest has {shortest}")
    repeated = [row for row in kept for _ in range(copies)]
    return EncodedPrompts([ids for ids, _ in repeated], [index for _, index in repeated], len(rows) - len(kept))


def write_own_prompts(
    target: Target, count: int, *, batch: int, seed: int, temperature: float = 1.0, top_p: float = 0.95
) -> list[str]:
    """Prompts that an instruct model writes itself, each different, none cut off; at most `count`.

    Raises:
        UsageError: the model has no chat template.
    """
    prefix = user_prefix(target)
    longest = min(SELF_PROMPT_TOKENS[1], target.context_length - len(prefix) - 1)
    sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=longest)
    found: dict[str, None] = {}
    for attempt in range(_TRIES * -(-count // batch)):
        answers = answer_batch(target, [prefix] * batch, sampling, seed=seed + attempt)
        for answer in answers:
            if answer.ended and len(answer.tokens) > SELF_PROMPT_TOKENS[0]:
                found.setdefault(str(target.tokenizer.decode(answer.tokens, skip_special_tokens=True)).strip())
        if len(found) >= count:
            break
    return [text for text in found if text][:count]


def user_prefix(target: Target) -> list[int]:
    """Token ids of an empty conversation up to where the user's text begins.

    Raises:
        UsageError: the model has no chat template.
    """
    if not target.has_chat_template:
        raise UsageError(f"{target.name} has no chat template, so it cannot write prompts itself; give --prompts FILE")
    message = [{"role": "user", "content": _MARK}]
    text = target.tokenizer.apply_chat_template(message, tokenize=False)
    assert isinstance(text, str)
    encoded = target.tokenizer(text.split(_MARK)[0], add_special_tokens=False)
    return [int(token) for token in encoded["input_ids"]]
