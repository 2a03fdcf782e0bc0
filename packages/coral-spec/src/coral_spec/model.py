"""``coral_spec.load`` and what it returns: generate, stream, chat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch

from coral_spec.answer import Answer, Generation, Limits, Request
from coral_spec.backbone import Backbone
from coral_spec.bundled import PACKAGED, bundled_drafter
from coral_spec.conversation import Conversation, Prefix
from coral_spec.drafter import Drafter, DrafterConfig
from coral_spec.drafts import Draft, DrafterDraft, NgramDraft, NoDraft
from coral_spec.engine import Session
from coral_spec.heads import ProposalHead
from coral_spec.heads.choose import HeadChoice, make_head
from coral_spec.layers import FusedDrafter
from coral_spec.sampling import Sampling
from coral_spec.targets.home import timings_folder
from coral_spec.tree import TreeShape
from coral_spec.tuning.acceptance import FILE as ACCEPTANCE
from coral_spec.tuning.acceptance import Acceptance
from coral_spec.tuning.choose import Tuner
from coral_spec.tuning.costs import CAPACITY, cached, costs_key, measure
from expkit.errors import UsageError

if TYPE_CHECKING:
    from coral_spec.targets import Target

Messages = list[dict[str, str]]
Prompt = str | Messages | list[int]

GENERIC = PACKAGED / "smollm2-135m" / ACCEPTANCE

# A drafter's tree is chosen by measurement (`coral_spec.tuning`). Those for n-grams are not tuned.
NGRAM_TREES = {"cpu": TreeShape(6, 1, 6), "cuda": TreeShape(10, 3, 30)}
OTHER_HEADS = ("routed", "low-rank")  # whose cost is not that of so many rows in one piece
SMALLEST_SESSION = 1024  # tokens, on a GPU
SPARE = 1 << 30  # bytes of a GPU without which only rounds that are needed are captured


def load(
    target: str | Target,
    *,
    draft: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    tree: TreeShape | None = None,
    head: str | int = "auto",
    max_length: int | None = None,
    attention: str = "sdpa",
) -> Model:
    """Load a target and a draft for it.

    Args:
        target: an alias (``coral-spec models`` lists them), a hub id, a folder, a GGUF file, or a loaded target.
        draft: ``auto`` (the bundled drafter of this target, else n-gram look-up), ``none`` (plain decoding),
            ``ngram``, or the folder of a drafter.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` ...
        dtype: ``auto`` (bf16 where the hardware has it), ``bf16``, ``fp16`` or ``fp32``.
        tree: shape of the draft tree; by default the one that is expected to be fastest on this machine, by step times
            (measured for a second or two the first time) and the drafter's acceptance, chosen anew between answers when
            acceptance departs from what was expected. It is no drafting at all where none would pay. For n-grams it is
            a fixed one, which is not measured.
        head: what the drafter proposes from: ``full``, ``frequency`` or a number of the most frequent rows, ``routed``
            or ``routed:GROUPS[,SCORES]``, ``low-rank`` or ``low-rank:RANK``; ``auto`` is the first of routed (with
            groups of 2 million weights and more), frequency and full that the drafter's folder has the files for.
        max_length: lowers the context length, in tokens.
        attention: transformers' implementation, ``sdpa`` or ``eager``.

    ``device``, ``dtype`` and ``attention`` are those of a loaded target, if one is given.

    Raises:
        UsageError: anything given does not exist, is damaged or does not fit together.
    """
    HeadChoice.parse(head)  # what can be refused at once is refused before a model is loaded
    _require_draft(draft)
    if isinstance(target, str):
        from coral_spec.targets import load_target

        target = load_target(target, device=device, dtype=dtype, attention=attention)
    return Model(Backbone(target), draft=draft, tree=tree, head=head, max_length=max_length)


class Model:
    """A target with a draft; the text is the target's own, whatever the draft.

    Attributes:
        target: the loaded language model.
        context_length: tokens that prompt and answer may have together.
        draft_name: ``none``, ``ngram`` or the drafter's folder.
        tuner: chooses the tree; None where it was asked for, or nothing or n-grams are drafted.
        head_rows: rows of the target's head that the drafter proposes from; 0 without a drafter.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        draft: str = "auto",
        tree: TreeShape | None = None,
        head: str | int = "auto",
        max_length: int | None = None,
    ) -> None:
        if max_length is not None and max_length < 2:
            raise UsageError(f"max_length is {max_length}, needed at least 2")
        self._backbone = backbone
        self.target = backbone.target
        context = backbone.context_length
        if self.target.device.type not in ("cpu", "cuda"):
            raise UsageError(f"device is {self.target.device}, needed cpu or cuda")
        choice = HeadChoice.parse(head)
        self.context_length = min(context, max_length or context)
        folder = bundled_drafter(self.target) if draft == "auto" else None
        self.draft_name = (str(folder) if folder else "ngram") if draft == "auto" else draft
        self.tuner: Tuner | None = None
        self.head_rows = 0
        self._tree = tree if self.draft_name != "none" else None
        self._make_draft: Callable[[TreeShape | None], Draft] = self._plan(self.draft_name, choice)
        self._idle: Session | None = None
        self._noted: list[tuple[TreeShape | None, list[int]]] = []

    @property
    def tree(self) -> TreeShape | None:
        """Shape of the draft tree of the next answer; None is plain decoding, asked for or chosen."""
        return self._tree if self.tuner is None else self.tuner.shape

    def _plan(self, name: str, head: HeadChoice) -> Callable[[TreeShape | None], Draft]:
        if name == "none":
            return lambda _: NoDraft()
        if name == "ngram":
            ngrams = self._tree = self._tree or NGRAM_TREES[self.target.device.type]
            return lambda _: NgramDraft(ngrams)
        _require_draft(name)
        folder = Path(name)
        loaded = Drafter.load(folder, self.target)
        drafter = FusedDrafter(loaded)
        proposals = make_head(self._backbone, folder, head, loaded)
        self.head_rows = proposals.rows
        if self._tree is not None and self._tree.width > proposals.choices:
            raise UsageError(f"tree width is {self._tree.width}, but the head has only {proposals.choices} rows")

        def make(shape: TreeShape | None) -> Draft:
            return DrafterDraft(self._backbone, drafter, proposals, shape) if shape else NoDraft()

        if self._tree is None:
            self.tuner = self._tune(folder, loaded.config, proposals, make)
        return make

    def _tune(
        self, folder: Path, drafter: DrafterConfig, head: ProposalHead, make: Callable[[TreeShape | None], Draft]
    ) -> Tuner:
        backbone = self._backbone
        costs = cached(
            {**costs_key(backbone, drafter, head.rows), **({"head": head.kind} if head.kind in OTHER_HEADS else {})},
            timings_folder(),
            lambda: measure(
                lambda shape: Session(backbone, make(shape), CAPACITY),
                most_rows=head.choices,
                cuda=self.target.device.type == "cuda",
            ),
        )
        return Tuner(costs, acceptance_profile(folder, head.rows), own=(folder / ACCEPTANCE).is_file())

    def note(self, session: Session, accept_lengths: list[int]) -> None:
        """Remember the rounds of an answer for :meth:`learn`."""
        if self.tuner is not None and accept_lengths:
            self._noted.append((session.draft.shape, accept_lengths))

    def learn(self, session: Session, sampling: Sampling, keep_logits: bool) -> None:
        """Learn from the answers so far, so that the next one may have a better tree.

        It takes a good part of a millisecond, which costs nothing while the device is busy with a round.

        Args:
            session, sampling, keep_logits: those that are in use.
        """
        if self.tuner is not None and self._noted:
            self.tuner.note(*self._noted.pop(0), session.captured(sampling, keep_logits))

    def with_draft(self, draft: str, *, tree: TreeShape | None = None, head: str | int = "auto") -> Model:
        """The same target, weights shared, with another draft."""
        return Model(self._backbone, draft=draft, tree=tree, head=head, max_length=self.context_length)

    def generate(
        self,
        prompt: Prompt,
        *,
        chat: bool = True,
        on_text: Callable[[str], None] | None = None,
        **limits: Unpack[Limits],
    ) -> Generation:
        """Answer a prompt.

        Args:
            prompt: text, messages (``[{"role": ..., "content": ...}]``) or token ids.
            chat: wrap text in the chat template, where there is one.
            on_text: called with every piece of text as soon as it is certain.
            limits: fields of :class:`coral_spec.answer.Request`: ``max_new_tokens``, ``temperature``, ``top_k``,
                ``top_p``, ``seed``, ``stop``, ``ignore_eos``, ``should_stop``, ``record_logits``.

        Raises:
            UsageError: a prompt longer than the context, or a limit out of range.
        """
        answer = self.stream(prompt, chat=chat, **limits)
        for piece in answer:
            if on_text:
                on_text(piece)
        return answer.result()

    def stream(self, prompt: Prompt, *, chat: bool = True, **limits: Unpack[Limits]) -> Answer:
        """Iterate what this returns for pieces of text; its ``result()`` is then what :meth:`generate` returns."""
        return Answer(self, self.encode(prompt, chat), Request(**limits))

    def chat(self, system: str | None = None) -> Conversation:
        """A conversation that keeps its cache between turns."""
        return Conversation(self, system)

    def prefix(self, prompt: Prompt, *, chat: bool = True, capacity: int = 64) -> Prefix:
        """A prompt that is run once, to draw many short continuations from."""
        return Prefix(self, self.encode(prompt, chat), capacity)

    def encode(self, prompt: Prompt, chat: bool = True) -> list[int]:
        """Token ids of a prompt; UsageError when it is empty or longer than the context."""
        if isinstance(prompt, list) and all(isinstance(item, int) for item in prompt):
            ids = [int(item) for item in prompt if isinstance(item, int)]
            wrong = [token for token in ids if not 0 <= token < self._backbone.vocab_size]
            if wrong:
                raise UsageError(f"token id {wrong[0]} is outside the vocabulary of {self._backbone.vocab_size}")
        else:
            ids = self.target.encode(prompt, chat=chat) if prompt else []  # type: ignore[arg-type]
        if not ids:
            raise UsageError("the prompt is empty, needed at least one token")
        if len(ids) >= self.context_length:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, but {self.target.name} holds {self.context_length} with its answer"
            )
        return ids

    def session(self, capacity: int) -> Session:
        """Caches for ``capacity`` tokens: fresh, or on a GPU an ended answer's, graphs included."""
        if self.target.device.type == "cuda":
            idle, self._idle = self._idle, None
            if idle is not None and self.adapt(idle) and idle.room >= capacity:
                return idle
            del idle  # its memory may be needed
            capacity = max(SMALLEST_SESSION, 1 << (capacity - 1).bit_length())
        return Session(self._backbone, self._make_draft(self.tree), capacity)

    def adapt(self, session: Session) -> bool:
        """Whether ``session`` drafts with the tree of the next answer, changed to it if need be."""
        return session.draft.shape == self.tree or session.redraft(self._make_draft(self.tree))

    def prepare(self, session: Session, sampling: Sampling) -> None:
        """Capture rounds of the trees that easier and harder text asks for, so that a change to one of them is free.

        Only in a session that has captured nothing, since other ways of sampling may come in any number: none that has
        recorded logits, either.

        Args:
            session: its prompt has been read.
            sampling: of the answer that begins.
        """
        graphs, now = session.graphs, session.draft.shape
        if self.tuner is None or graphs is None or not graphs.empty or not _has_memory(session.device):
            return
        try:
            for shape in [now, *self.tuner.likely]:
                if not session.redraft(self._make_draft(shape)) or not session.capture(sampling):
                    break
        finally:
            session.redraft(self._make_draft(now))

    def release(self, session: Session) -> None:
        """Keep ``session`` for the next answer; of several the largest stays."""
        if session.graphs is not None:
            self._idle = max(session, self._idle or session, key=lambda each: each.room)


def _has_memory(device: torch.device) -> bool:
    return bool(torch.cuda.mem_get_info(device)[0] >= SPARE)


def _require_draft(name: str) -> None:
    if name not in ("auto", "none", "ngram") and not Path(name).is_dir():
        raise UsageError(f"draft is {name!r}, needed auto, none, ngram or the folder of a drafter")


def acceptance_profile(folder: Path | None, rows: int) -> Acceptance:
    """What the drafter in ``folder`` accepts with so many head rows; SmolLM2's profile where it has none."""
    path = (folder or Path()) / ACCEPTANCE
    return Acceptance.load(path if folder and path.is_file() else GENERIC, rows)
