"""Evaluation: stronger attacks leave less, verdicts are fp32, a killed one goes on, figures have intervals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from expkit.errors import UsageError
from tiny_models import tiny_batch, tiny_net
from train_adv.attacks.apgd import APGD
from train_adv.attacks.gradient import right
from train_adv.attacks.pgd import PGD
from train_adv.data.dataset import Augment, DataSet, Resident
from train_adv.evaluation import evaluate as module
from train_adv.evaluation.attacks import Evaluator
from train_adv.evaluation.evaluate import Settings, differences, evaluate, markdown, row
from train_adv.evaluation.statistics import accuracy, paired_difference, wilson
from train_adv.models.checkpoint import save_model
from train_adv.models.classifier import Classifier, ModelSpec

CPU = torch.device("cpu")
SETTINGS = Settings(0.06, size=8)


def data(count: int = 40) -> DataSet:
    images, labels = tiny_batch(count, classes=5, seed=8)
    split = Resident((images * 255).round().to(torch.uint8), labels)
    return DataSet("tiny", tuple("abcde"), split, split, Augment(0, False))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = tiny_net(classes=5, seed=3)
    images, labels = tiny_batch(256, classes=5, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(PGD(0.02, 0.02, 1)(model, images, labels)), labels).backward()
        optimizer.step()
    spec = ModelSpec("custom", tuple("abcde"), (3, 8, 8), (0.0,) * 3, (1.0,) * 3)
    classifier = Classifier(model, spec).eval()
    path = tmp_path_factory.mktemp("run") / "best.safetensors"
    save_model(path, classifier)
    return path, classifier


def test_stronger_attacks_leave_less(checkpoint, tmp_path):
    path, model = checkpoint
    names = ["natural", "fgsm", "pgd20", "cw", "apgd-ce", "apgd"]
    model.train()  # as a caller in the middle of training has it
    before = model.backbone[1].running_mean.clone()
    found = evaluate(path, data(), names, SETTINGS, device=CPU, work=tmp_path, model=model)
    assert model.training and torch.equal(model.backbone[1].running_mean, before)
    model.eval()
    left = {name: int(right.sum()) for name, right in found.items()}
    assert left["natural"] >= left["fgsm"] >= left["pgd20"] >= left["apgd-ce"] >= left["apgd"] > 0
    assert left["apgd"] < left["natural"]
    assert not (found["apgd"] & ~found["natural"]).any() and not (found["apgd"] & ~found["apgd-ce"]).any()


def test_a_killed_evaluation_goes_on_to_the_same_answers(checkpoint, tmp_path, monkeypatch):
    path, model = checkpoint
    small = replace(SETTINGS, size=40)  # on a CPU a chunk each: of 40 and of 32
    whole = evaluate(path, data(72), ["pgd20"], small, device=CPU, work=tmp_path / "a", model=model)
    asked = []
    real = Evaluator.survivors

    def dying(self, name, images, labels, chunk):
        asked.append(chunk)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(self, name, images, labels, chunk)

    monkeypatch.setattr(Evaluator, "survivors", dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate(path, data(72), ["pgd20"], small, device=CPU, work=tmp_path / "b", model=model)
    again = evaluate(path, data(72), ["pgd20"], small, device=CPU, work=tmp_path / "b", model=model)
    assert asked == [0, 1, 1] and torch.equal(again["pgd20"], whole["pgd20"])


def test_chunks_of_another_size_share_no_answers(checkpoint, tmp_path, monkeypatch):
    path, model = checkpoint
    small = replace(SETTINGS, size=40)
    evaluate(path, data(80), ["pgd20"], small, device=CPU, work=tmp_path, model=model)  # chunks of 40
    monkeypatch.setattr(module, "_chunk_size", lambda *_: 20)
    asked = []
    real = Evaluator.survivors
    monkeypatch.setattr(Evaluator, "survivors", lambda self, *rest: asked.append(rest[3]) or real(self, *rest))
    evaluate(path, data(40), ["pgd20"], small, device=CPU, work=tmp_path, model=model)
    assert asked == [0, 1]


def test_other_settings_share_no_answers(checkpoint, tmp_path):
    path, model = checkpoint
    weak = evaluate(path, data(), ["fgsm"], replace(SETTINGS, epsilon=0.0), device=CPU, work=tmp_path, model=model)
    strong = evaluate(path, data(), ["fgsm"], replace(SETTINGS, epsilon=0.3), device=CPU, work=tmp_path, model=model)
    assert int(strong["fgsm"].sum()) < int(weak["fgsm"].sum())


def test_attacks_in_bf16_are_judged_in_fp32(checkpoint, tmp_path):
    path, model = checkpoint
    found = [
        evaluate(path, data(), ["pgd20"], replace(SETTINGS, precision=p), device=CPU, work=tmp_path, model=model)
        for p in ("fp32", "bf16")
    ]
    assert abs(int(found[0]["pgd20"].sum()) - int(found[1]["pgd20"].sum())) <= 2


def test_autoattack_is_the_authors_own_and_agrees_with_apgd(checkpoint, tmp_path):
    pytest.importorskip("pyautoattack")
    path, model = checkpoint
    settings = replace(SETTINGS, autoattack_limit=8)
    found = evaluate(path, data(), ["apgd", "autoattack"], settings, device=CPU, work=tmp_path, model=model)
    assert len(found["autoattack"]) == 8
    assert abs(int(found["apgd"][:8].sum()) - int(found["autoattack"].sum())) <= 1


def test_both_candidates_of_an_attack_are_judged(checkpoint):
    """The last wrong point may be wrong by rounding only: the point of the highest loss counts too."""
    _, model = checkpoint
    images, labels = tiny_batch(8, classes=5, seed=8)
    labels = model(images).argmax(1)
    attack = APGD(0.3, 10)
    broken = attack(model, images, labels, generator=torch.Generator().manual_seed(0))
    fell = model(broken).argmax(1) != labels
    assert fell.any()
    evaluator = Evaluator(model, 0.3, "Linf", 8, CPU)

    def run(points, images, labels):
        return torch.stack([broken, images])  # the last one is right again

    standing = torch.ones(8, dtype=torch.bool)
    left = evaluator._batched("made", run, attack.draw, images, labels, standing, torch.Generator().manual_seed(0))
    assert torch.equal(left, ~fell)


def test_other_images_of_the_same_name_share_no_answers(checkpoint, tmp_path):
    path, model = checkpoint
    one = data()
    dark = replace(one, test=Resident(one.test.images // 9, one.test.labels))
    found = [
        evaluate(path, each, ["natural"], SETTINGS, device=CPU, work=tmp_path, model=model) for each in (one, dark)
    ]
    assert not torch.equal(found[0]["natural"], found[1]["natural"])
    swapped = Resident(one.test.images, one.test.labels.flip(0))
    assert len({split.fingerprint() for split in (one.test, dark.test, swapped)}) == 3


def test_wilson_intervals_are_the_known_ones():
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-5)
    assert wilson(0, 0) == (0.0, 1.0) and wilson(0, 50)[0] == 0.0


def test_paired_differences_are_tighter_than_unpaired_ones():
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(1000, generator=generator) < 0.5
    second = first.clone()
    second[:20] = ~second[:20]
    found = paired_difference([(first, second)])
    expected = (first.double() - second.double()).mean()
    assert found["difference"] == pytest.approx(float(expected))
    assert found["interval"][1] - found["interval"][0] < 0.02 < 2 * 1.96 * math.sqrt(0.25 / 1000)
    assert paired_difference([(first, second), (first, first)])["pairs"][1] == 0.0


def test_rows_and_tables_have_every_class(checkpoint, tmp_path):
    path, model = checkpoint
    found = evaluate(path, data(), ["natural", "fgsm"], SETTINGS, device=CPU, work=tmp_path, model=model)
    made = row("run", found, data())
    assert len(made["attacks"]["fgsm"]["per_class"]) == 5
    assert sum(each["images"] for each in made["attacks"]["fgsm"]["per_class"]) == 40
    text = markdown([made], {"run - run": differences(found, found)})
    assert "| run |" in text and "| run - run | +0.00 [-" in text
    fewer = {"natural": found["natural"], "fgsm": found["fgsm"][:10]}
    assert "| natural (40 images) | fgsm (10 images) |" in markdown([row("run", fewer, data())])
    assert accuracy(torch.tensor([True]), torch.tensor([0]), 2)["per_class"][1]["accuracy"] is None


def test_a_model_that_is_wrong_everywhere_has_nothing_to_attack(checkpoint, tmp_path):
    path, model = checkpoint
    images = data()
    wrong = replace(images, test=Resident(images.test.images, (model(images.test.images / 255).argmax(1) + 1) % 5))
    found = evaluate(path, wrong, ["pgd20", "apgd"], SETTINGS, device=CPU, work=tmp_path, model=model)
    assert not found["pgd20"].any() and not found["apgd"].any()


def test_logits_that_are_no_numbers_answer_nothing():
    logits = torch.tensor([[float("nan"), 0.0], [1.0, 0.0], [float("inf"), 0.0]])
    assert right(logits, torch.zeros(3, dtype=torch.long)).tolist() == [False, True, False]


def test_other_classes_of_the_same_number_are_refused(checkpoint, tmp_path):
    path, model = checkpoint
    renamed = replace(data(), class_names=("z", *data().class_names[1:]))
    with pytest.raises(UsageError, match='"z"'):
        module.require_fit(model, renamed, path)
    module.require_fit(model, replace(renamed, name="FILE.npz#a,b,c,d"), path)  # arrays name none


def test_wrong_use_is_said(checkpoint, tmp_path):
    path, model = checkpoint
    with pytest.raises(UsageError, match="pgd20"):
        evaluate(path, data(), ["pgd"], SETTINGS, device=CPU, work=tmp_path, model=model)
    with pytest.raises(UsageError, match="8/255"):
        Settings(8)
    other = replace(data(), class_names=tuple("abcdef"))
    with pytest.raises(UsageError, match="5 classes"):
        module.require_fit(model, other, path)
