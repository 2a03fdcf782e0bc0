"""Loading a target by alias, hub id, folder or GGUF file. All of them end as a folder of safetensors.

Nothing is unpickled and no code of a repository is run: only safetensors weights, only transformers' own classes.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coral_spec.targets.aliases import ALIASES, CONVERSION, Alias
from coral_spec.targets.home import models_folder, preparation
from coral_spec.targets.quiet import first_line, quiet_transformers
from coral_spec.targets.target import Target, make_target
from expkit.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ATTENTION = ("sdpa", "eager")


def load_target(name: str, *, device: str = "auto", dtype: str = "auto", attention: str = "sdpa") -> Target:
    """Load a decoder-only language model with its tokenizer, frozen and in evaluation mode.

    Args:
        name: an alias (`coral-spec models` lists them), a hub id, a model's folder, or a .gguf file. Aliases and
            GGUF files are converted to safetensors once and then read from the cache.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto" (bf16 where the hardware has it, else fp32 on CPU and fp16 on GPU), or a name such as "fp32".
        attention: "sdpa" or "eager".

    Raises:
        UsageError: no such model, no network, damaged files, or not a decoder-only causal language model.
    """
    from expkit.device import resolve_device, resolve_dtype

    if attention not in ATTENTION:
        raise UsageError(f'attention "{attention}" is unknown, expected one of {", ".join(ATTENTION)}')
    place = resolve_device(device)
    precision = resolve_dtype(dtype, place)
    folder = locate(name)
    with quiet_transformers():
        config = _read_config(name, folder)
        _require_decoder(name, config)
        tokenizer = _load_tokenizer(name, folder)
        model = _load_model(name, folder, config, place, precision, attention)
    return make_target(name, model, tokenizer)


def locate(name: str) -> Path:
    """The safetensors folder of `name`; converts or downloads it first where that has not been done.

    Raises:
        UsageError: nothing goes by that name, or it cannot be had.
    """
    if name in ALIASES:
        return prepare_alias(ALIASES[name])
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.suffix.lower() == ".gguf":
        return prepare_gguf(path)
    if path.exists():
        raise UsageError(f"{name} is a file, expected a .gguf file, a model's folder, a hub id or an alias")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise UsageError(f"{name} does not exist; expected a folder, a .gguf file, a hub id or {_aliases()}")
    from coral_spec.targets.hub import fetch_repository

    return fetch_repository(name, _aliases())


def prepare_alias(alias: Alias) -> Path:
    """The alias's converted folder, made now if it is not there."""
    if alias.cached:
        return alias.folder
    from coral_spec.targets.fetch import fetch_gguf, remove_fetched

    with preparation() as work:
        if not alias.cached:  # another process may have made it while this one waited for the lock
            path = fetch_gguf(alias, work)
            _convert(alias.name, path, alias.folder)
        remove_fetched(alias)
    return alias.folder


def prepare_gguf(path: Path) -> Path:
    """The converted folder of a user's own GGUF file, recognised by its place, size and time of change."""
    if not path.is_file():
        raise UsageError(f"{path} does not exist, expected a GGUF file")
    facts = path.stat()
    key = hashlib.sha256(f"{path.resolve()}|{facts.st_size}|{facts.st_mtime_ns}".encode()).hexdigest()
    folder = models_folder() / f"{path.stem}-{key[:12]}-v{CONVERSION}"
    if not folder.is_dir():
        with preparation():
            if not folder.is_dir():
                _convert(path.name, path.resolve(), folder)
    return folder


def _convert(name: str, path: Path, folder: Path) -> None:
    from rich.console import Console

    from coral_spec.targets.gguf import convert_gguf

    screen = Console(file=sys.stderr)  # bound now, since the conversion turns sys.stderr aside
    if screen.is_terminal:
        with screen.status(f"converting {name} to safetensors, once ..."):
            convert_gguf(path, folder)
    else:
        screen.print(f"converting {name} to safetensors, once ...")
        convert_gguf(path, folder)


def _read_config(name: str, folder: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json, expected a model's folder as transformers saves it")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a wrong value in config.json may raise anything inside a model's own class
        raise UsageError(f"{name}: config.json cannot be used ({first_line(error)})") from None
    return config


def _require_decoder(name: str, config: PreTrainedConfig) -> None:
    """Refuse what drafts cannot be verified on: encoders, encoder-decoders, recurrent models, other heads."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(f"{name} is a {kind} model, expected a decoder-only causal language model")
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    classes: tuple[Any, ...] = found if isinstance(found, tuple) else (found,)
    saved = config.architectures or []
    if saved and not {each.__name__ for each in classes} & set(saved):
        raise UsageError(
            f"{name} was saved as {', '.join(saved)}, expected a causal language model such as {classes[0].__name__}"
        )
    layers = set(getattr(config.get_text_config(), "layer_types", None) or ())
    other = layers - {"full_attention", "sliding_attention"}
    if other or any(getattr(each, "_is_stateful", False) for each in classes):
        reason = f"layers of type {', '.join(sorted(other))}" if other else "a recurrent state"
        raise UsageError(f"{name} ({kind}) has {reason}; a tree of drafts needs attention layers only")


def _load_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # as for the configuration: damaged files raise what they like
        raise UsageError(f"{name}: its tokenizer cannot be loaded ({first_line(error)})") from None
    if not tokenizer.get_vocab():
        raise UsageError(f"{name}: {folder} has no tokenizer, expected tokenizer.json or the like")
    return tokenizer


def _load_model(
    name: str, folder: Path, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if not list(folder.glob("*.safetensors")):
        raise UsageError(f"{name}: {folder} has no .safetensors file; other formats could run code and are not read")
    auto: Any = AutoModelForCausalLM  # its annotation leaves out the pair that is returned with loading info
    try:
        model, report = auto.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            device_map=None if device.type == "cpu" else {"": device},
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        if "out of memory" in str(error):
            raise
        raise UsageError(f"{name}: its weights are damaged or do not fit config.json ({first_line(error)})") from None
    missing = sorted(str(key) for key in report["missing_keys"])
    if missing:
        raise UsageError(f"{name}: {len(missing)} weights are missing from {folder}, such as {missing[0]}")
    loaded: PreTrainedModel = model
    return loaded


def _aliases() -> str:
    return f"an alias ({', '.join(ALIASES)})"
