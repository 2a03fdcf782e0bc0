"""An arm's JSON with the figures that are chosen by."""

from __future__ import annotations


def result(arm: str, natural: float, apgd: float, weight=0.0, kernel="cosine", rate=0.1, beta=None) -> dict:
    figures = {"natural": {"accuracy": natural}, "apgd": {"accuracy": apgd}}
    config = {"topology.weight": weight, "topology.kernel": kernel, "optimizer.lr": rate, "beta": beta}
    return {"arm": arm, "evaluation": {"last": figures}, "config": config}
