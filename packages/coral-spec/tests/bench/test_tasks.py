"""Where prompts come from, and what is said when they cannot be had."""

from __future__ import annotations

import gzip
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from coral_spec.bench import tasks
from coral_spec.bench.tasks import (
    Prompt,
    as_instruction,
    digest_prompts,
    find_published,
    load_task,
    parse_tasks,
    read_prompts,
)
from expkit.errors import UsageError

LINES = [{"question": f"How much is {number} and {number}?", "answer": str(2 * number)} for number in range(3)]
DIGEST = digest_prompts([Prompt(str(index), line["question"]) for index, line in enumerate(LINES)])


def write(path: Path, lines: list[dict[str, str]] = LINES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture(autouse=True)
def small_gsm8k(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A set of three questions in place of the published one, an empty cache, and no other folder."""
    published = replace(tasks.PUBLISHED["gsm8k"], digest=DIGEST, url="http://127.0.0.1:9/test.jsonl")
    monkeypatch.setitem(tasks.PUBLISHED, "gsm8k", published)
    monkeypatch.setenv("CORAL_SPEC_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("EXPKIT_DATA", raising=False)


def test_the_first_six_samples_cover_every_kind() -> None:
    assert {prompt.category for prompt in load_task("sample", limit=6)} == {"chat", "code", "arithmetic", "summary"}
    everything = load_task("sample")
    assert len(everything) == len({prompt.text for prompt in everything}) == 16


@pytest.mark.parametrize("place", ["data/gsm8k.jsonl", "data/text/gsm8k_test.jsonl.gz"])
def test_a_set_is_found_in_the_data_folder_whatever_its_packaging(place: str, tmp_path: Path) -> None:
    write(tmp_path / place)
    prompts = load_task("gsm8k", data_dir=tmp_path / "data", limit=2)
    assert [prompt.text for prompt in prompts] == [line["question"] for line in LINES[:2]]


def test_the_data_folder_goes_before_the_environment_and_that_before_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = write(tmp_path / "home/data/gsm8k.jsonl")
    assert find_published("gsm8k") == cached
    named = write(tmp_path / "env/gsm8k.jsonl")
    monkeypatch.setenv("EXPKIT_DATA", str(tmp_path / "env"))
    assert find_published("gsm8k") == named
    given = write(tmp_path / "data/gsm8k.jsonl")
    assert find_published("gsm8k", tmp_path / "data") == given


def test_other_prompts_under_the_name_of_a_published_set_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k.jsonl", LINES[:2])
    with pytest.raises(UsageError, match=r"does not hold the published prompts of gsm8k \(2 found\)"):
        load_task("gsm8k", data_dir=tmp_path)


def test_without_network_one_line_says_where_to_put_the_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot fetch http.*put a copy of that file at .*home/data/gsm8k\.jsonl"):
        load_task("gsm8k")
    assert not list(tmp_path.glob("home/data/*"))


@contextmanager
def serving(body: bytes, length: int | None = None) -> Iterator[str]:
    """The address of a server that answers every request with `body`, announcing `length` bytes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/test.jsonl"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def move(url: str) -> None:
        monkeypatch.setitem(tasks.PUBLISHED, "gsm8k", replace(tasks.PUBLISHED["gsm8k"], url=url))

    return move


def test_a_fetched_set_is_kept_in_the_cache(tmp_path: Path, at: Callable[[str], None]) -> None:
    body = "".join(json.dumps(line) + "\n" for line in LINES).encode()
    with serving(body) as url:
        at(url)
        assert len(load_task("gsm8k")) == 3
    assert (tmp_path / "home/data/gsm8k.jsonl").read_bytes() == body
    assert len(load_task("gsm8k")) == 3  # the server is gone


@pytest.mark.parametrize("cut", [False, True])
def test_a_fetched_set_that_is_wrong_or_cut_off_leaves_nothing(
    cut: bool, tmp_path: Path, at: Callable[[str], None]
) -> None:
    body = "".join(json.dumps(line) + "\n" for line in LINES[:2]).encode()
    with serving(body[:-20] if cut else body, len(body) if cut else None) as url:
        at(url)
        with pytest.raises(UsageError):
            load_task("gsm8k")
    assert not list((tmp_path / "home/data").iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompts"),
        ("{\n", ":1: not JSON lines"),
        ('{"prompt": "a"}\n[1]\n', ":2: expected a JSON object"),
        ('{"text": "a"}\n', ":1: expected a text under 'prompt' or 'question' or 'turns'"),
        ('{"prompt": "  "}\n', ":1: expected a text"),
        ('{"turns": []}\n', ":1: expected a text"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_prompts(path)


def test_a_missing_file_and_a_file_that_is_not_gzip_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_prompts(tmp_path / "nothing.jsonl")
    (tmp_path / "x.jsonl.gz").write_text("{}")
    with pytest.raises(UsageError, match="not JSON lines"):
        read_prompts(tmp_path / "x.jsonl.gz")


def test_the_first_turn_counts_and_ids_become_unique(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"turns": ["one", "two"], "id": "x"}, {"prompt": "three", "id": "x"}])  # type: ignore[list-item,dict-item]
    assert [(prompt.id, prompt.text) for prompt in read_prompts(path)] == [("1:x", "one"), ("2:x", "three")]


def test_unknown_tasks_are_refused_with_the_known_ones() -> None:
    assert parse_tasks("sample, gsm8k,sample") == ["sample", "gsm8k"]
    with pytest.raises(UsageError, match="unknown task 'gsm9k', expected one of sample, mt_bench"):
        parse_tasks("sample,gsm9k")


def test_a_chat_model_is_asked_to_complete_a_function() -> None:
    assert as_instruction("humaneval", "def f():\n") == (
        "Complete the following Python function.\n```python\ndef f():\n```"
    )
    assert as_instruction("gsm8k", "How many?") == "How many?"
