"""The command line answers at once."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest


@pytest.mark.slow
def test_help_is_quick():
    """Nothing heavy is imported; the best of a few, since other work may run beside the tests."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        shown = subprocess.run([sys.executable, "-m", "pden", "--help"], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - started)
    assert "demo" in shown.stdout
    assert min(times) < 2.0
