"""Does keeping attention spread out help an attention-MIL model that has few bags to learn from?"""

from collections.abc import Callable
from functools import partial
from math import log10
from typing import Any

import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from firsthand import Study, Trial, beats, holds
from firsthand.testbeds import bags
from firsthand.vision.aem import aem_loss, attention_entropy
from firsthand.vision.mil import AttentionMIL

# Each arm trains three models and keeps the one that is best on the validation bags. Its options:
RESTARTS = ({}, {}, {})  # the baseline has nothing to choose but its initial weights, in which the three runs of every arm differ
REGULARISERS = ({"dropout": 0.5}, {"dropout": 0.75}, {"dropout": 0.5, "weight_decay": 1.0})
WEIGHTS = ({"weight": 1e-3}, {"weight": 1e-2}, {"weight": 1e-1})

SEARCHED = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # the entropy weights a user would try, and the ones nobody should
TOO_LARGE = (1.0, 10.0)


def prepare(trial: Trial) -> bags.World:
    # One to sixteen targets among 80: with one to three, the baseline learns nothing from 40 bags, and no arm can be told apart.
    sizes = {"train": 12, "val": 12, "test": 20} if trial.smoke else {"train": 40, "val": 80, "test": 300}
    return bags.digit_bags(trial.rng, **sizes, size=80, most=16, noise=0.3, device=trial.device)


def train(
    trial: Trial,
    world: bags.World,
    run: int,
    *,
    weight: float = 0.0,
    top_k: int | None = None,
    dropout: float = 0.25,
    weight_decay: float = 1e-5,
    attend: bool = True,
) -> tuple[float, AttentionMIL]:
    """One model, and its validation AUROC. The same run of two arms has the same initial weights and order of bags."""

    def loss(model: nn.Module, features: Tensor, labels: Tensor) -> Tensor:
        logits, scores = model(features, return_att=True)
        return binary_cross_entropy_with_logits(logits, labels) + weight * aem_loss(scores, top_k=top_k)

    seed = 1000 * trial.seed + run
    torch.manual_seed(seed)
    model = AttentionMIL(64, hidden=64, att_dim=32, dropout=dropout).to(trial.device)
    if not attend:
        nn.init.zeros_(model.pool.score.weight)
        model.pool.requires_grad_(False)
    trial.count(model)
    auroc = bags.fit(
        model,
        world,
        loss,
        epochs=2 if trial.smoke else 60,
        lr=2e-3,
        weight_decay=weight_decay,
        generator=torch.Generator().manual_seed(seed),
        trial=trial,
        label=f"run {run}",
    )
    return auroc, model


def score(model: nn.Module, test: bags.Bags) -> dict[str, float]:
    logits, scores = bags.predict(model, test)
    losses = binary_cross_entropy_with_logits(logits, test.labels, reduction="none")
    entropy = attention_entropy(scores, normalized=True)
    return bags.score_logits(logits, test) | {
        "entropy": entropy.mean().item(),
        "instance_auroc": bags.instance_auroc(scores, test),
        "concentration~loss": _correlation(pearsonr, (-entropy).tolist(), losses.tolist()),  # over bags
    }


def choose(trial: Trial, world: bags.World, options: tuple[dict[str, Any], ...], **shared: Any) -> dict[str, float]:
    runs = [train(trial, world, run, **option, **shared) for run, option in enumerate(options)]
    _, model = max(runs, key=lambda run: run[0])
    return score(model, world.test)


def mean_pooling(trial: Trial, world: bags.World) -> dict[str, float]:
    metrics = choose(trial, world, RESTARTS, attend=False)
    for weight in SEARCHED + TOO_LARGE:  # a reference line under the curve of "AEM over weights"
        trial.record(_axis(weight), auroc=metrics["auroc"], entropy=metrics["entropy"])
    return metrics


def over_weights(trial: Trial, world: bags.World) -> dict[str, float]:
    """The whole curve, each point one run from the same initial weights."""
    points = {}
    for weight in SEARCHED + TOO_LARGE:
        points[weight] = score(train(trial, world, 0, weight=weight)[1], world.test)
        trial.record(_axis(weight), auroc=points[weight]["auroc"], entropy=points[weight]["entropy"])
    entropies, aurocs = ([points[weight][metric] for weight in SEARCHED] for metric in ("entropy", "auroc"))
    return {
        "entropy~auroc": _correlation(spearmanr, entropies, aurocs),
        "auroc at 0": points[0.0]["auroc"],
        "auroc at 10": points[10.0]["auroc"],
    }


def _correlation(measure: Callable[..., Any], xs: list[float], ys: list[float]) -> float:
    """0 where either side is constant and no correlation is defined (mean pooling has one entropy)."""
    return float(measure(xs, ys).statistic) if len(set(xs)) > 1 and len(set(ys)) > 1 else 0.0


def _axis(weight: float) -> float:
    """log₁₀ of the weight; 0 stands one decade left of the smallest."""
    return log10(weight) if weight else -4.0


study = Study(
    method="aem",
    prepare=prepare,
    arms={
        "ABMIL": partial(choose, options=RESTARTS),
        "tuned regularisation": partial(choose, options=REGULARISERS),
        "AEM": partial(choose, options=WEIGHTS),
        "AEM top-20": partial(choose, options=WEIGHTS, top_k=20),
        "AEM over weights": over_weights,
        "mean pooling": mean_pooling,
    },
    claim=beats("AEM", "ABMIL", on="auroc"),
    also=[
        beats("AEM", "ABMIL", on="f1"),
        beats("AEM", "tuned regularisation", on="auroc"),
        beats("AEM top-20", "ABMIL", on="auroc"),
        holds(
            "over the weights a user would try, more entropy goes with more AUROC (Spearman)",
            lambda arms: arms["AEM over weights"]["entropy~auroc"],
            above=0.0,
        ),
        holds(
            "without AEM, bags with concentrated attention have the higher loss (Pearson)",
            lambda arms: arms["ABMIL"]["concentration~loss"],
            above=0.0,
        ),
        holds(
            "a weight of 10 costs AUROC against a weight of 0",
            lambda arms: arms["AEM over weights"]["auroc at 0"] - arms["AEM over weights"]["auroc at 10"],
            above=0.0,
        ),
    ],
    equal="architecture, epochs, learning rate, three runs to choose from; run by run, initial weights and order of bags",
    seeds=30,
    data=("digits",),
)
