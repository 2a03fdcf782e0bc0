"""Settings reach what they are of, and what a run keeps is what it says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from expkit.checkpoint import CheckpointStore, load_tensors
from expkit.distributed import World
from expkit.errors import UsageError
from pden.baselines.randaugment import RandAugment
from pden.baselines.randconv import RandConv
from pden.data import Home
from pden.evaluation import disguise
from pden.training import gatekeeper, run, steps, trainer
from pden.training.config import METHODS, AveragingConfig, OptimizerConfig
from pden.training.history import measure_round
from pden.training.state import capture, restore
from pden.training.stream import Stream
from pden.training.views import draw_views, forward_views, make_views
from tiny_domains import finish, tiny_config, tiny_domain, tiny_trainer, weights

CPU = torch.device("cpu")
NORMED = {"model__name": "wrn-10-1"}


def statistics(model: torch.nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for name, buffer in model.named_buffers() if "running" in name]


def test_a_generators_loss_leaves_running_statistics_alone():
    one = tiny_trainer(**NORMED)
    finish(one, 10)
    before = statistics(one.task)
    images, labels = one.source.batch(torch.arange(12))
    one.steps.expand(one.expansion, one.expander, images, labels, [torch.randn(12, 3), torch.randn(12, 3)])
    assert before and all(torch.equal(*pair) for pair in zip(before, statistics(one.task), strict=True))


@pytest.mark.parametrize(("policy", "moves"), [("joint", True), ("frozen", False)])
def test_the_batch_norm_policy_reaches_the_steps(policy, moves):
    one = tiny_trainer(**NORMED, model__batch_norm=policy)
    finish(one, 10)
    before = statistics(one.task)
    finish(one, 3)
    after = statistics(one.task)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True)) is not moves


def test_the_task_model_computes_its_views_in_the_precision_asked_for():
    one = trainer.Trainer(tiny_config(), tiny_domain(), tiny_domain(24, seed=1), dtype=torch.bfloat16)
    finish(one, 11)
    seen: list[torch.dtype] = []
    one.task.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    images, labels = one.source.batch(torch.arange(12))
    one.steps.tune(one.expansion.generator, None, images, labels, [torch.randn(12, 3)])
    assert seen == [torch.bfloat16]


def test_each_image_has_a_share_of_its_own_in_the_mixture():
    one = tiny_trainer()
    finish(one)
    current, earlier = one.pool
    _, shares, _ = draw_views(torch.rand(12, 3, 16, 16), current, earlier, torch.Generator().manual_seed(0))
    assert shares.shape == (12, 1, 1, 1) and len(shares.unique()) == 12


def test_the_schedule_falls_over_all_rounds_together():
    one = tiny_trainer(optimizer=OptimizerConfig(lr=0.1, schedule="cosine"))
    finish(one, 6 + 4 + 9)  # pre-training, the judge, nine of twelve steps
    assert one.learner.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * (1 + math.cos(math.pi * 8 / 12)))


def test_an_average_from_a_later_round_is_no_figure_of_an_earlier_one():
    one = tiny_trainer(averaging=AveragingConfig(from_round=2))
    finish(one, 6 + 4 + 6)
    assert one.average.count == 0 and "averaged" not in measure_round(one, 1, [])
    finish(one)
    assert one.average.count == 6 and "averaged" in measure_round(one, 2, [])


@pytest.mark.parametrize(("kind", "key"), [("adam", "betas"), ("sgd", "momentum")])
def test_rates_and_decay_are_those_of_the_settings(kind, key):
    own = OptimizerConfig(kind=kind, lr=0.02, weight_decay=0.3)
    one = tiny_trainer(optimizer=own, gate__judge_lr=0.07, generator__lr=0.05)
    finish(one, 11)
    groups = [each.optimizer.param_groups[0] for each in (one.learner, one.gatekeeper.learner, one.expander)]
    assert [group["lr"] for group in groups] == [0.02, 0.07, 0.05] and key in groups[0]
    assert groups[0]["weight_decay"] == 0.3


def test_a_grown_pool_is_drawn_from():
    one = tiny_trainer(method="ada")
    one.baseline.growth = (2,)
    finish(one, 3)
    one.grown[0].fill_(0.5)
    images, _ = one._batch(200, Stream(CPU, 0))
    grey = (images == 0.5).flatten(1).all(dim=1)
    assert 0.3 < float(grey.float().mean()) < 0.7  # as many as the source's


def test_images_are_cropped_and_flipped_where_that_is_asked_for():
    plain, cropped = (tiny_trainer(data__augment=kind) for kind in ("none", "crop-flip"))
    images, again = (each._batch(12, Stream(CPU, 0))[0] for each in (plain, cropped))
    assert images.shape == again.shape and not torch.equal(images, again)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_textured_batches_and_augmented_ones(method):
    one = tiny_trainer(method=method, data__randaugment=1.0, data__randconv=1.0, batch=30)
    one.baseline.growth = (2,) if one.baseline.growth else ()
    finish(one)
    assert torch.isfinite(weights(one)).all()


@pytest.mark.parametrize("method", ["pden", "erm"])
def test_a_share_of_the_rounds_batches_is_textured(method):
    plain, half, all_ = (tiny_trainer(method=method, data__randconv=share) for share in (0.0, 0.5, 1.0))

    def textured(one: trainer.Trainer) -> list[bool]:
        pairs = [(plain._batch(4, Stream(CPU, each))[0], one._batch(4, Stream(CPU, each))[0]) for each in range(40)]
        return [not torch.equal(*pair) for pair in pairs]

    for stage in ("pretrain", "judge"):  # these see the source as it is
        for each in (plain, half, all_):
            each.clock.stage = stage
        assert not any(textured(all_))
    for each in (plain, half, all_):
        each.clock.stage = "round"
    assert all(textured(all_)) and not any(textured(plain)) and 10 <= sum(textured(half)) <= 30
    stream = Stream(CPU, 1)
    images, _ = plain._batch(4, stream)
    stream.host.random()  # the decision
    assert torch.equal(all_._batch(4, Stream(CPU, 1))[0], RandConv().convolved(images, stream))
    for key in ("data__randaugment", "data__randconv"):
        with pytest.raises(ValueError, match="it is a share, 0 to 1"):
            tiny_trainer(**{key: 1.5})


def test_a_share_of_the_rounds_batches_is_augmented_before_it_is_textured():
    plain, both = tiny_trainer(), tiny_trainer(data__randaugment=1.0, data__randconv=1.0)
    for each in (plain, both):
        each.clock.stage = "round"
    stream = Stream(CPU, 1)
    images, _ = plain._batch(4, stream)
    stream.host.random()  # the decisions, each before what it decides
    images = RandAugment().views(images, stream)
    stream.host.random()
    assert torch.equal(both._batch(4, Stream(CPU, 1))[0], RandConv().convolved(images, stream))


def test_views_are_textured_each_by_itself_and_only_for_the_task_model(monkeypatch):
    textured, plain = tiny_trainer(data__randconv=1.0, data__randconv_of="views"), tiny_trainer()
    for each in (textured, plain):
        each.clock.stage = "round"
    assert torch.equal(textured._batch(4, Stream(CPU, 1))[0], plain._batch(4, Stream(CPU, 1))[0])
    textured, seen = tiny_trainer(data__randconv=1.0, data__randconv_of="views"), []
    monkeypatch.setattr(
        steps, "forward_views", lambda model, views, policy: seen.append(views) or forward_views(model, views, policy)
    )
    made = []
    monkeypatch.setattr(steps, "make_views", lambda *given: made.append(make_views(*given)) or made[-1])
    finish(textured)
    assert len(made[0]) == 2 and len(made[-1]) == 4
    for views, before in zip(seen, made, strict=True):
        changed = [float((one - other).abs().mean()) for one, other in zip(views, before, strict=True)]
        assert min(changed) > 0 and len(set(changed)) == len(changed)
    with pytest.raises(ValueError, match="for method pden"):
        tiny_trainer(method="erm", data__randconv_of="views")


def test_the_round_that_labels_the_source_best_is_kept(monkeypatch, tmp_path):
    figures = iter((0.5, 0.9, 0.7))
    real = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda *given: replace(real(*given), accuracy=next(figures)))
    config = tiny_config(pretrain_batch=4, batch=4, data__source="digits", data__disguised=0, name="kept")
    kept: list[trainer.Trainer] = []
    monkeypatch.setattr(run, "Trainer", lambda *given, **more: kept.append(trainer.Trainer(*given, **more)) or kept[-1])
    outcome = run.train(config, Home.of(), tmp_path, World(0, 1, 0), quiet=True)
    assert outcome.result["selections"]["source-validation"]["round"] == kept[0].best.round == 1
    files = {name: outcome.folder / "model" / f"{name}.safetensors" for name in ("last", "source-validation")}
    saved = {name: load_tensors(file) for name, file in files.items()}
    best = kept[0].best.tensors
    assert all(torch.equal(saved["source-validation"][name], value) for name, value in best.items())
    assert any(not torch.equal(saved["last"][name], value) for name, value in best.items())


def test_the_judge_is_another_model_and_sees_held_out_images(monkeypatch):
    one = tiny_trainer()
    own, judges = (next(each.parameters()) for each in (one.task, one.gatekeeper.judge))
    assert own.shape == judges.shape and not torch.equal(own, judges)
    held = one.validation.images.float() / 255
    assert all((held == image).flatten(1).all(dim=1).any() for image in one.gatekeeper.images)
    inverted = []
    real = gatekeeper.invert_some
    monkeypatch.setattr(gatekeeper, "invert_some", lambda *given: inverted.append(len(given[0])) or real(*given))
    finish(one, 6 + 4)
    assert inverted == [6] * 4  # half of each of the judge's batches


def test_another_attempt_begins_with_another_generator():
    one = tiny_trainer(gate__distance=5.0)
    seen = []
    real = one.new_expansion

    def noted():
        real()
        seen.append(next(one.expansion.generator.parameters()).clone())

    one.new_expansion = noted
    finish(one, 6 + 4 + 4)
    assert len(seen) == 2 and not torch.equal(*seen)


def test_the_best_weights_survive_a_late_resume(tmp_path):
    killed = tiny_trainer()
    finish(killed, 17)
    killed.best.value = 2.0  # no later round is better
    CheckpointStore(tmp_path).save(killed.clock.total, killed.task.state_dict(), capture(killed))
    again = tiny_trainer()
    restore(again, CheckpointStore(tmp_path).latest())
    finish(again)
    assert (again.best.value, again.best.round) == (2.0, killed.best.round) and again.clock.round == 2
    assert all(torch.equal(again.best.tensors[name], value) for name, value in killed.best.tensors.items())


def test_targets_are_measured_as_often_as_asked_for(tmp_path):
    config = tiny_config(
        pretrain_batch=4, batch=4, rounds=3, data__source="digits", data__disguised=0,
        data__targets=("digits-inverted",), data__target_every=2,
    )  # fmt: skip
    outcome = run.train(config, Home.of(), tmp_path, World(0, 1, 0), quiet=True)
    assert ["targets" in each["last"] for each in outcome.result["history"]] == [True, False, True, True]


def test_a_run_in_which_no_domain_passed_says_so(tmp_path, capsys):
    config = tiny_config(
        pretrain_batch=4, batch=4, data__source="digits", data__disguised=0, gate__distance=5.0, gate__retries=0
    )
    outcome = run.train(config, Home.of(), tmp_path, World(0, 1, 0), quiet=True)
    assert outcome.result["domains"] == 0 and "no domain passed the gate" in capsys.readouterr().err


def test_the_source_in_disguise_has_three_operations_on_it(monkeypatch):
    calls = []
    real = disguise.random_operation
    monkeypatch.setattr(disguise, "random_operation", lambda *given: calls.append(given[1]) or real(*given))
    disguise.disguises(tiny_domain(12))
    assert calls == [1.0] * 3


def test_source_and_validation_have_labels_of_one_kind():
    source, held = tiny_domain(), tiny_domain(24, seed=1)
    dense = replace(held, labels=held.labels[:, None, None].expand(-1, 16, 16).contiguous())
    with pytest.raises(UsageError, match="one has labels for pixels and one for images"):
        trainer.Trainer(tiny_config(), source, dense)


@pytest.mark.parametrize("key", ["model__width", "stop__novelty"])
def test_a_setting_that_is_no_number_is_refused(key):
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=key.replace("__", r"\.")):
            tiny_config(**{key: value})


def test_patience_needs_a_gate():
    with pytest.raises(ValueError, match=r"gate\.mode"):
        replace(tiny_config(gate__mode="off"), stop=replace(tiny_config().stop, patience=1))
