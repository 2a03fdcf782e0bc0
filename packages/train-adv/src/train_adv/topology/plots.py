"""Pictures of topology: metrics against natural accuracy, t-SNE pairs, whose neighbours are of which class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from train_adv.topology.metrics import neighbour_confusion
from train_adv.topology.report import Measured

TITLES = {
    "knn_5": "5-NN overlap (Jaccard)",
    "knn_10": "10-NN overlap (Jaccard)",
    "knn_50": "50-NN overlap (Jaccard)",
    "trustworthiness": "trustworthiness",
    "continuity": "continuity",
    "cka": "linear CKA",
    "spearman": "Spearman of cosine distances",
    "l_topo": "L_topo (cosine)",
}


def plot_metrics(found: Sequence[Measured], path: Path) -> None:
    """Each metric against natural accuracy, one point a checkpoint."""
    plt = pyplot()
    names = list(found[0].figures)
    columns = 4
    height = -(-len(names) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(3.4 * columns, 3.0 * height), squeeze=False)
    colours = plt.get_cmap("tab10")
    for axis, name in zip(axes.flat, names, strict=False):
        for index, each in enumerate(found):
            axis.scatter(each.figures[name], 100 * each.natural, color=colours(index % 10), label=each.name, s=36)
        axis.set_xlabel(TITLES.get(name, name))
        axis.set_ylabel("natural accuracy (%)")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(5, len(labels)), frameon=False)
    figure.tight_layout(rect=(0, 0.08 if height > 1 else 0.14, 1, 1))
    save(figure, path)


def plot_tsne(
    found: Sequence[Measured], labels: Tensor, class_names: Sequence[str], path: Path, limit: int = 1000, seed: int = 0
) -> None:
    """t-SNE of every model's features of the same images, coloured by class."""
    from sklearn.manifold import TSNE

    plt = pyplot()
    count = min(limit, len(labels))
    figure, axes = plt.subplots(1, len(found), figsize=(4.4 * len(found), 4.6), squeeze=False)
    colours = plt.get_cmap("tab10" if len(class_names) <= 10 else "tab20")
    for axis, each in zip(axes.flat, found, strict=True):
        unit = each.features[:count] / each.features[:count].norm(dim=1, keepdim=True).clamp_min(1e-12)
        perplexity = min(30.0, (count - 1) / 3)
        where = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed).fit_transform(unit.numpy())
        axis.scatter(where[:, 0], where[:, 1], c=colours(labels[:count].numpy() % colours.N), s=7, linewidths=0)
        axis.set_title(f"{each.name}\nnatural {each.natural:.1%}", fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    if len(class_names) <= 20:
        marks: list[Any] = [
            plt.Line2D([], [], marker="o", linestyle="", color=colours(index % colours.N), label=name)
            for index, name in enumerate(class_names)
        ]
        figure.legend(handles=marks, loc="lower center", ncols=min(10, len(marks)), frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    save(figure, path)


def plot_confusion(found: Sequence[Measured], labels: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Share of each class among the 10 nearest neighbours of each class; the number is what stays in the class."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(found), figsize=(4.4 * len(found), 4.6), squeeze=False)
    picture = None
    for axis, each in zip(axes.flat, found, strict=True):
        shares = neighbour_confusion(each.features, labels, len(class_names)).numpy()
        picture = axis.imshow(shares, cmap="viridis", vmin=0, vmax=1)
        axis.set_title(f"{each.name}\nwithin the class {np.diag(shares).mean():.1%}", fontsize=10)
        if len(class_names) <= 20:
            axis.set_xticks(range(len(class_names)), class_names, rotation=90, fontsize=7)
            axis.set_yticks(range(len(class_names)), class_names, fontsize=7)
        axis.set_xlabel("class of the neighbour")
    axes.flat[0].set_ylabel("class of the sample")
    figure.tight_layout()
    if picture is not None:
        figure.colorbar(picture, ax=axes.ravel().tolist(), shrink=0.7)
    save(figure, path)


def plot_accuracies(groups: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path, title: str) -> None:
    """Bars of mean natural and PGD accuracy of each group, with a dot for every seed; an empty list is left out."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(1.6 + 1.5 * len(groups), 3.8))
    kinds = (("natural", "tab:blue", -0.2), ("PGD-20", "tab:orange", 0.2))
    for place, values in enumerate(groups.values()):
        for (_, colour, shift), seeds in zip(kinds, values, strict=True):
            if not seeds:
                continue
            mean = 100 * sum(seeds) / len(seeds)
            axis.bar(place + shift, mean, 0.38, color=colour, alpha=0.75)
            axis.text(place + shift, 2, f"{mean:.1f}", ha="center", fontsize=9)
            axis.scatter([place + shift] * len(seeds), [100 * each for each in seeds], color="black", s=12, zorder=3)
    marks = [plt.Rectangle((0, 0), 1, 1, color=colour, alpha=0.75) for _, colour, _ in kinds]
    axis.legend(marks, [label for label, _, _ in kinds], frameon=False, loc="upper right", ncols=2)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_ylabel("test accuracy (%)")
    axis.set_ylim(0, 115)
    axis.set_title(title, fontsize=9)
    figure.tight_layout()
    save(figure, path)


def pyplot() -> Any:
    """matplotlib's, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> None:
    """Write a figure whole or not at all, and close it."""
    from expkit.checkpoint import atomic_path

    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
    pyplot().close(figure)
