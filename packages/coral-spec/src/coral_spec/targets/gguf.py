"""GGUF files: dequantised by transformers' loader and written once as a safetensors folder in bf16.

The architecture is read from the header here, before anything heavy runs: a few bytes tell a damaged or unknown
file. Format: the GGUF specification of ggml, versions 2 and 3 (little-endian).
"""

from __future__ import annotations

import functools
import io
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from coral_spec.targets.quiet import first_line, quiet_transformers
from expkit.checkpoint import atomic_path, write_json
from expkit.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of the fixed-size value types
_LONGEST = 1 << 28  # no name or text of a header is longer; a damaged length would ask for exabytes
# Raised somewhere inside the loader by files whose content is wrong.
_DAMAGE = (ValueError, KeyError, IndexError, TypeError, OSError, OverflowError, RuntimeError, NotImplementedError)


def known_architectures() -> list[str]:
    """The GGUF architectures that the installed transformers can load, sorted."""
    from transformers import modeling_gguf_pytorch_utils as loader

    known = set(loader.GGUF_SUPPORTED_ARCHITECTURES)
    try:
        newer = import_module("transformers.integrations.gguf")  # a second table, in newer releases only
        known.update(newer.GGUF_CONFIG_ARCHS)
    except (ImportError, AttributeError):
        pass
    return sorted(name.replace("_", "-") if name == "gpt_oss" else name for name in known)


def read_header(path: Path, wanted: tuple[str, ...] = ("general.architecture",)) -> dict[str, str]:
    """The text values `wanted` of a GGUF file's header; those it lacks are left out.

    Raises:
        UsageError: no such file, or not a whole GGUF header.
    """
    try:
        with path.open("rb") as file:
            return _read_header(file, wanted)
    except (OSError, UnicodeDecodeError, struct.error, ValueError) as error:
        raise UsageError(f"{path} is not a readable GGUF file ({first_line(error)})") from None


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the model in `path` as a folder that `AutoModelForCausalLM` loads: bf16 weights, configuration,
    generation configuration, tokenizer. The folder appears whole or not at all.

    Raises:
        UsageError: a damaged file, an architecture that the loader does not know, or one that generates no text.
    """
    header = read_header(path, ("general.architecture", "tokenizer.ggml.pre"))
    architecture = header.get("general.architecture", "")
    known = known_architectures()
    if architecture not in known:
        raise UsageError(f'{path}: GGUF architecture "{architecture}" is not known; known are {", ".join(known)}')
    with quiet_transformers(), tempfile.TemporaryDirectory() as empty:
        try:
            with redirect_stderr(io.StringIO()), _parsing_once():  # the loader's own bar obeys no setting
                model, missing, tokenizer = _load(_alone(path, Path(empty)))
        except ImportError as error:
            raise UsageError(f"GGUF files need the packages gguf and accelerate ({first_line(error)})") from None
        except _DAMAGE as error:
            raise UsageError(f"{path} is damaged or cannot be loaded ({first_line(error)})") from None
        if missing:
            raise UsageError(f"{path} is damaged: {len(missing)} tensors are missing, such as {sorted(missing)[0]}")
        _restore_splitting(tokenizer, header.get("tokenizer.ggml.pre", ""))
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            write_json(temporary / "source.json", {"file": path.name, "architecture": architecture})


def _alone(path: Path, empty: Path) -> Path:
    """A link to `path` in an empty folder: the loader would mix in the configuration files that lie beside it."""
    link = empty / path.name
    try:
        os.symlink(path.resolve(), link)
    except OSError:  # Windows allows links to some users only
        return path
    return link


@contextmanager
def _parsing_once() -> Iterator[None]:
    """Let the loader parse the file once inside the block. It asks for a new reader for each of configuration,
    weights and tokenizer and for the table of names at every sub-module, which takes longer than all the rest."""
    import gguf

    module: Any = gguf
    reader, table = module.GGUFReader, module.get_tensor_name_map
    module.GGUFReader, module.get_tensor_name_map = functools.cache(reader), functools.cache(table)
    try:
        yield
    finally:
        module.GGUFReader, module.get_tensor_name_map = reader, table


def _load(path: Path) -> tuple[Any, set[str], PreTrainedTokenizerBase]:
    """The dense bf16 model, the names of weights that the file lacks, and the tokenizer."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    config_class = getattr(transformers, "GgufConfig", None)  # absent in 5.10, which always dequantises
    quantization = {} if config_class is None else {"quantization_config": config_class(dequantize=True)}
    auto: Any = AutoModelForCausalLM  # its annotation leaves out the pair that is returned with loading info
    model, report = auto.from_pretrained(
        path.parent, dtype=torch.bfloat16, output_loading_info=True, **quantization, **options
    )
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    return model, set(report["missing_keys"]) | set(report["mismatched_keys"]), tokenizer


def _restore_splitting(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """SmolLM cuts digits apart before anything else. The loader drops that, so that runs of blanks before a digit
    would be read otherwise than in training; the header names the rule, here it is applied."""
    if name != "smollm":
        return
    from tokenizers import pre_tokenizers

    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _read_header(file: IO[bytes], wanted: tuple[str, ...]) -> dict[str, str]:
    magic = file.read(4)
    if magic != _MAGIC:
        raise ValueError(f"it starts with {magic!r}, expected {_MAGIC!r}")
    version, _, count = struct.unpack("<IQQ", file.read(20))
    if version not in (2, 3):
        raise ValueError(f"version {version}, expected 2 or 3")
    found: dict[str, str] = {}
    for _ in range(count):
        key = _read_text(file)
        (kind,) = struct.unpack("<I", file.read(4))
        if key in wanted and kind == _STRING:
            found[key] = _read_text(file)
        else:
            _skip_value(file, kind)
        if len(found) == len(wanted):
            break
    return found


def _read_text(file: IO[bytes]) -> str:
    return _read(file, _read_length(file)).decode("utf-8")


def _read_length(file: IO[bytes]) -> int:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _LONGEST:
        raise ValueError(f"a text of {length:,} bytes in its header")
    return int(length)


def _skip_value(file: IO[bytes], kind: int) -> None:
    if kind == _STRING:
        _read(file, _read_length(file))
    elif kind == _ARRAY:
        (inner, count) = struct.unpack("<IQ", file.read(12))
        if inner in _WIDTHS and count <= _LONGEST:
            _read(file, _WIDTHS[inner] * count)
        elif inner == _STRING:
            for _ in range(count):
                _read(file, _read_length(file))
        else:
            raise ValueError(f"an array of {count:,} values of type {inner} in its header")
    elif kind in _WIDTHS:
        _read(file, _WIDTHS[kind])
    else:
        raise ValueError(f"a value of type {kind} in its header")


def _read(file: IO[bytes], length: int) -> bytes:
    data = file.read(length)
    if len(data) < length:
        raise ValueError("its header ends early")
    return data
