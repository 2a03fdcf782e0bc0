"""What every test gets: one thread, no surprise downloads, and GPU tests only with a GPU."""

from __future__ import annotations

import os

import pytest

# Before anything imports torch: the tests' tensors are tiny, and threads that wait for each other cost more
# than they bring. Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# Run from the source tree (PYTHONPATH=shared/src:...), tests start processes in other folders.
if os.environ.get("PYTHONPATH"):
    paths = os.environ["PYTHONPATH"].split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in paths)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests without CUDA, and `gpu(2)` ones with less, unless EXPKIT_REQUIRE_GPU calls no CUDA a mistake."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0 and os.environ.get("EXPKIT_REQUIRE_GPU") == "1":
        raise pytest.UsageError("EXPKIT_REQUIRE_GPU=1, but CUDA is not available")
    for item in marked:
        needed = next((mark.args[0] for mark in item.iter_markers("gpu") if mark.args), 1)
        if count < needed:
            reason = "needs a CUDA device" if needed == 1 else f"needs {needed} CUDA devices"
            item.add_marker(pytest.mark.skip(reason=reason))
