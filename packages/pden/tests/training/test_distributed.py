"""Under torchrun the processes train one model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from expkit.checkpoint import load_tensors

# Each process trains with BatchNorm, a refused domain and an average, and says what it came to.
SCRIPT = """
import hashlib, json, sys
sys.path.insert(0, {tests!r})
import torch
from expkit.distributed import gather, join, leave
from pden.training.trainer import Trainer
from tiny_domains import finish, tiny_config, tiny_domain, weights

world = join()
config = tiny_config(model__name="wrn-10-1", gate__novelty=5.0)  # the second domain is never new enough
trainer = Trainer(config, tiny_domain(), tiny_domain(24, seed=1), world=world)
drawn, batch = [], trainer._batch
trainer._batch = lambda *given: drawn.append(batch(*given)[0]) or (drawn[-1], batch(*given)[1])
events = finish(trainer)
digest = hashlib.sha256(weights(trainer).numpy().tobytes()).hexdigest()
mine = {{"weights": digest, "events": events, "reports": [each.plain() for each in trainer.reports],
        "best": trainer.best.round, "first batch": drawn[0].flatten(1).sum(1).tolist()}}
found = gather(mine)
if world.is_main:
    print(json.dumps(found))
leave()
"""


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_both_processes_hold_the_same_model_and_verdicts_from_batches_of_their_own(tmp_path: Path):
    script = tmp_path / "two.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1])))
    done = torchrun(str(script))
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert first.pop("first batch") != second.pop("first batch")
    assert first == second
    assert [each["verdict"] for each in first["reports"]] == ["accepted", "retrain", "dropped"]


@pytest.mark.slow
def test_two_processes_train_one_model_and_write_it_once(tmp_path: Path):
    command = ["-m", "pden", "train", "--preset", "tiny"]
    command += ["--runs", str(tmp_path / "runs"), "--json", str(tmp_path / "out.json"), "--device", "cpu"]
    command += ["--set", "pretrain_steps=4", "--set", "round_steps=4", "--set", "gate.judge_steps=2"]
    done = torchrun(*command)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["processes"] == 2
    assert load_tensors(tmp_path / "runs" / "tiny" / "model" / "last.safetensors")
