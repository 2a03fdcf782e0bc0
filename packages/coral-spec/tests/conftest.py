"""Puts this folder on the path, so that every test may say `from tiny import tiny_target`.

Without a GPU, kernels run in Triton's interpreter, which must be chosen before Triton is imported.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
