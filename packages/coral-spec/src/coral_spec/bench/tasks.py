"""The prompts that a benchmark runs over: our own samples, three published sets, or a file of the user.

A published set is looked for as `<name>.jsonl[.gz]` in `--data-dir`, in `EXPKIT_DATA` (both also in a folder
`text` inside), in the user's cache, and only then fetched from its official home. It is checked by a digest over
its prompts alone, so that any packaging of the same questions will do.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from coral_spec.download import download
from expkit.errors import UsageError

CODE_INSTRUCTION = "Complete the following Python function.\n```python\n{code}\n```"


@dataclass(frozen=True)
class Prompt:
    """One question: an id that is unique within its task, the text, and what kind of question it is."""

    id: str
    text: str
    category: str = ""


@dataclass(frozen=True)
class Published:
    """A published set.

    Attributes:
        field: where a record holds its text; the first element counts when it is a list of turns.
        names: file names without `.jsonl[.gz]` under which the set is known.
        url: its official home, pinned to a commit.
        digest: SHA-256 of all prompts joined by a zero byte.
        license: of the questions.
        code: prompts are the head of a Python function, which a chat model must be asked to complete.
    """

    field: str
    names: tuple[str, ...]
    url: str
    digest: str
    license: str
    code: bool = False


_RAW = "https://raw.githubusercontent.com"
PUBLISHED = {
    "mt_bench": Published(
        field="turns",
        names=("mt_bench", "question"),
        url=f"{_RAW}/lm-sys/FastChat/587d5cfa1609a43d192cedb8441cac3c17db105d"
        "/fastchat/llm_judge/data/mt_bench/question.jsonl",
        digest="fb640e1f2e0dd543cb6df979ccc60a8ce9be5eb014daccfd275b8ecf2d6c1fb8",
        license="Apache-2.0",
    ),
    "humaneval": Published(
        field="prompt",
        names=("humaneval", "HumanEval"),
        url=f"{_RAW}/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data/HumanEval.jsonl.gz",
        digest="6a712466e64fa7d27ca572fefd68e30c7a0c05b799232c5700220fb5b96e7d62",
        license="MIT",
        code=True,
    ),
    "gsm8k": Published(
        field="question",
        names=("gsm8k", "gsm8k_test"),
        url=f"{_RAW}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c"
        "/grade_school_math/data/test.jsonl",
        digest="38cd34aab6890cfe8971c5592e75a6117fcbaad060809932c29d588833af945f",
        license="MIT",
    ),
}
TASKS = ("sample", *PUBLISHED)


def parse_tasks(text: str) -> list[str]:
    """Task names from `a,b,c`, without repeats.

    Raises:
        UsageError: a name that is no task, or none at all.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in TASKS:
            raise UsageError(f"unknown task {name!r}, expected one of {', '.join(TASKS)}, or --prompts FILE")
    return names


def load_task(name: str, *, limit: int | None = None, data_dir: Path | None = None) -> list[Prompt]:
    """The first `limit` prompts of a task in their published order (all when None), as they were published.

    Args:
        name: one of `TASKS`.
        limit: how many at most.
        data_dir: the first place to look for published sets.

    Raises:
        UsageError: unknown name, a set that cannot be had, or one whose prompts are not the published ones.
    """
    if name == "sample":
        with resources.as_file(resources.files("coral_spec.bench") / "samples.jsonl") as path:
            return read_prompts(path)[:limit]
    if name not in PUBLISHED:
        raise UsageError(f"unknown task {name!r}, expected one of {', '.join(TASKS)}")
    published = PUBLISHED[name]
    path = find_published(name, data_dir)
    prompts = read_prompts(path, field=published.field)
    if digest_prompts(prompts) != published.digest:
        raise UsageError(
            f"{path} does not hold the published prompts of {name} ({len(prompts)} found); replace it with "
            f"{published.url}, or pass your own set with --prompts"
        )
    return prompts[:limit]


def as_instruction(task: str, text: str) -> str:
    """What a chat model is asked: the head of a function becomes an instruction, any other text stays."""
    if task in PUBLISHED and PUBLISHED[task].code:
        return CODE_INSTRUCTION.format(code=text.strip("\n"))
    return text


def read_prompts(path: Path, *, field: str | None = None) -> list[Prompt]:
    """Prompts from JSON lines, gzipped or not.

    Each line is an object with "prompt", "question" or "turns" (the first turn counts), or with `field`; "id",
    "task_id" or "question_id" and "category" or "source" are taken over where they exist.

    Raises:
        UsageError: no such file, damaged lines (with their number), an empty prompt, or no prompt at all.
    """
    prompts: list[Prompt] = []
    for number, record in _read_lines(path):
        fields = (field,) if field else ("prompt", "question", "turns")
        text = next((record[name] for name in fields if name in record), None)
        if isinstance(text, list):
            text = text[0] if text else None
        if not isinstance(text, str) or not text.strip():
            raise UsageError(f"{path}:{number}: expected a text under {' or '.join(map(repr, fields))}")
        name = next((str(record[key]) for key in ("id", "task_id", "question_id") if key in record), str(number))
        category = next((str(record[key]) for key in ("category", "source") if key in record), "")
        prompts.append(Prompt(name, text, category))
    if not prompts:
        raise UsageError(f"{path} holds no prompts; expected JSON lines with 'prompt', 'question' or 'turns'")
    if len({prompt.id for prompt in prompts}) < len(prompts):
        prompts = [replace(prompt, id=f"{number}:{prompt.id}") for number, prompt in enumerate(prompts, 1)]
    return prompts


def _read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise UsageError(f"no such file: {path}; expected JSON lines with 'prompt', 'question' or 'turns'")
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise UsageError(f"{path}:{number}: expected a JSON object, got {line.strip()[:40]!r}")
                yield number, record
    except (json.JSONDecodeError, UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise UsageError(f"{path}:{number + 1 if not number else number}: not JSON lines ({error})") from error


def digest_prompts(prompts: Sequence[Prompt]) -> str:
    """Hexadecimal SHA-256 of the texts joined by a zero byte, in order."""
    return hashlib.sha256("\0".join(prompt.text for prompt in prompts).encode("utf-8")).hexdigest()


def find_published(name: str, data_dir: Path | None = None) -> Path:
    """The file of a published set: `data_dir`, `EXPKIT_DATA`, the cache, and last the network.

    Raises:
        UsageError: `data_dir` is no folder, or the set is nowhere and cannot be fetched.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise UsageError(f"--data-dir {data_dir} is no folder")
    published = PUBLISHED[name]
    cache = cache_folder()
    environment = os.environ.get("EXPKIT_DATA")
    for folder in (data_dir, Path(environment) if environment else None, cache):
        for inside in (folder, folder / "text") if folder else ():
            for stem in published.names:
                for ending in (".jsonl", ".jsonl.gz"):
                    if (inside / f"{stem}{ending}").is_file():
                        return inside / f"{stem}{ending}"
    path = cache / (f"{name}.jsonl.gz" if published.url.endswith(".gz") else f"{name}.jsonl")

    def verify(file: Path) -> None:
        found = digest_prompts(read_prompts(file, field=published.field))
        if found != published.digest:
            raise UsageError(f"{published.url} gave other prompts than expected: {found}, not {published.digest}")

    download(published.url, path, verify=verify, what=f"{name} ({published.license})")
    return path


def cache_folder() -> Path:
    """Where fetched sets are kept: `data` in `CORAL_SPEC_HOME`, else in the user's cache folder."""
    home = os.environ.get("CORAL_SPEC_HOME")
    if home:
        return Path(home).expanduser() / "data"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "coral-spec" / "data"
