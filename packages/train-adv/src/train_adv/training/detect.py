"""Overfitting that a validation split shows and a training loss hides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from train_adv.training.config import GuardConfig


def catastrophic_overfitting(history: Sequence[Mapping[str, float]], config: GuardConfig) -> str | None:
    """A warning where PGD accuracy has collapsed from one validation to the next (Wong et al. 2020), else None.

    Args:
        history: one entry a validation, with "epoch", "train_robust" and "val_pgd".
    """
    if len(history) < 2:
        return None
    best = max(entry["val_pgd"] for entry in history[:-1])
    now = history[-1]
    if best > 0 and best - now["val_pgd"] > config.drop * best and now["train_robust"] > now["val_pgd"]:
        return (
            f"catastrophic overfitting at epoch {now['epoch']:.0f}: PGD accuracy fell from {best:.1%} to "
            f"{now['val_pgd']:.1%} while {now['train_robust']:.1%} of training attacks fail; use more attack steps, "
            "n-fgsm instead of fgsm-rs, or a smaller epsilon"
        )
    return None


def robust_overfitting(history: Sequence[Mapping[str, float]], config: GuardConfig) -> str | None:
    """A warning where PGD accuracy stays below its best while training accuracy rises (Rice et al. 2020), else None."""
    if len(history) <= config.patience:
        return None
    best = max(history, key=lambda entry: entry["val_pgd"])
    recent = history[-config.patience :]
    below = all(entry["val_pgd"] < best["val_pgd"] - config.decline for entry in recent)
    if below and recent[-1]["train_robust"] > best["train_robust"]:
        return (
            f"robust overfitting: PGD accuracy {recent[-1]['val_pgd']:.1%} at epoch {recent[-1]['epoch']:.0f}, best "
            f"{best['val_pgd']:.1%} at epoch {best['epoch']:.0f}; use the best checkpoint, weight averaging or AWP"
        )
    return None
