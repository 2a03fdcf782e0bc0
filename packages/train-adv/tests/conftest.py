"""Puts this folder on the path, so that every test may say `from tiny_models import ...`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
