"""``coral_spec.load`` and what it returns: generate, stream, chat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch

from coral_spec.answer import Answer, Generation, Limits, Request
from coral_spec.backbone import Backbone
from coral_spec.conversation import Conversation, Prefix
from coral_spec.drafter import Drafter, DrafterConfig, load_ranking
from coral_spec.drafts import Draft, DrafterDraft, NgramDraft, NoDraft
from coral_spec.engine import Session
from coral_spec.heads import FrequencyHead, FullHead, ProposalHead
from coral_spec.layers import FusedDrafter
from coral_spec.tree import TreeShape
from expkit.errors import UsageError

if TYPE_CHECKING:
    from coral_spec.targets import Target

Messages = list[dict[str, str]]
Prompt = str | Messages | list[int]

BUNDLED = Path(__file__).parent / "drafters"

# A CPU pays for every verified token, a GPU hardly does. The CPU's drafter trees are those of RESULTS.md; CUDA's is
# EAGLE-2's; those for n-grams are not tuned.
CUDA_TREE = TreeShape(6, 10, 60)
CPU_TREES = {torch.float32: TreeShape(3, 4, 12), torch.bfloat16: TreeShape(3, 2, 5)}
NGRAM_TREES = {"cpu": TreeShape(6, 1, 6), "cuda": TreeShape(10, 3, 30)}
FREQUENT_ROWS = {"cpu": 8192, "cuda": 16384}
SMALLEST_SESSION = 1024  # tokens, on a GPU


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
        tree: shape of the draft tree; by default what measured best on the kind of device.
        head: rows of the head that the drafter proposes from: ``auto``, ``full``, ``frequency`` or a number.
        max_length: lowers the context length, in tokens.
        attention: transformers' implementation, ``sdpa`` or ``eager``.

    ``device``, ``dtype`` and ``attention`` are those of a loaded target, if one is given.

    Raises:
        UsageError: anything given does not exist, is damaged or does not fit together.
    """
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
        tree: shape of the draft tree; None without a draft.
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
        if isinstance(head, str) and head not in ("auto", "full", "frequency"):
            raise UsageError(f"head is {head!r}, needed auto, full, frequency or a number of rows")
        self.context_length = min(context, max_length or context)
        folder = bundled_drafter(self.target) if draft == "auto" else None
        self.draft_name = (str(folder) if folder else "ngram") if draft == "auto" else draft
        self.tree = None if self.draft_name == "none" else tree or default_tree(self.target, self.draft_name)
        self._make_draft = self._plan(self.draft_name, head)
        self._idle: list[Session] = []

    def _plan(self, name: str, head: str | int) -> Callable[[], Draft]:
        shape = self.tree
        if shape is None:
            return NoDraft
        if name == "ngram":
            chains = max(1, min(shape.width, shape.budget // shape.depth))
            return lambda: NgramDraft(shape.depth, chains)
        folder = Path(name)
        if not folder.is_dir():
            raise UsageError(f"draft is {name!r}, needed auto, none, ngram or the folder of a drafter")
        drafter = FusedDrafter(Drafter.load(folder, self.target))
        proposals = self._proposal_head(folder, head)
        if shape.width > proposals.rows:
            raise UsageError(f"tree width is {shape.width}, but the head has only {proposals.rows} rows")
        return lambda: DrafterDraft(self._backbone, drafter, proposals, shape)

    def _proposal_head(self, folder: Path, head: str | int) -> ProposalHead:
        ranking = load_ranking(folder)
        if head == "auto":
            head = "frequency" if ranking is not None else "full"
        if head == "full":
            return FullHead(self._backbone)
        if ranking is None:
            raise UsageError(f"head is {head!r}, but drafter {folder} has no frequency.safetensors; needed 'full'")
        rows = FREQUENT_ROWS[self.target.device.type] if head == "frequency" else int(head)
        if rows < 64:
            raise UsageError(f"head is {head!r}, needed auto, full, frequency or a number of rows from 64 on")
        return FrequencyHead(self._backbone, ranking, rows)

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
            ids = self.target.encode(prompt, chat=chat)  # type: ignore[arg-type]
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
            for idle in self._idle:
                if idle.room >= capacity:
                    self._idle.remove(idle)
                    return idle
            capacity = max(SMALLEST_SESSION, 1 << (capacity - 1).bit_length())
        return Session(self._backbone, self._make_draft(), capacity)

    def release(self, session: Session) -> None:
        """Keep ``session`` for the next answer; the largest one stays."""
        if session.graphs is not None:
            self._idle = [max([*self._idle, session], key=lambda each: each.room)]


def default_tree(target: Target, draft: str) -> TreeShape:
    """The shape used when none is asked for."""
    if draft == "ngram":
        return NGRAM_TREES[target.device.type]
    return CUDA_TREE if target.device.type == "cuda" else CPU_TREES.get(target.dtype, CPU_TREES[torch.float32])


def bundled_drafter(target: Target) -> Path | None:
    """Folder of the drafter in this package that fits ``target``'s sizes and tokenizer; None without one."""
    needed = DrafterConfig.from_target(target)
    for path in sorted(BUNDLED.glob("*/config.json")):
        config = DrafterConfig.from_json(path)
        if (config.hidden_size, config.vocab_size, config.tokenizer_hash) == (
            needed.hidden_size,
            needed.vocab_size,
            needed.tokenizer_hash,
        ):
            return path.parent
    return None
