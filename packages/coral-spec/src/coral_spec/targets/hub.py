"""Models of the Hugging Face hub: their files are brought into the hub's own cache, never their code."""

from __future__ import annotations

from pathlib import Path

from coral_spec.targets.quiet import first_line
from expkit.errors import UsageError

# Weights, configuration and tokenizer under their usual names; a repository may hold the same weights thrice.
FILES = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
]


def fetch_repository(name: str, aliases: str) -> Path:
    """The folder of a hub repository's files: fetched, or without a network as they were fetched before.

    Args:
        name: `owner/model` (or the older bare `model`).
        aliases: what else the user may have meant, for the error.

    Raises:
        UsageError: no such repository, no access to it, or no network and nothing cached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        # "*/*" leaves out sub-folders, whose copies of the weights are in other formats
        folder = Path(snapshot_download(name, allow_patterns=FILES, ignore_patterns=["*/*"]))
    except GatedRepoError:
        raise UsageError(f"{name} asks for consent: accept its terms on the hub, then run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise UsageError(f"{name} is neither a folder nor a repository that the hub shows you, nor {aliases}") from None
    except HFValidationError as error:
        raise UsageError(f"{name} is no hub id ({first_line(error)})") from None
    except LocalEntryNotFoundError:
        raise UsageError(
            f"{name} is not cached and the hub cannot be reached; where there is a network run "
            f"`hf download {name} --local-dir FOLDER` and give the folder, or use {aliases}"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise UsageError(f"{name} could not be fetched from the hub ({first_line(error)})") from None
    if not (folder / "config.json").is_file():
        raise UsageError(f"{name} has no config.json on the hub or in its cache, expected a transformers model")
    return folder
