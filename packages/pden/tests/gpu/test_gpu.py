"""On a GPU: the loop in fp32 and bf16, its resume, corruptions and operations on the device."""

from __future__ import annotations

import os

import pytest
import torch

from expkit.checkpoint import CheckpointStore
from expkit.norms import kept_statistics, running_statistics
from pden.baselines import BASELINES
from pden.data.corruptions import CORRUPTIONS, corrupt
from pden.evaluation.accuracy import confusion
from pden.evaluation.disguise import disguises
from pden.models import build_model
from pden.training.state import capture, restore
from pden.training.steps import Steps
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


def watch(run: Trainer) -> list[str]:
    """Do each recorded call beside a plain one at the same weights, and compare; the calls that were compared."""
    steps, seen = run.steps, []
    assert steps.graphs
    plain = Steps(run.config, run.task, run.learner, run.baseline, run.device, run.dtype, False)

    def watched(name):
        own, other = getattr(steps, name), getattr(plain, name)

        def both(*given):
            with kept_statistics(run.task):
                wanted, losses = other(*given)
                statistics = [each.clone() for each in running_statistics(run.task)]
            found = own(*given)
            for one, two in zip(found[0], wanted, strict=True):
                assert (one is None) == (two is None), name
                assert one is None or (one - two).norm() <= 0.02 * two.norm() + 1e-6, name
            for key, value in losses.items():
                torch.testing.assert_close(found[1][key], value, rtol=1e-2, atol=1e-3)
            for one, two in zip(running_statistics(run.task), statistics, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
            seen.append(name)
            return found

        return both

    for name in ("plain", "expand", "tune"):
        setattr(steps, name, watched(name))
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kinds", [("photometric",), ("geometric",), ("composite", "photometric")])
def test_recorded_steps_have_the_gradients_of_plain_ones(kinds, dtype):
    """Of every generator and, from the third round on, with one of several earlier ones."""
    grid = 0 if kinds == ("geometric",) else 4
    changes = {"generator__kinds": kinds, "generator__grid": grid, "optimizer__schedule": "cosine"}
    run = make_trainer(dtype, rounds=4, **changes)
    seen = watch(run)
    finish(run)
    assert [seen.count(name) for name in ("plain", "expand", "tune")] == [6, 4 * 3, 4 * 6]


@pytest.mark.gpu
def test_recorded_steps_of_our_settings_have_the_gradients_of_plain_ones():
    views = {"data__randconv": 0.5, "data__randconv_of": "views", "data__randaugment": 1.0}
    run = make_trainer(rounds=3, generator__grid=4, generator__grid_share=0.5, loss__consistency=10.0, **views)
    seen = watch(run)
    finish(run)
    assert seen.count("tune") == 3 * 6


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["joint", "split", "source", "frozen"])
def test_recorded_steps_move_statistics_as_plain_ones(policy):
    run = make_trainer(model__name="wrn-10-1", model__batch_norm=policy, rounds=3)
    seen = watch(run)
    finish(run)
    assert seen.count("tune") == 3 * 6


@pytest.mark.gpu
@pytest.mark.parametrize("method", BASELINES)
def test_recorded_steps_of_baselines_have_the_gradients_of_plain_ones(method):
    run = make_trainer(method=method, rounds=1)
    run.baseline.growth = (2,) if run.baseline.growth else ()
    seen = watch(run)
    finish(run)
    assert seen == ["plain"] * 12


@pytest.mark.gpu
def test_refused_domains_are_recorded_anew():
    run = make_trainer(gate__agreement=2.0)
    seen = watch(run)
    assert finish(run).count("refused") == 4 and seen.count("expand") == 12


@pytest.mark.gpu
def test_recordings_take_no_more_memory_from_round_to_round():
    run, held = make_trainer(rounds=8), {}
    while not run.done:
        if run.step() == "round":
            torch.cuda.synchronize()
            held[len(run.pool)] = torch.cuda.memory_reserved()
    assert held[7] <= held[3] + 2**22


@pytest.mark.gpu
def test_recorded_steps_learn_dense_labels():
    config = tiny_config(model__name="fcn-small")
    run = Trainer(config, tiny_dense(), tiny_dense(6, seed=1), device=CUDA)
    watch(run)
    assert finish(run)[-1] == "round" and torch.isfinite(weights(run)).all()


@pytest.mark.gpu(2)
def test_recorded_steps_run_on_another_device_than_the_current_one():
    run = Trainer(tiny_config(), tiny_domain(), tiny_domain(24, seed=1), device=torch.device("cuda", 1))
    watch(run)
    assert finish(run)[-1] == "round"


@pytest.fixture
def deterministic():
    """Operations that repeat to the bit, where there are such; sampling at points of a grid has none on a GPU."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [12, 24])  # in the first round, and with two earlier domains
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, deterministic, steps):
    def trainer() -> Trainer:
        return make_trainer(generator__kinds=("photometric",), generator__grid=4, generator__grid_share=0.5, rounds=3)

    whole, killed = trainer(), trainer()
    finish(whole)
    finish(killed, steps)
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
