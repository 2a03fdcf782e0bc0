"""On a GPU: the loop in fp32 and bf16, its resume, corruptions and operations on the device."""

from __future__ import annotations

import os

import pytest
import torch

from expkit.checkpoint import CheckpointStore
from pden.baselines import BASELINES
from pden.data.corruptions import CORRUPTIONS, corrupt
from pden.evaluation.accuracy import confusion
from pden.evaluation.disguise import disguises
from pden.models import build_model
from pden.training.state import capture, restore
from pden.training.trainer import Trainer
from tiny_domains import finish, tiny_config, tiny_dense, tiny_domain, weights

CUDA = torch.device("cuda")
# PyTorch reads it at the first product of matrices of a process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def make_trainer(dtype: torch.dtype = torch.float32, **changes) -> Trainer:
    return Trainer(tiny_config(**changes), tiny_domain(), tiny_domain(24, seed=1), device=CUDA, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["photometric", "geometric", "composite"])
def test_the_loop_runs_on_the_device(dtype, kind):
    run = make_trainer(dtype, generator__kinds=(kind,))
    assert finish(run) == ["pretrained", "judged", "round", "round"]
    assert torch.isfinite(weights(run)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("method", BASELINES)
def test_baselines_run_on_the_device(method):
    run = make_trainer(method=method)
    run.baseline.growth = (2,) if run.baseline.growth else ()
    finish(run)
    assert torch.isfinite(weights(run)).all()


@pytest.mark.gpu
def test_sgd_meets_the_projection_heads_first_gradient_in_a_round():
    run = make_trainer(torch.bfloat16, optimizer__kind="sgd", optimizer__momentum=0.9)
    assert finish(run)[-1] == "round" and torch.isfinite(weights(run)).all()


def run_as(engine: str, **changes) -> Trainer:
    run = make_trainer(engine=engine, rounds=3, optimizer__schedule="cosine", **changes)
    finish(run)
    assert run.steps.graphs == (engine == "graphs")
    return run


@pytest.mark.gpu
def test_recorded_steps_are_the_plain_ones(deterministic):
    """All weights that a run leaves, to rounding; no BatchNorm here, an earlier domain in two of three rounds."""
    graphs, eager = run_as("graphs"), run_as("eager")
    torch.testing.assert_close(weights(graphs), weights(eager), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["joint", "split", "source", "frozen"])
def test_recorded_steps_keep_the_statistics_of_plain_ones(policy):
    changes = {"model__name": "wrn-10-1", "model__batch_norm": policy, "generator__kinds": ("composite", "geometric")}
    graphs, eager = (run_as(engine, **changes) for engine in ("graphs", "eager"))
    for (name, one), other in zip(graphs.task.state_dict().items(), eager.task.state_dict().values(), strict=True):
        if one.is_floating_point():  # Adam makes steps of one size of whatever gradient there is
            assert (one - other).abs().max() <= 0.05 + 0.1 * other.abs().max(), name
        else:
            assert torch.equal(one, other), name  # batches counted


@pytest.mark.gpu
def test_recorded_steps_learn_dense_labels():
    config = tiny_config(model__name="fcn-small")
    run = Trainer(config, tiny_dense(), tiny_dense(6, seed=1), device=CUDA)
    assert finish(run)[-1] == "round" and torch.isfinite(weights(run)).all()


@pytest.fixture
def deterministic():
    """Operations that repeat to the bit, where there are such; sampling at points of a grid has none on a GPU."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, deterministic):
    def trainer() -> Trainer:
        return make_trainer(generator__kinds=("photometric",))

    whole, killed = trainer(), trainer()
    finish(whole)
    finish(killed, 12)
    CheckpointStore(tmp_path).save(killed.clock.total, killed.task.state_dict(), capture(killed))
    checkpoint = CheckpointStore(tmp_path).latest()
    assert checkpoint is not None
    again = trainer()
    restore(again, checkpoint)
    finish(again)
    assert torch.equal(weights(again), weights(whole))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_run_on_the_device(name):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, device=CUDA)
    made = corrupt(images, name, 3, torch.Generator(CUDA).manual_seed(0))
    assert made.device.type == "cuda" and made.shape == images.shape


@pytest.mark.gpu
def test_the_disguised_source_is_the_same_on_the_device_and_measured_in_fp32():
    domain = tiny_domain(40)
    for here, there in zip(disguises(domain), disguises(domain.to(CUDA)), strict=True):
        assert there.images.device.type == "cuda" and torch.equal(here.images, there.images.cpu())
    run = make_trainer(torch.bfloat16, gate__mode="off")
    finish(run)
    copy = build_model("digits", classes=3, size=16, width=0.1, embedding=8)
    copy.load_state_dict({key: value.cpu() for key, value in run.task.state_dict().items()})
    assert torch.equal(confusion(run.task, domain.to(CUDA)).cpu(), confusion(copy, domain))
