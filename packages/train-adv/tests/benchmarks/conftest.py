"""The study's modules, which lie beside the package."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import study
    import study_arms
    import study_results

    return study, study_arms, study_results


@pytest.fixture
def start(modules):
    _, arms, report = modules
    return arms.parts(*[report.START] * 4)
