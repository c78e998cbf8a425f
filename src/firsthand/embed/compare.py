"""Paired comparison of embedding models over tasks: which differences are more than chance, for each type of task."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np


def compare_designs(
    scores: Mapping[str, Mapping[str, float]],
    task_types: Mapping[str, str],
    baseline: str,
    alpha: float = 0.05,
) -> list[dict[str, Any]]:
    """Wilcoxon's signed-rank test of each model against one, paired by task, for each type of task.

    Any two runs will do: `compare_designs({"before": {...}, "after": {...}}, task_types, "before")`. A higher score is better;
    hand in the negative of an error.

    Args:
        scores: name of the model -> task -> score, finite. All models have the same tasks.
        task_types: task -> its type (`"retrieval"`, `"clustering"`, ...). Tasks that have no score may be there too.
        baseline: the model that all others are compared with.
        alpha: level at which a difference counts as significant, in (0, 1).

    Returns:
        A row for each type, in the order of the tasks, and in each a row for each other model:
        `design`, `type`, `n` (tasks), `median_diff` (median over tasks of its score less the baseline's), `win`, `tie` and `loss`
        (in how many tasks it is above, at or below the baseline), `p` (two-sided; 1 where all tasks tie), `p_holm` (p after
        Holm's correction for the number of models compared within this type) and `significant` (whether `p_holm` is below
        `alpha`; `median_diff` says in which direction).

    Warns:
        UserWarning: a type has so few tasks that no p could be below `alpha`: fewer than 6 at 0.05.

    Raises:
        ValueError: fewer than two models, no task, an unknown baseline, models with different tasks, a task without a type, a
            score that is not finite, or `alpha` out of range.

    Source:
        Tang and Yang, "Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?", 2024, arXiv
        2409.02727, compares its designs by this test over the tasks of MTEB (known to us at second hand). Two-sided, without the
        tasks that tie (`scipy.stats.wilcoxon(zero_method="wilcox")`), Holm's correction, and each type by itself: our choice.
    """
    from scipy.stats import wilcoxon

    _check(scores, task_types, baseline, alpha)
    of_type: dict[str, list[str]] = {}
    for task in scores[baseline]:
        of_type.setdefault(task_types[task], []).append(task)

    rows: list[dict[str, Any]] = []
    for kind, tasks in of_type.items():
        if 2.0 ** (1 - len(tasks)) >= alpha:
            warnings.warn(
                f"{len(tasks)} tasks of type {kind!r}: the smallest p there can be is {2.0 ** (1 - len(tasks)):g}, "
                f"so that no difference can be significant at {alpha:g}",
                stacklevel=2,
            )
        family = []
        for design in scores:
            if design == baseline:
                continue
            difference = np.array([float(scores[design][task]) - float(scores[baseline][task]) for task in tasks])
            moved = bool(difference.any())
            row = {
                "design": design,
                "type": kind,
                "n": len(tasks),
                "median_diff": float(np.median(difference)),
                "win": int((difference > 0).sum()),
                "tie": int((difference == 0).sum()),
                "loss": int((difference < 0).sum()),
                "p": float(wilcoxon(difference, zero_method="wilcox").pvalue) if moved else 1.0,
            }
            family.append(row)
        for row, corrected in zip(family, _holm([row["p"] for row in family]), strict=True):
            rows.append(row | {"p_holm": corrected, "significant": corrected < alpha})
    return rows


def _holm(p: list[float]) -> list[float]:
    """Holm's step-down correction: the k-th smallest of m times m - k + 1, never below the one before it, at most 1."""
    corrected, floor = [0.0] * len(p), 0.0
    for rank, index in enumerate(np.argsort(p, kind="stable")):
        floor = max(floor, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = floor
    return corrected


def _check(scores: Mapping[str, Mapping[str, float]], task_types: Mapping[str, str], baseline: str, alpha: float) -> None:
    if len(scores) < 2:
        raise ValueError(f"scores must hold at least 2 models, got {', '.join(scores) or 'none'}")
    if baseline not in scores:
        raise ValueError(f"baseline must be one of {', '.join(scores)}, got {baseline!r}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha}")
    tasks = scores[baseline]
    if not tasks:
        raise ValueError("scores must hold at least one task, got none")
    for design, own in scores.items():
        if differing := ", ".join(sorted(own.keys() ^ tasks.keys())):
            raise ValueError(f"scores must have the same tasks for all models; {design!r} and {baseline!r} differ in {differing}")
        for task, score in own.items():
            if not math.isfinite(score):
                raise ValueError(f"scores must be finite, got {score} for {design!r} on {task!r}")
    if untyped := [task for task in tasks if task not in task_types]:
        raise ValueError(f"task_types must name the type of every task, got none for {', '.join(untyped)}")
