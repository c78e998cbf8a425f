"""Are models of any depth, begun as a line through two layers' weights, better than from scratch and than from copied layers?

A family of ViTs on digits, of 2, 4, 6 and 8 layers, is wanted. TLEG distils one model of 6 layers whose weights are linear in the
place of a layer, expands it to all depths and trains each on the task for three epochs. Beside it: models from scratch with the
same three epochs, and with as much training as TLEG needs in all, on the labels of the ancestry and the task; a model of 6 layers
that was distilled the same way with layers of its own, which are copied (the first ones, or evenly spaced ones) or fitted by
a line afterwards; and pre-training and fine-tuning of each depth by itself, the costly way. The teacher is given, as in the
paper: its training is nobody's cost.

The claim has two halves and so is the smaller of two leads: over scratch at the depth where it is smallest, and, in mean
accuracy over depths, over the better way to copy layers, which stores three times as many of them.

Cost is in steps × blocks: one block, forward and backward, for one batch.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from firsthand import Study, Trial, beats, holds
from firsthand.distill.soft import soft_distillation_loss
from firsthand.testbeds import learngene, vit
from firsthand.weights.layers import layer_weights, with_layer_weights
from firsthand.weights.tleg import LinearLearngene, fit_linear_learngene

DEPTHS = (2, 4, 6, 8)
ANCESTOR = 6  # layers of the model that is distilled
# Learning rates: the best of two or three each, on seed 1; of a distillation, by what its descendants come to.
DISTILLATION, TUNING, SCRATCH = 2e-3, 1e-3, 1e-3
GENTLE = 1e-3  # distillation of each depth by itself

World = learngene.World
Prepared = tuple[World, vit.MeanPooledViT]
Metrics = dict[str, float]


def epochs(trial: Trial) -> tuple[int, int]:
    """Of distillation and of fine-tuning."""
    return (1, 1) if trial.smoke else (24, 3)


def prepare(trial: Trial) -> Prepared:
    world = learngene.world(trial)
    ancestor = vit.vit(trial.generator, ANCESTOR)
    distil(ancestor, ANCESTOR, world, trial)
    return world, ancestor


def distil(model: Any, layers: int, world: World, trial: Trial, lr: float = DISTILLATION) -> int:
    passes = epochs(trial)[0]
    return learngene.distil(model, layers, world, soft_distillation_loss, epochs=passes, lr=lr, trial=trial)


def fine_tune(models: Mapping[int, Any], world: World, trial: Trial, *, lr: float, spent: int, kept: int) -> Metrics:
    passes = epochs(trial)[1]
    return learngene.fine_tune(models, world.task, world, epochs=passes, lr=lr, trial=trial, spent=spent, kept=kept)


def scratch(trial: Trial, prepared: Prepared) -> Metrics:
    models = {depth: vit.vit(trial.generator, depth) for depth in DEPTHS}
    return fine_tune(models, prepared[0], trial, lr=SCRATCH, spent=0, kept=0)


def scratch_at_equal_cost(trial: Trial, prepared: Prepared) -> Metrics:
    """As much training in all as TLEG, rounded up to whole epochs, and all labels that there are."""
    world, _ = prepared
    before, after = epochs(trial)
    cost = learngene.steps(world.ancestry, before) * ANCESTOR + learngene.steps(world.task, after) * sum(DEPTHS)
    passes = math.ceil(cost / (learngene.steps(world.labelled, 1) * sum(DEPTHS)))
    models = {depth: vit.vit(trial.generator, depth) for depth in DEPTHS}
    return learngene.fine_tune(models, world.labelled, world, epochs=passes, lr=SCRATCH, trial=trial)


def tleg(trial: Trial, prepared: Prepared) -> Metrics:
    world, _ = prepared
    gene = LinearLearngene(vit.vit(trial.generator, ANCESTOR), generator=trial.generator)
    spent = distil(gene, ANCESTOR, world, trial)
    models = {depth: gene.expand(depth) for depth in DEPTHS}
    return fine_tune(models, world, trial, lr=TUNING, spent=spent, kept=learngene.stored(gene))


def copied(trial: Trial, prepared: Prepared, source: Callable[[int, int], int]) -> Metrics:
    """Layers of the ancestor: `source` says which, from the number of a layer and the depth wanted."""
    world, ancestor = prepared
    layers = layer_weights(ancestor)
    models = {d: with_layer_weights(ancestor, [layers[source(layer, d)] for layer in range(d)]) for d in DEPTHS}
    return fine_tune(models, world, trial, lr=TUNING, spent=ancestral_cost(world, trial), kept=learngene.stored(ancestor))


def fitted(trial: Trial, prepared: Prepared) -> Metrics:
    """A line through the ancestor's layers, after the fact."""
    world, ancestor = prepared
    gene = LinearLearngene(ancestor, start="fit")
    r2 = list(fit_linear_learngene(layer_weights(ancestor))[2].values())
    models = {depth: gene.expand(depth) for depth in DEPTHS}
    metrics = fine_tune(models, world, trial, lr=TUNING, spent=ancestral_cost(world, trial), kept=learngene.stored(gene))
    return metrics | {"r2 of a line, mean over tensors": sum(r2) / len(r2)}


def ancestral_cost(world: World, trial: Trial) -> int:
    return learngene.steps(world.ancestry, epochs(trial)[0]) * ANCESTOR


def each_by_itself(trial: Trial, prepared: Prepared) -> Metrics:
    world, _ = prepared
    models = {depth: vit.vit(trial.generator, depth) for depth in DEPTHS}
    spent = sum(distil(model, depth, world, trial, GENTLE) for depth, model in models.items())
    kept = sum(learngene.stored(model) for model in models.values())
    return fine_tune(models, world, trial, lr=TUNING, spent=spent, kept=kept)


COPIES = ("first layers of one", "spaced layers of one")


def lead_over_scratch(metrics: Mapping[str, Mapping[str, float]]) -> float:
    """At the depth where it is smallest."""
    names = [f"accuracy at depth {depth}" for depth in DEPTHS]
    return min(metrics["TLEG"][name] - metrics["scratch"][name] for name in names)


def lead_over_copies(metrics: Mapping[str, Mapping[str, float]]) -> float:
    return metrics["TLEG"]["accuracy"] - max(metrics[arm]["accuracy"] for arm in COPIES)


study = Study(
    method="tleg",
    prepare=prepare,
    arms={
        "scratch": scratch,
        "TLEG": tleg,
        "scratch, equal total cost": scratch_at_equal_cost,
        "pre-train and fine-tune each": each_by_itself,
        "first layers of one": partial(copied, source=lambda layer, depth: layer % ANCESTOR),
        "spaced layers of one": partial(copied, source=lambda layer, depth: layer * ANCESTOR // depth),
        "line through one": fitted,
    },
    claim=holds(
        "TLEG beats scratch at every depth, and copied layers on average over depths",
        lambda metrics: min(lead_over_scratch(metrics), lead_over_copies(metrics)),
        above=0,
    ),
    also=[
        holds("TLEG beats scratch at every depth", lead_over_scratch, above=0),
        holds("TLEG beats copied layers on average over depths", lead_over_copies, above=0),
        beats("TLEG", "line through one", on="accuracy"),
        beats("TLEG", "scratch, equal total cost", on="accuracy"),
    ],
    equal="images, teacher, test; but for the arm of equal total cost, epochs and batches of fine-tuning; epochs of distillation",
    data=("digits",),
)
