"""One record per (task, prompt, method), kept in a file beside the result so that a killed benchmark goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from expkit.checkpoint import write_text
from expkit.errors import UsageError

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Record:
    """What one method did with one prompt.

    Attributes:
        task, prompt, method: names; `prompt` is the prompt's id within its task.
        prompt_tokens: length of the prompt.
        ids: the answer.
        seconds: one value per repeat, prefill included.
        accept_lengths: draft tokens accepted per target forward after prefill; None where there is no draft at all.
        depth: levels of the draft tree.
        tree: its shape; None without one.
        time_split: seconds by part, of the repeat that took the median time.
        telemetry: see `coral_spec.bench.methods.Answer`.
        noise, distance: of the answer's logits against fp32 (`coral_spec.check.noise`), where speed was not measured
            and they could be had at once; None otherwise.
    """

    task: str
    prompt: str
    method: str
    prompt_tokens: int
    ids: list[int]
    seconds: list[float]
    accept_lengths: list[int] | None = None
    depth: int = 0
    tree: str | None = None
    time_split: dict[str, float] = field(default_factory=dict)
    telemetry: dict[str, float] = field(default_factory=dict)
    noise: float | None = None
    distance: float | None = None

    @property
    def key(self) -> Key:
        """What a record is found by."""
        return self.task, self.prompt, self.method

    @property
    def median_seconds(self) -> float:
        """Median over the repeats; the lower one of an even number, so that it is a time that was measured."""
        return sorted(self.seconds)[(len(self.seconds) - 1) // 2]

    @property
    def tau(self) -> float | None:
        """Mean tokens per target forward after prefill."""
        return 1.0 + sum(self.accept_lengths) / len(self.accept_lengths) if self.accept_lengths else None


class PartialFile:
    """JSON lines `FILE.partial.jsonl`: the settings, then a record a line. Without a path nothing is kept.

    Attributes:
        records: all records so far, those of an earlier killed run with the same settings included.

    Raises:
        UsageError: the file belongs to other settings; the message names them.
    """

    def __init__(self, json_path: Path | None, settings: Mapping[str, Any]) -> None:
        self.records: dict[Key, Record] = {}
        self.resumed = 0
        self._path = json_path.with_name(f"{json_path.stem}.partial.jsonl") if json_path else None
        self._file: TextIO | None = None
        if self._path is None:
            return
        header = json.loads(json.dumps(dict(settings)))
        if self._path.is_file():
            self._read(self._path, header)
        # written anew, so that a line that was cut off by the kill is gone
        lines = [json.dumps({"settings": header}), *(json.dumps(asdict(each)) for each in self.records.values())]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, "".join(f"{line}\n" for line in lines))
        self._file = self._path.open("a", encoding="utf-8")

    def _read(self, path: Path, header: dict[str, Any]) -> None:
        first, *rest = path.read_text(encoding="utf-8").splitlines() or [""]
        try:
            before = json.loads(first)["settings"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is damaged; remove it to start again") from error
        differing = sorted(key for key in {*before, *header} if before.get(key) != header.get(key))
        if differing:
            raise UsageError(
                f"{path} holds an unfinished run with other settings ({', '.join(differing)}); "
                "remove it, or choose another --json"
            )
        for line in rest:
            try:
                record = Record(**json.loads(line))
            except (json.JSONDecodeError, TypeError):
                break
            self.records[record.key] = record
        self.resumed = len(self.records)

    def add(self, record: Record) -> None:
        """Keep a record, on the disk before this returns."""
        self.records[record.key] = record
        if self._file is not None:
            self._file.write(json.dumps(asdict(record)) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Stop writing; the file stays for a later run, if it has any record: a run that was refused leaves nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
            if self._path is not None and not self.records:
                self._path.unlink(missing_ok=True)

    def remove(self) -> None:
        """The result is written: the file is no longer needed."""
        self.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
