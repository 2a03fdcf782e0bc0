"""Under torchrun the processes train one model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from expkit.checkpoint import load_tensors


@pytest.mark.slow
def test_two_processes_train_one_model_and_write_it_once(tmp_path: Path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "pden", "train", "--preset", "tiny"]
    command += ["--runs", str(tmp_path / "runs"), "--json", str(tmp_path / "out.json"), "--device", "cpu"]
    command += ["--set", "pretrain_steps=4", "--set", "round_steps=4", "--set", "gate.judge_steps=2"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["processes"] == 2
    assert load_tensors(tmp_path / "runs" / "tiny" / "model" / "last.safetensors")
