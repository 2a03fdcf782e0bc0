from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_readmes_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert examples
    # A module of its own: dataclasses look their annotations up in the module that defines them.
    module = ModuleType("readme_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for example in examples:
        exec(compile(example, str(README), "exec"), module.__dict__)
    assert (tmp_path / "runs" / "first" / "metrics.jsonl").is_file()
