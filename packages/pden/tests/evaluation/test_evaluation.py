"""Scores, targets and tables."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from expkit.errors import UsageError
from pden.data import Domain, Home
from pden.evaluation import table
from pden.evaluation.accuracy import evaluate
from pden.evaluation.chart import save_bars, save_curve
from pden.evaluation.targets import absent_note, load_targets, with_classes
from pden.models import TaskModel
from pden.training.history import selections
from tiny_domains import tiny_dense, tiny_domain

HOME = Home((), Path("nowhere"), download=False)


class Fixed(TaskModel):
    """Says what it is told, image by image."""

    def __init__(self, answers: torch.Tensor, classes: int) -> None:
        super().__init__(torch.nn.Flatten(), 1, classes, embedding=2)
        self.answers, self.start = answers, 0

    def forward(self, images):
        part = self.answers[self.start : self.start + len(images)]
        self.start += len(images)
        return torch.nn.functional.one_hot(part, self.classes).movedim(-1, 1).float()


def test_accuracy_is_counted_by_class_over_those_that_occur():
    domain = tiny_domain(6)
    domain = Domain("d", domain.images, torch.tensor([0, 0, 0, 1, 1, 1]), ("a", "b", "c"))
    score = evaluate(Fixed(torch.tensor([0, 0, 2, 1, 1, 1]), 3), domain)
    assert score.accuracy == pytest.approx(5 / 6) and score.value == score.accuracy and score.miou is None
    assert score.per_class == {"a": pytest.approx(2 / 3), "b": 1.0} and score.absent == ("c",)


def test_mean_intersection_over_union_leaves_uncounted_pixels_out():
    domain = tiny_dense(3)
    answers = domain.labels.clone()
    answers[answers == 255] = 1
    answers[0, :, 12:] = 0
    counted, union, right = domain.labels != 255, [], []
    for label in (0, 1):
        said, true = (answers == label) & counted, (domain.labels == label) & counted
        union.append((said | true).sum())
        right.append((said & true).sum())
    score = evaluate(Fixed(answers, 2), domain)
    assert score.miou == pytest.approx(float(sum(r / u for r, u in zip(right, union, strict=True)) / 2))
    assert score.accuracy == pytest.approx(float(((answers == domain.labels) & counted).sum() / counted.sum()))


def test_evaluation_leaves_the_models_mode():
    model = Fixed(torch.zeros(6, dtype=torch.int64), 3)
    evaluate(model.train(), tiny_domain(6))
    assert model.training


def test_classes_are_matched_by_name():
    domain = Domain("d", torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 0]), ("dog", "cat"))
    assert with_classes(domain, ("cat", "cow", "dog")).labels.tolist() == [2, 0, 2]
    assert "no image of cow" in absent_note(with_classes(domain, ("cat", "cow", "dog")))
    with pytest.raises(UsageError, match='class "dog", which the source has not'):
        with_classes(domain, ("cat", "cow"))


def test_targets_are_not_the_source_and_have_names_of_their_own():
    classes = tuple("0123456789")
    with pytest.raises(UsageError, match='target "mine" is the source'):
        load_targets(["mine=digits"], ["digits"], classes, HOME, 32, 3)
    with pytest.raises(UsageError, match='two targets are called "a"'):
        load_targets(["a=digits-test", "a=digits-thick"], ["digits"], classes, HOME, 32, 3)
    with pytest.raises(UsageError, match='target "digits-test" has one label for each image'):
        load_targets(["digits-test"], ["digits"], classes, HOME, 32, 3, dense=True)
    (found,) = load_targets(["digits-test"], ["digits"], classes, HOME, 16, 3)
    assert found.images.shape == (597, 3, 16, 16)


def history() -> list[dict]:
    def entry(number, validation, average, averaged):
        last = {"validation": validation, "targets": {"t": average}, "average": average}
        return {"round": number, "last": last, "averaged": {**last, "targets": {"t": averaged}, "average": averaged}}

    return [entry(0, 0.9, 0.3, 0.3), entry(1, 0.99, 0.7, 0.5), entry(2, 0.98, 0.6, 0.65)]


def test_selections_are_named_and_only_the_oracle_looks_at_targets():
    found = selections(history(), best_round=1)
    assert {name: each["average"] for name, each in found.items()} == {
        "last": 0.6,
        "averaged": 0.65,
        "source-validation": 0.7,
        "oracle": 0.7,
    }
    assert found["last"]["round"] == 2 and found["oracle"]["round"] == 1


def result(name: str, seed: int, first: float, second: float) -> dict:
    last = {
        "targets": {"usps": first, "svhn_c": second},
        "average": (first + second) / 2,
        "validation": 0.9,
        "round": 1,
    }
    return {"name": name, "seed": seed, "selections": {"last": last}}


def rows() -> dict:
    runs = [result("erm-seed0", 0, 0.5, 0.3), result("erm-seed1", 1, 0.6, 0.3), result("pden", 0, 0.8, 0.7)]
    return table.summarise(table.group(runs), "last")


def test_seeds_become_a_mean_and_a_spread():
    found = rows()
    assert list(found) == ["erm", "pden"]
    assert found["erm"]["usps"] == (pytest.approx(0.55), pytest.approx(0.0707, abs=1e-4))
    assert found["pden"]["average"] == (0.75, 0.0)
    assert table.columns(found) == ["usps", "svhn_c", "average"]


def test_a_label_is_of_runs_that_differ_in_their_seed_alone():
    def made(seed: int, config: str) -> dict:
        return {"name": f"a-seed{seed}", "seed": seed, "config": f'name = "a-seed{seed}"\nseed = {seed}\n{config}'}

    one = 'rounds = 2\n\n[model]\nname = "digits"\n'
    assert list(table.group([made(0, one), made(1, one)])) == ["a"]
    default = one + "\n[data]\nrandconv = 0.0\n"  # a key that came later
    assert list(table.group([made(0, one), made(1, default)])) == ["a"]
    for other in (one.replace("2", "3"), one.replace("digits", "wrn-16-4"), default.replace("0.0", "0.5"), "damaged ="):
        with pytest.raises(UsageError, match="differ in more than their seed"):
            table.group([made(0, one), made(1, other)])


def test_tables_in_three_forms():
    assert table.markdown(rows()).splitlines()[2] == "| erm | 55.00 ± 7.07 | 30.00 ± 0.00 | 42.50 ± 3.54 |"
    seeds = {"erm": [0, 1], "pden": [0]}
    lines = table.csv(rows(), "averaged", seeds).splitlines()
    assert lines[0] == "method,target,mean,std,selection,seeds"
    assert "erm,svhn_c,30.0000,0.0000,averaged,2" in lines and "pden,usps,80.0000,0.0000,averaged,1" in lines
    latex = table.latex(rows())
    assert r"svhn\_c" in latex and r"\textbf{80.00}" in latex and r"\textbf{55.00}" not in latex
    with pytest.raises(UsageError, match=r"\.md, \.csv or \.tex"):
        table.render(rows(), Path("table.doc"), "last", seeds, [])


def test_a_csv_reader_reads_any_label_back():
    text = table.csv({'a "b", c': {"usps": (0.5, 0.0)}}, "last", {'a "b", c': [0]})
    assert [row["method"] for row in csv.DictReader(text.splitlines())] == ['a "b", c']


def test_written_tables_say_what_the_console_does():
    seeds, notes = {"erm": [0, 1], "pden": [0]}, ["note: digits rendered from fonts, 100 % a stand-in"]
    told = ["selection: averaged; average over 2 targets; seeds: erm [0, 1]; pden [0]", *notes]
    below = table.render(rows(), Path("t.md"), "averaged", seeds, notes).splitlines()
    assert [line for line in below if line and not line.startswith("|")] == told
    above = table.render(rows(), Path("t.tex"), "averaged", seeds, notes).splitlines()
    assert above[:2] == [f"% {each}" for each in told] and above[2].startswith(r"\begin{tabular}")


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no finished run"):
        table.read_result(tmp_path)
    (tmp_path / "result.json").write_text("[]")
    with pytest.raises(UsageError, match="no figures of a run"):
        table.read_result(tmp_path)
    (tmp_path / "result.json").write_text(
        json.dumps({"name": "x", "seed": 0, "selections": {"last": {"validation": 1.0}}})
    )
    with pytest.raises(UsageError, match="measured on no target"):
        table.read_result(tmp_path)
    with pytest.raises(UsageError, match='no figures for selection "averaged"'):
        table.summarise(table.group([result("a", 0, 0.1, 0.2)]), "averaged")


def test_charts_are_pictures(tmp_path):
    save_curve(history(), tmp_path / "curve.png", title="t")
    save_bars(rows(), tmp_path / "bars.png", title="t")
    for name in ("curve.png", "bars.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_round_that_only_its_last_weights_were_measured_in_is_drawn(tmp_path):
    entries = history()
    entries[1]["averaged"] = {"validation": 0.5}  # as of the round that the source chose, without target_every
    save_curve(entries, tmp_path / "curve.png", title="t")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_target_that_a_row_lacks_has_no_bar(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **k: drawn.append(figure.axes[0]) or save(figure, *a, **k)
    )
    save_bars({"a": {"usps": (0.5, 0.1)}, "b": {"svhn": (0.4, 0.1)}}, tmp_path / "bars.png", title="t")
    (axes,) = drawn
    assert [math.isnan(bar.get_height()) for bar in axes.patches] == [False, True, True, False]
    assert [text.get_text() for text in axes.texts] == ["50", "", "", "40"]
    assert axes.get_xlim() == (-0.5, 1.5)


def test_the_curve_shows_the_disguised_source_where_it_was_measured(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **k: drawn.append(figure.axes[0].lines) or save(figure, *a, **k)
    )
    plain = history()
    save_curve(plain, tmp_path / "plain.png", title="t")
    shown = [{**each, "last": {**each["last"], "disguised": 0.25}} for each in plain]
    save_curve(shown, tmp_path / "shown.png", title="t")
    without, line = ([one for one in lines if one.get_label() == "source, in disguise"] for lines in drawn)
    assert without == [] and list(line[0].get_ydata()) == [25.0] * len(plain)


def test_one_seed_shows_no_spread():
    one = {"a": {"usps": (0.5, 0.0), "average": (0.5, 0.0)}, "b": {"usps": (0.4, 0.01), "average": (0.4, 0.01)}}
    assert "| a | 50.00 | 50.00 |" in table.markdown(one) and "| b | 40.00 ± 1.00 |" in table.markdown(one)
    assert r"a & \textbf{50.00} & \textbf{50.00} \\" in table.latex(one) and r"40.00 $\pm$ 1.00" in table.latex(one)
