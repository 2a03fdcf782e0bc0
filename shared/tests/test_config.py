from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expkit.config import flatten, load_config, parse_setting, to_toml
from expkit.errors import UsageError


@dataclass(frozen=True)
class Optimizer:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True)
class Config:
    data: Path = Path("data")
    steps: int = 10
    bf16: bool = True
    mode: Literal["fast", "exact"] = "fast"
    limit: int | None = None
    names: tuple[str, ...] = ()
    optimizer: Optimizer = field(default_factory=Optimizer)


@dataclass(frozen=True)
class Needs:
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps = {self.steps} is negative")


@dataclass(frozen=True)
class Outer:
    inner: Needs


@dataclass(frozen=True)
class NotNone:
    limit: int | None = 3


def written(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(cls: type, overrides: dict[str, Any] | None = None, path: Path | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        load_config(cls, path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_give_way_to_the_file_and_the_file_to_overrides(tmp_path: Path) -> None:
    path = written(tmp_path, "steps = 20\n[optimizer]\nlr = 0.5\nbetas = [0.1, 0.2]\n")
    config = load_config(Config, path, {"optimizer.lr": 0.25})
    assert config == Config(steps=20, optimizer=Optimizer(lr=0.25, betas=(0.1, 0.2)))


def test_an_override_of_none_is_a_flag_not_given() -> None:
    assert load_config(Config, None, {"steps": None, "optimizer.lr": None}) == Config()


def test_values_arrive_in_the_fields_type(tmp_path: Path) -> None:
    path = written(tmp_path, 'data = "a/b"\nnames = ["x"]\nlimit = 4\n[optimizer]\nlr = 1\n')
    config = load_config(Config, path)
    assert config.data == Path("a/b") and config.names == ("x",) and config.limit == 4
    assert isinstance(config.optimizer.lr, float)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("step", "steps"), ("optimizer.lrr", "optimizer.lr"), ("lr", "optimizer.lr"), ("optimiser", "optimizer")],
)
def test_an_unknown_key_names_the_nearest_known_one(key: str, nearest: str) -> None:
    message = refusal(Config, {key: 1})
    assert f'unknown key "{key}"' in message and f'did you mean "{nearest}"' in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", "ten"),
        ("steps", 1.5),
        ("steps", True),
        ("bf16", 1),
        ("data", 3),
        ("mode", "slow"),
        ("limit", "none"),
        ("names", "x"),
        ("names", [1]),
        ("optimizer", 3),
        ("optimizer.lr", "high"),
        ("optimizer.betas", [0.1]),
    ],
)
def test_a_wrong_type_is_refused_with_its_key_and_value(key: str, value: Any) -> None:
    message = refusal(Config, {key: value})
    assert key in message
    if not isinstance(value, list):
        assert repr(value) in message


def test_a_missing_required_key_is_named_with_its_table() -> None:
    assert '"steps"' in refusal(Needs)
    assert '"inner.steps"' in refusal(Outer)


def test_the_dataclasss_own_check_is_wrong_use() -> None:
    assert "steps = -1 is negative" in refusal(Needs, {"steps": -1})


@pytest.mark.parametrize("key", ["step", "names", "optimizer.lrr", "optimizer.betas", "optimizr.lr"])
def test_the_file_is_blamed_for_its_own_keys_alone(key: str, tmp_path: Path) -> None:
    path = written(tmp_path, "steps = 3\n")
    assert str(path) not in refusal(Config, {key: [1]}, path)
    table, _, name = key.rpartition(".")
    path.write_text(f"[{table}]\n{name} = [1]\n" if table else f"{name} = [1]\n")
    for overrides in ({}, {"limit": 3}):
        assert str(path) in refusal(Config, overrides, path)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        (" steps = 5", "steps", 5),
        ('names=["a", "b"]', "names", ["a", "b"]),
        ("data=a/b=c", "data", "a/b=c"),
        ("bf16=true", "bf16", True),
        ("data=", "data", ""),
    ],
)
def test_a_setting_is_a_key_and_a_toml_value_or_a_string(text: str, key: str, value: Any) -> None:
    assert parse_setting(text) == (key, value)


@pytest.mark.parametrize("text", ["steps", "=3", " ", ""])
def test_a_setting_without_key_or_value_is_wrong_use(text: str) -> None:
    with pytest.raises(UsageError, match="expected KEY=VALUE"):
        parse_setting(text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none.toml") in refusal(Config, path=tmp_path / "none.toml")


@pytest.mark.parametrize("content", [b"steps = ", b"steps = 1\nsteps = 2", b"\xff\xfe"], ids=repr)
def test_a_malformed_file_is_wrong_use(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    assert str(path) in refusal(Config, path=path)


@given(
    st.text(st.characters(blacklist_categories=["Cs"])),
    st.integers(-(2**62), 2**62),
    st.floats(allow_nan=False),
    st.lists(st.text(st.characters(blacklist_categories=["Cs"]), max_size=5), max_size=3),
)
def test_to_toml_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, text: str, steps: int, lr: float, names: list[str]
) -> None:
    # A name with NUL is no path; everything else must survive, quotes and control characters too.
    data = Path(text.replace("\0", ""))
    config = Config(data=data, steps=steps, names=(*names, text), optimizer=Optimizer(lr=lr))
    path = written(tmp_path_factory.getbasetemp(), to_toml(config))
    assert load_config(Config, path) == config


def test_nan_is_written_as_toml_nan(tmp_path: Path) -> None:
    path = written(tmp_path, to_toml(Optimizer(lr=math.nan)))
    assert math.isnan(load_config(Optimizer, path).lr)


def test_a_none_that_is_not_the_default_cannot_be_written() -> None:
    with pytest.raises(UsageError, match="limit"):
        to_toml(NotNone(limit=None))


def test_flatten_joins_table_names_with_dots() -> None:
    assert flatten({"a": 1, "b": {"c": 2, "d": {"e": 3}}}) == {"a": 1, "b.c": 2, "b.d.e": 3}
