"""GGUF files: dequantised by transformers' loader and written once as a safetensors folder in bf16.

The architecture is read from the header here, before anything heavy runs: a few bytes tell a damaged or unknown
file. Format: the GGUF specification of ggml, versions 2 and 3 (little-endian).
"""

from __future__ import annotations

import functools
import io
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
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
# The value types of fixed size, as struct names them.
_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LONGEST = 1 << 28  # no name or text of a header is longer; a damaged length would ask for exabytes
_SPLITTING = ("tokenizer.ggml.model", "tokenizer.ggml.pre")
_CONTROL = 3  # a type of token
_WHOLE = (_CONTROL, 4)  # found in a text before it is cut: control tokens and those that a user defined
_SPECIAL = {
    "tokenizer.ggml.bos_token_id": "bos_token",
    "tokenizer.ggml.eos_token_id": "eos_token",
    "tokenizer.ggml.unknown_token_id": "unk_token",
    "tokenizer.ggml.padding_token_id": "pad_token",
}
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


def read_header(path: Path, wanted: tuple[str, ...]) -> dict[str, Any]:
    """The values `wanted` of a GGUF file's header, texts and numbers; those it lacks are left out.

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
    header = read_header(path, ("general.architecture", "tokenizer.ggml.add_bos_token", *_SPLITTING, *_SPECIAL))
    architecture = header.get("general.architecture", "")
    known = known_architectures()
    if architecture not in known:
        raise UsageError(f'{path}: GGUF architecture "{architecture}" is not known; known are {", ".join(known)}')
    with quiet_transformers(), tempfile.TemporaryDirectory() as empty:
        try:
            with (
                redirect_stderr(io.StringIO()),
                _parsing_once(),
                _eos_without_bos(header),
            ):  # the loader's own bar obeys no setting
                model, missing, tokenizer = _load(_alone(path, Path(empty)))
                restore_merges(tokenizer, header, functools.partial(_vocabulary, path))
        except ImportError as error:
            raise UsageError(f"GGUF files need the packages gguf and accelerate ({first_line(error)})") from None
        except _DAMAGE as error:
            raise UsageError(f"{path} is damaged or cannot be loaded ({first_line(error)})") from None
        if missing:
            raise UsageError(f"{path} is damaged: {len(missing)} tensors are missing, such as {sorted(missing)[0]}")
        settle_tokenizer(tokenizer, header)
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


@contextmanager
def _eos_without_bos(header: Mapping[str, Any]) -> Iterator[None]:
    """Up to 5.17 the loader looks for the end-of-text token by the id of the beginning-of-text one, which some files
    have not: lend it the right id."""
    from transformers.integrations import ggml

    skeleton: Any = getattr(ggml, "GGUFTokenizerSkeleton", None)
    name, end = "bos_token_id", header.get("tokenizer.ggml.eos_token_id")
    if skeleton is None or end is None or f"tokenizer.ggml.{name}" in header:
        yield
        return
    setattr(skeleton, name, end)
    try:
        yield
    finally:
        delattr(skeleton, name)


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


def _vocabulary(path: Path) -> list[tuple[str, int]]:
    """Pieces as the file spells them, with the type of each."""
    import gguf

    fields = gguf.GGUFReader(path).fields
    pieces: list[str] = fields["tokenizer.ggml.tokens"].contents()
    types = fields.get("tokenizer.ggml.token_type")
    return list(zip(pieces, types.contents() if types else [1] * len(pieces), strict=True))


def restore_merges(
    tokenizer: PreTrainedTokenizerBase, header: Mapping[str, Any], vocabulary: Callable[[], list[tuple[str, int]]]
) -> None:
    """Give a sentencepiece vocabulary its merges and its special tokens, where the loader has lost them.

    A GGUF file lists such a vocabulary in the order in which its pieces were merged, and no merges. Up to 5.17 the
    loader makes none for Gemma, so that a text is read letter by letter, with no token in front of it.

    Args:
        tokenizer: changed in place.
        header: of the file.
        vocabulary: reads pieces and their types, in order, where they are needed.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or header.get("tokenizer.ggml.model") != "llama":
        return
    from tokenizers import AddedToken, models, processors

    if not json.loads(backend.to_str())["model"].get("merges"):
        found = vocabulary()
        # runs of blanks are spelled as such in the file, all other blanks as sentencepiece spells them
        spelled = [piece if piece.strip(" ") else "\u2581" * len(piece) for piece, _ in found]
        ids = {piece: index for index, piece in enumerate(spelled)}
        unknown = header.get("tokenizer.ggml.unknown_token_id")
        backend.model = models.BPE(
            vocab=ids,
            merges=_merges(spelled, ids),
            unk_token=tokenizer.unk_token if unknown is None else spelled[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
        whole = [(piece, kind) for piece, kind in found if kind in _WHOLE and piece.strip(" ")]
        tokenizer.add_tokens([AddedToken(piece, normalized=False, special=kind == _CONTROL) for piece, kind in whole])
    start = header.get("tokenizer.ggml.bos_token_id")
    if start is None or not header.get("tokenizer.ggml.add_bos_token", True):
        return
    if tokenizer("a")["input_ids"][:1] != [start]:
        name = tokenizer.convert_ids_to_tokens(start)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A {name}:1 $B:1", special_tokens=[(name, start)]
        )


def _merges(pieces: Sequence[str], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, those of earlier pieces first, then those with a longer left one."""
    cuts = ((piece[:at], piece[at:]) for piece in pieces for at in range(len(piece) - 1, 0, -1))
    return [(left, right) for left, right in cuts if left in ids and right in ids]


def settle_tokenizer(tokenizer: PreTrainedTokenizerBase, header: Mapping[str, Any]) -> None:
    """Make the tokenizer what the header says, whatever release of transformers built it.

    Up to 5.17 byte-level vocabularies get the special tokens and the decoder of a sentencepiece one, and in all
    releases so far SmolLM's rule to cut digits apart before anything else is dropped, so that blanks before a digit
    would be read otherwise than in training.
    """
    special = {name: header[key] for key, name in _SPECIAL.items() if key in header}
    for name, index in special.items():
        setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(index))
    if "bos_token" not in special:
        tokenizer.bos_token = None
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "model_type", "legacy"):
        tokenizer.init_kwargs.pop(name, None)  # leftovers of the loader, which would be saved
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or header.get("tokenizer.ggml.model") != "gpt2":
        return
    from tokenizers import decoders, normalizers, pre_tokenizers

    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.init_kwargs["clean_up_tokenization_spaces"] = False
    backend.decoder = decoders.ByteLevel()
    if isinstance(backend.normalizer, normalizers.Sequence):  # an empty one
        backend.normalizer = None
    backend.model.unk_token, backend.model.byte_fallback, backend.model.fuse_unk = None, False, False
    if header.get("tokenizer.ggml.pre") == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _read_header(file: IO[bytes], wanted: tuple[str, ...]) -> dict[str, Any]:
    magic = file.read(4)
    if magic != _MAGIC:
        raise ValueError(f"it starts with {magic!r}, expected {_MAGIC!r}")
    version, _, count = struct.unpack("<IQQ", _read(file, 20))
    if version not in (2, 3):
        raise ValueError(f"version {version}, expected 2 or 3")
    found: dict[str, Any] = {}
    for _ in range(count):
        key = _read_text(file)
        (kind,) = struct.unpack("<I", _read(file, 4))
        value = _read_value(file, kind)
        if key in wanted:
            found[key] = value
        if len(found) == len(wanted):
            break
    return found


def _read_value(file: IO[bytes], kind: int) -> Any:
    """A text or a number; arrays are passed over and give None."""
    if kind == _STRING:
        return _read_text(file)
    if kind in _FIXED:
        return struct.unpack("<" + _FIXED[kind], _read(file, struct.calcsize(_FIXED[kind])))[0]
    if kind != _ARRAY:
        raise ValueError(f"a value of type {kind} in its header")
    inner, count = struct.unpack("<IQ", _read(file, 12))
    if inner in _FIXED and count <= _LONGEST:
        _read(file, struct.calcsize(_FIXED[inner]) * count)
    elif inner == _STRING:
        for _ in range(count):
            _read(file, _read_length(file))
    else:
        raise ValueError(f"an array of {count:,} values of type {inner} in its header")
    return None


def _read_text(file: IO[bytes]) -> str:
    return _read(file, _read_length(file)).decode("utf-8")


def _read_length(file: IO[bytes]) -> int:
    (length,) = struct.unpack("<Q", _read(file, 8))
    if length > _LONGEST:
        raise ValueError(f"a text of {length:,} bytes in its header")
    return int(length)


def _read(file: IO[bytes], length: int) -> bytes:
    data = file.read(length)
    if len(data) < length:
        raise ValueError("its header ends early")
    return data
