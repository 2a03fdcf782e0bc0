from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from expkit.errors import UsageError
from expkit.metrics import MetricsWriter, read_metrics, truncate


def write(path: Path, *steps: int, append: bool = False) -> None:
    with MetricsWriter(path, append) as metrics:
        for step in steps:
            metrics.log(step, loss=step / 2)


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


def test_lines_can_be_read_while_the_writer_is_open(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path / "new" / "m.jsonl")
    metrics.log(1, loss=0.5, tokens=3)
    assert read_metrics(metrics.path) == [{"step": 1, "loss": 0.5, "tokens": 3}]
    metrics.close()
    metrics.close()


def test_a_writer_starts_empty_unless_it_appends(tmp_path: Path) -> None:
    write(tmp_path / "m", 1)
    write(tmp_path / "m", 2, append=True)
    assert steps(tmp_path / "m") == [1, 2]
    write(tmp_path / "m", 3)
    assert steps(tmp_path / "m") == [3]


def test_a_line_cut_off_by_a_kill_is_neither_read_nor_continued(tmp_path: Path) -> None:
    write(tmp_path / "m", 1, 2)
    with (tmp_path / "m").open("a") as file:
        file.write('{"step": 3, "lo')
    assert steps(tmp_path / "m") == [1, 2]
    write(tmp_path / "m", 3, append=True)
    assert steps(tmp_path / "m") == [1, 2, 3]


def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "m") as metrics:
        metrics.log(1, loss=math.nan, norm=math.inf)
    assert json.loads((tmp_path / "m").read_text()) == {"step": 1, "loss": None, "norm": None}
    assert math.isnan(read_metrics(tmp_path / "m")[0]["loss"])


def test_truncate_drops_later_steps(tmp_path: Path) -> None:
    write(tmp_path / "m", 1, 2, 3, 4)
    truncate(tmp_path / "m", after_step=2)
    assert steps(tmp_path / "m") == [1, 2]
    truncate(tmp_path / "absent", after_step=2)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1}', ""])
def test_a_line_that_is_no_metrics_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "m").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UsageError, match="line 2"):
        read_metrics(tmp_path / "m")


def test_a_missing_file_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_metrics(tmp_path / "m")


def test_without_tensorboard_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"expkit\[tensorboard\]"):
        MetricsWriter(tmp_path / "m", tensorboard=tmp_path / "board")
