"""The ways of decoding that are measured, behind one call.

`hf` and `prompt-lookup` are transformers' own `generate` on the same weights with its own dynamic cache, and
`hf-compiled` is `hf` with its static cache, which it compiles on a GPU. All others are our engine: `ar` without
drafting, `ngram`, `coral` (the bundled drafter), `auto`, and `NAME=FOLDER` for any drafter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from expkit.device import synchronize
from expkit.errors import UsageError

if TYPE_CHECKING:
    from coral_spec.model import Model
    from coral_spec.targets import Target
    from coral_spec.tree import TreeShape

BASELINES = ("ar", "hf-compiled", "hf")
# name -> what `coral_spec.load` calls the draft
ENGINE_DRAFTS = {"ar": "none", "ngram": "ngram", "auto": "auto"}
# name -> tokens looked up, and whether the cache is static
TRANSFORMERS = {"hf": (0, False), "hf-compiled": (0, True), "prompt-lookup": (10, False)}
METHODS = ("hf", "hf-compiled", "ar", "prompt-lookup", "ngram", "coral", "auto")


@dataclass(frozen=True)
class Request:
    """How every method is asked.

    Attributes:
        max_new_tokens: most tokens of an answer.
        temperature: 0 is greedy.
        seed: of the draws.
        ignore_eos: go on after the end of the text.
        record_logits: keep the logits of every token; not for timing.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = False
    record_logits: bool = False


@dataclass(frozen=True)
class Answer:
    """What a method did with one prompt.

    Attributes:
        ids: new tokens, the one that ended the text included.
        seconds: from the call to the last token, prefill included, the device waited for.
        accept_lengths: draft tokens accepted per target forward after prefill; None where nothing is drafted by
            design (`hf`).
        depth: levels of the draft tree, 0 without one.
        tree: its shape; None without one.
        time_split: seconds by part; empty where the method does not tell.
        logits: ``(len(ids), vocab)`` in fp32, when asked for.
        telemetry: `rows_per_round` and `router_recall` (`coral_spec.statistics`), where there are such things.
    """

    ids: list[int]
    seconds: float
    accept_lengths: list[int] | None = None
    depth: int = 0
    tree: str | None = None
    time_split: dict[str, float] = field(default_factory=dict)
    logits: Tensor | None = None
    telemetry: dict[str, float] = field(default_factory=dict)


class Method(Protocol):
    """A way of decoding."""

    @property
    def name(self) -> str:
        """As the user calls it."""
        ...

    def answer(self, prompt: list[int], request: Request) -> Answer:
        """Answer a prompt of token ids."""
        ...


def parse_methods(text: str) -> dict[str, str]:
    """Methods by name from `hf,ar,mine=FOLDER`; the value is the folder, or empty.

    Raises:
        UsageError: unknown method, a folder that does not exist, a name given twice, or nothing at all.
    """
    methods: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, folder = (piece.strip() for piece in part.partition("="))
        if not equals and name not in METHODS:
            raise UsageError(f"unknown method {name!r}, expected one of {', '.join(METHODS)}, or NAME=FOLDER")
        if equals and (name in METHODS or not name):
            raise UsageError(f"method {part!r}: a drafter folder needs a name of its own, not one of the built-in ones")
        if equals and not Path(folder).is_dir():
            raise UsageError(f"method {part!r}: no such drafter folder: {folder or '(empty)'}")
        if name in methods:
            raise UsageError(f"method {name!r} is given twice")
        methods[name] = folder
    if not methods:
        raise UsageError(f"no method given, expected some of {', '.join(METHODS)}, or NAME=FOLDER")
    return methods


def make_method(
    name: str, folder: str, model: Model, *, tree: TreeShape | None = None, head: str | int = "auto"
) -> Method:
    """A method on the target of `model`, whose weights it shares.

    Args:
        name, folder: as from `parse_methods`.
        model: any model of the target.
        tree: shape of the draft tree, by default the engine's own choice for the device.
        head: rows of the head that trained drafters propose from, as `coral_spec.load` takes it.

    Raises:
        UsageError: `coral` where no drafter is bundled for the target, or a folder with another model's drafter.
    """
    if name in TRANSFORMERS:
        lookup, static = TRANSFORMERS[name]
        if static and model.target.device.type != "cuda":
            raise UsageError(f"method {name!r} needs a GPU: transformers compiles nothing on {model.target.device}")
        return TransformersMethod(name, model.target, lookup=lookup, static=static)
    draft = folder or ENGINE_DRAFTS.get(name) or _bundled(model.target)
    if draft in ("none", "ngram"):  # a tree for a drafter is no tree for n-grams
        return EngineMethod(name, model.with_draft(draft))
    return EngineMethod(name, model.with_draft(draft, tree=tree, head=head))


def _bundled(target: Target) -> str:
    from coral_spec.bundled import bundled_drafter

    folder = bundled_drafter(target)
    if folder is None:
        raise UsageError(
            f"method 'coral': there is no drafter for {target.name}; give ngram, auto or NAME=FOLDER, or see "
            "`coral-spec models` for one to fetch"
        )
    return str(folder)


@dataclass(frozen=True)
class EngineMethod:
    """Our engine with some draft."""

    name: str
    model: Model

    def answer(self, prompt: list[int], request: Request, on_text: Callable[[str], None] | None = None) -> Answer:
        """See `Method`; `on_text` is given every piece of the text as soon as it is certain."""
        synchronize(self.model.target.device)
        start = time.perf_counter()
        done = self.model.generate(
            prompt,
            on_text=on_text,
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed,
            ignore_eos=request.ignore_eos,
            record_logits=request.record_logits,
        )
        synchronize(self.model.target.device)
        seconds = time.perf_counter() - start
        statistics = done.statistics
        return Answer(
            ids=list(done.token_ids),
            seconds=seconds,
            accept_lengths=list(statistics.accept_lengths),
            depth=statistics.depth,
            tree=statistics.tree,
            time_split=dict(statistics.time_split),
            logits=done.logits,
            telemetry=statistics.telemetry,
        )


@dataclass(frozen=True)
class TransformersMethod:
    """transformers' own `generate`: plain, with prompt look-up, or compiled for its static cache; neutral settings."""

    name: str
    target: Target
    lookup: int = 0
    static: bool = False

    def answer(self, prompt: list[int], request: Request) -> Answer:
        """See `Method`. A random draw depends on the seed alone, but is not the engine's draw."""
        model, device = self.target.model, self.target.device
        text = torch.tensor([prompt], device=device)
        rounds = _RoundCounter()
        settings = self._settings(request, self.target.context_length - len(prompt))
        more: dict[str, Any] = {"streamer": rounds} if self.lookup else {}
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _neutral(model):
            torch.manual_seed(request.seed)
            synchronize(device)
            start = time.perf_counter()
            out: Any = model.generate(  # type: ignore[operator]
                text, attention_mask=torch.ones_like(text), generation_config=settings, **more
            )
            synchronize(device)
            seconds = time.perf_counter() - start
        ids = out.sequences[0, len(prompt) :].tolist()
        logits = torch.cat(list(out.logits)).float()[: len(ids)] if request.record_logits else None
        accepted = [size - 1 for size in rounds.sizes[1:]] if self.lookup else None
        return Answer(ids, seconds, accept_lengths=accepted, depth=self.lookup, logits=logits)

    def _settings(self, request: Request, room: int) -> Any:
        from transformers import GenerationConfig

        ends = list(self.target.eos_token_ids)
        if request.ignore_eos or not ends:
            # None would be filled in from the model's own settings; an id outside the vocabulary never comes
            ends = [2**31 - 1]
        sampled = {"do_sample": True, "temperature": request.temperature, "top_k": 0, "top_p": 1.0}
        return GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=min(request.max_new_tokens, room),  # the engine ends with the context too
            eos_token_id=ends,
            pad_token_id=ends[0],
            return_dict_in_generate=True,
            output_logits=request.record_logits,
            prompt_lookup_num_tokens=self.lookup or None,
            cache_implementation="static" if self.static else None,
            **(sampled if request.temperature > 0 else {"do_sample": False}),
        )


@contextmanager
def _neutral(model: Any) -> Iterator[None]:
    """Put the model's own sampling settings aside: transformers would fill ours up from them."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own


class _RoundCounter:
    """A streamer that only counts how many tokens every target forward gave (the first call is the prompt)."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._prompt_seen = False

    def put(self, tokens: Tensor) -> None:
        """Called by transformers after every round."""
        if self._prompt_seen:
            self.sizes.append(int(tokens.numel()))
        self._prompt_seen = True

    def end(self) -> None:
        """Called by transformers at the end."""
