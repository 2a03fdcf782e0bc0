"""Puts this folder on the path, so that every test may say `from tiny import tiny_target`; keeps the cache apart.

Without a GPU, kernels run in Triton's interpreter, which must be chosen before Triton is imported.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Step costs that a test measures stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORAL_SPEC_HOME", str(tmp_path_factory.mktemp("home")))
        yield
