"""The benchmark itself: every method answers every prompt, interleaved, with a record of each.

Fairness: prompts are the outer loop and methods the inner one (turned by one place with every prompt), so that a
machine that slows down slows all methods alike; every method answers once for warming up; times include prefill and
wait for the device. With several worker processes only acceptance is measured, since they slow each other down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from coral_spec.bench.methods import Answer, Method, Request, TransformersMethod, make_method
from coral_spec.bench.records import PartialFile, Record
from coral_spec.bench.tasks import Prompt, as_instruction
from coral_spec.check.noise import logit_distance, margin_noise, reference_logits, reference_model
from expkit.cli import progress
from expkit.errors import UsageError
from expkit.rundir import evidence

if TYPE_CHECKING:
    from coral_spec.model import Model

WARM_UP_TOKENS = 12


@dataclass(frozen=True)
class Settings:
    """What is measured; two runs with equal settings and prompts may be continued by one another.

    Attributes:
        model: name of the target, as `coral_spec.load` takes it.
        methods: name -> drafter folder, or empty (`coral_spec.bench.methods.parse_methods`).
        device, dtype: as `coral_spec.load` takes them.
        tree: `DEPTH,WIDTH,BUDGET` of trained drafters, or `auto` for the engine's own choice.
        head: what trained drafters propose from, as `coral_spec.load` takes it.
        max_new_tokens, temperature, seed, ignore_eos: how every method is asked.
        repeats: how often; the median time counts.
        workers: processes on one device; above 1 no speed is measured.
        limit: prompts per task, all when None.
    """

    model: str
    methods: dict[str, str]
    device: str = "auto"
    dtype: str = "auto"
    tree: str = "auto"
    head: str = "auto"
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = False
    repeats: int = 1
    workers: int = 1
    limit: int | None = None

    def __post_init__(self) -> None:
        for name, least in {"max_new_tokens": 2, "temperature": 0, "repeats": 1, "workers": 1, "limit": 1}.items():
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise UsageError(f"{name.replace('_', '-')} is {value}, needed at least {least}")

    @property
    def judged_at_once(self) -> bool:
        """Whether logits are compared with fp32 while measuring, since nothing is timed."""
        return self.workers > 1 and self.temperature == 0 and "ar" in self.methods

    @property
    def request(self) -> Request:
        """How every method is asked."""
        return Request(self.max_new_tokens, self.temperature, self.seed, self.ignore_eos)


@dataclass(frozen=True)
class Bench:
    """A target with the methods to be measured on it."""

    model: Model
    methods: list[Method]
    settings: Settings = field(repr=False)

    @classmethod
    def load(cls, settings: Settings) -> Bench:
        """Load target and drafters, weights shared.

        Raises:
            UsageError: as `coral_spec.load`.
        """
        import coral_spec

        model = coral_spec.load(settings.model, draft="none", device=settings.device, dtype=settings.dtype)
        return cls.build(settings, model)

    @classmethod
    def build(cls, settings: Settings, model: Model) -> Bench:
        """From a model that is already there."""
        from coral_spec.tree import TreeShape

        tree = None if settings.tree == "auto" else TreeShape.parse(settings.tree)
        head = int(settings.head) if settings.head.isdecimal() else settings.head
        methods = [make_method(*item, model, tree=tree, head=head) for item in settings.methods.items()]
        return cls(model, methods, settings)

    def encode(self, task: str, prompt: Prompt) -> list[int]:
        """Token ids that every method is given.

        Raises:
            UsageError: longer than the context.
        """
        text = as_instruction(task, prompt.text) if self.model.target.has_chat_template else prompt.text
        return self.model.encode(text)

    def warm_up(self, prompt: list[int]) -> None:
        """One answer of every method to the longest prompt, so that allocation and compilation are not measured.

        It is a short one, or a whole one where a method compiles for a static size.
        """
        for method in self.methods:
            compiles = isinstance(method, TransformersMethod) and method.static
            tokens = self.settings.max_new_tokens if compiles else WARM_UP_TOKENS
            method.answer(prompt, Request(tokens, self.settings.temperature, self.settings.seed, True))

    def measure(
        self, task: str, index: int, prompt: Prompt, skip: Callable[[tuple[str, str, str]], bool] = lambda key: False
    ) -> list[Record]:
        """Every method on one prompt, except those whose record is already there.

        Args:
            task: its name.
            index: number of the prompt, which turns the order of the methods.
            prompt: the question.
            skip: told (task, prompt, method); True leaves the method out.
        """
        ids = self.encode(task, prompt)
        turn = index % len(self.methods)
        order = [m for m in self.methods[turn:] + self.methods[:turn] if not skip((task, prompt.id, m.name))]
        request = replace(self.settings.request, record_logits=self.settings.judged_at_once)
        answers: dict[str, list[Answer]] = {method.name: [] for method in order}
        for _ in range(self.settings.repeats):
            for method in order:
                answers[method.name].append(method.answer(ids, request))
        records = [make_record(task, prompt.id, method.name, len(ids), answers[method.name]) for method in order]
        if not self.settings.judged_at_once:
            return records
        return [self._compare(ids, record, answers[record.method]) for record in records]

    def _compare(self, prompt: list[int], record: Record, answers: list[Answer]) -> Record:
        """Add how far the answer's logits are from fp32."""
        working = next(answer.logits for answer in answers if answer.ids == record.ids)
        assert working is not None
        exact = reference_logits(self.reference, prompt, record.ids)
        return replace(record, noise=margin_noise(working, exact), distance=logit_distance(working, exact))

    @cached_property
    def reference(self) -> nn.Module:
        """The target in fp32, made when first asked for."""
        return reference_model(self.model.target.model)


def make_record(task: str, prompt: str, method: str, prompt_tokens: int, answers: list[Answer]) -> Record:
    """The record of one or more answers of a method to a prompt: all times, the rest from the median one."""
    middle = sorted(answers, key=lambda answer: answer.seconds)[(len(answers) - 1) // 2]
    return Record(
        task=task,
        prompt=prompt,
        method=method,
        prompt_tokens=prompt_tokens,
        ids=middle.ids,
        seconds=[answer.seconds for answer in answers],
        accept_lengths=middle.accept_lengths,
        depth=middle.depth,
        tree=middle.tree,
        time_split=middle.time_split,
        telemetry=middle.telemetry,
    )


def read_questions(
    tasks: str | None, prompts: Path | None, limit: int | None, data_dir: Path | None
) -> dict[str, list[Prompt]]:
    """Prompts by task, as `--tasks`, `--prompts`, `--limit` and `--data-dir` say; our samples where they say nothing.

    Raises:
        UsageError: an unknown task, a set that cannot be had, or a damaged file.
    """
    from coral_spec.bench.tasks import TASKS, load_task, parse_tasks, read_prompts

    names = parse_tasks(tasks if tasks is not None else "" if prompts else "sample")
    questions = {name: load_task(name, limit=limit, data_dir=data_dir) for name in names}
    if prompts is not None:
        name = prompts.name.split(".")[0]
        if name in TASKS:
            raise UsageError(f"--prompts is {prompts}, but {name} is a task of its own; rename the file")
        questions[name] = read_prompts(prompts)[:limit]
    return questions


def open_partial(settings: Settings, tasks: Mapping[str, list[Prompt]], json_path: Path | None) -> PartialFile:
    """The file of records for these settings and these very prompts."""
    from coral_spec.bench.tasks import digest_prompts

    digests = {task: digest_prompts(prompts) for task, prompts in tasks.items()}
    about = {name: evidence()[name] for name in ("versions", "hardware")}  # no run is measured on two machines
    return PartialFile(json_path, {**asdict(settings), "tasks": digests, **about})


def run(bench: Bench, tasks: Mapping[str, list[Prompt]], partial: PartialFile) -> None:
    """Measure all that `partial` does not hold yet, in this process."""
    jobs = [(task, index, prompt) for task, prompts in tasks.items() for index, prompt in enumerate(prompts)]
    # a prompt that is too long is found before an hour of work
    longest = max((bench.encode(task, prompt) for task, _, prompt in jobs), key=len)
    done = partial.records.keys()
    left = [job for job in jobs if any((job[0], job[2].id, m.name) not in done for m in bench.methods)]
    with progress() as bar:
        shown = bar.add_task("prompts", total=len(jobs), completed=len(jobs) - len(left))
        if left:
            bench.warm_up(longest)
        for task, index, prompt in left:
            for record in bench.measure(task, index, prompt, skip=lambda key: key in done):
                partial.add(record)
            bar.advance(shown)
