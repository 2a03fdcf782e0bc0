"""Answers image by image on the disk, so that an evaluation that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expkit.checkpoint import load_tensors, save_tensors


class AnswerStore:
    """Boolean answers of chunks, for one checkpoint and one set of settings.

    Args:
        folder: where the file goes.
        checkpoint: the evaluated file; its content is part of the key.
        settings: everything that the answers depend on.
    """

    def __init__(self, folder: Path, checkpoint: Path, settings: Mapping[str, Any]) -> None:
        with checkpoint.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        key = hashlib.sha256(json.dumps([content, dict(settings)], sort_keys=True).encode()).hexdigest()
        self.path = folder / f"{checkpoint.stem}-{key[:12]}.safetensors"
        self._answers = load_tensors(self.path) if self.path.is_file() else {}

    def get(self, attack: str, chunk: int) -> Tensor | None:
        """What was put, or None."""
        found = self._answers.get(f"{attack}/{chunk}")
        return None if found is None else found.bool()

    def put(self, attack: str, chunk: int, answers: Tensor) -> None:
        """Keep a chunk's answers; on the disk when this returns."""
        self._answers[f"{attack}/{chunk}"] = answers.to(torch.uint8)
        save_tensors(self.path, self._answers)
