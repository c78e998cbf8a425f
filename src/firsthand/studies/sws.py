"""Are models made by repeating layers that were trained to be repeated better after one epoch, and does that training matter?

A family of ViTs on digits, of 5, 6 and 10 layers, is wanted. SWS distils one model of 8 layers in 4 stages of 2, each with one
set of weights, then builds every depth by repeating each stage's layer in its place, and trains each on the task for five epochs.
Two ablations take away what is said to guide the descendants: the same learngene with its stages in reverse order, and 4 layers
distilled without repeats and repeated afterwards. The latter get as much training, which is twice as many steps of a model half
as deep; a further arm has as many steps. Beside them: models from scratch with the same five epochs, and with as much training as
SWS needs in all, on the labels of the ancestry and the task; TLEG's learngene; and pre-training and fine-tuning of each depth by
itself, the costly way. The teacher is given, as in the paper: its training is nobody's cost.

The claim is about accuracy after one epoch, the mean over depths, and about three comparisons at once: it is the lead over the
best of scratch and the two ablations.

Cost is in steps × blocks: one block, forward and backward, for one batch.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from firsthand import Study, Trial, beats, holds
from firsthand.distill.soft import soft_distillation_loss
from firsthand.testbeds import learngene, vit
from firsthand.weights.sws import StageSharedModel, expansion_schedule
from firsthand.weights.tleg import LinearLearngene

DEPTHS = (5, 6, 10)  # none of them 4 or 8, at which a learngene would only have to be itself
REPEATS = (2, 2, 2, 2)
STAGES, LAYERS = len(REPEATS), sum(REPEATS)
# Learning rates: the best of two or three each, on seed 1; of a distillation, by what its descendants come to.
DISTILLATION, TUNING = 2e-3, 1e-3
GENTLE = 1e-3  # distillation of TLEG and of each depth by itself
SCRATCH, LONG_SCRATCH = 1e-3, 5e-4

World = learngene.World
Prepared = tuple[World, StageSharedModel]
Metrics = dict[str, float]


def epochs(trial: Trial) -> tuple[int, int]:
    """Of distillation and of fine-tuning."""
    return (1, 1) if trial.smoke else (15, 5)


def prepare(trial: Trial) -> Prepared:
    world = learngene.world(trial)
    shared = StageSharedModel(vit.vit(trial.generator, LAYERS), REPEATS)
    distil(shared, LAYERS, world, trial)
    return world, shared


def distil(model: Any, layers: int, world: World, trial: Trial, *, lr: float = DISTILLATION, times: int = 1) -> int:
    passes = times * epochs(trial)[0]
    return learngene.distil(model, layers, world, soft_distillation_loss, epochs=passes, lr=lr, trial=trial)


def fine_tune(models: Mapping[int, Any], world: World, trial: Trial, *, lr: float, spent: int, kept: int) -> Metrics:
    passes = epochs(trial)[1]
    return learngene.fine_tune(models, world.task, world, epochs=passes, lr=lr, trial=trial, spent=spent, kept=kept)


def scratch(trial: Trial, prepared: Prepared) -> Metrics:
    models = {depth: vit.vit(trial.generator, depth) for depth in DEPTHS}
    return fine_tune(models, prepared[0], trial, lr=SCRATCH, spent=0, kept=0)


def scratch_at_equal_cost(trial: Trial, prepared: Prepared) -> Metrics:
    """As much training in all as SWS, rounded up to whole epochs, and all labels that there are."""
    world, _ = prepared
    cost = learngene_cost(world, trial) + learngene.steps(world.task, epochs(trial)[1]) * sum(DEPTHS)
    passes = math.ceil(cost / (learngene.steps(world.labelled, 1) * sum(DEPTHS)))
    models = {depth: vit.vit(trial.generator, depth) for depth in DEPTHS}
    return learngene.fine_tune(models, world.labelled, world, epochs=passes, lr=LONG_SCRATCH, trial=trial)


def learngene_cost(world: World, trial: Trial) -> int:
    return learngene.steps(world.ancestry, epochs(trial)[0]) * LAYERS


def sws(trial: Trial, prepared: Prepared, reverse: bool = False) -> Metrics:
    world, shared = prepared
    models = {}
    for depth in DEPTHS:
        stages = expansion_schedule(depth, STAGES)
        stages = [STAGES - 1 - stage for stage in stages] if reverse else stages
        models[depth] = shared.expand(layer_to_stage=stages, allow_unordered=reverse)
    spent = learngene_cost(world, trial)
    return fine_tune(models, world, trial, lr=TUNING, spent=spent, kept=learngene.stored(shared))


def reversed_stages(trial: Trial, prepared: Prepared) -> Metrics:
    return sws(trial, prepared, reverse=True)


def without_repeats(trial: Trial, prepared: Prepared, times: int) -> Metrics:
    """As many layers are stored, but they were `times` as many epochs in a model that has each of them once."""
    world, _ = prepared
    plain = StageSharedModel(vit.vit(trial.generator, STAGES), [1] * STAGES)
    spent = distil(plain, STAGES, world, trial, times=times)
    models = {depth: plain.expand(depth) for depth in DEPTHS}
    return fine_tune(models, world, trial, lr=TUNING, spent=spent, kept=learngene.stored(plain))


def tleg(trial: Trial, prepared: Prepared) -> Metrics:
    world, _ = prepared
    gene = LinearLearngene(vit.vit(trial.generator, LAYERS), generator=trial.generator)
    spent = distil(gene, LAYERS, world, trial, lr=GENTLE)
    models = {depth: gene.expand(depth) for depth in DEPTHS}
    return fine_tune(models, world, trial, lr=TUNING, spent=spent, kept=learngene.stored(gene))


def each_by_itself(trial: Trial, prepared: Prepared) -> Metrics:
    world, _ = prepared
    models = {depth: vit.vit(trial.generator, depth) for depth in DEPTHS}
    spent = sum(distil(model, depth, world, trial, lr=GENTLE) for depth, model in models.items())
    kept = sum(learngene.stored(model) for model in models.values())
    return fine_tune(models, world, trial, lr=TUNING, spent=spent, kept=kept)


EARLY = "accuracy after 1 epoch"
RIVALS = ("scratch", "stages reversed", "learnt without repeats")


def lead(metrics: Mapping[str, Mapping[str, float]]) -> float:
    return metrics["SWS"][EARLY] - max(metrics[rival][EARLY] for rival in RIVALS)


study = Study(
    method="sws",
    prepare=prepare,
    arms={
        "scratch": scratch,
        "SWS": sws,
        "stages reversed": reversed_stages,
        "learnt without repeats": partial(without_repeats, times=LAYERS // STAGES),
        "learnt without repeats, as many steps": partial(without_repeats, times=1),
        "scratch, equal total cost": scratch_at_equal_cost,
        "TLEG": tleg,
        "pre-train and fine-tune each": each_by_itself,
    },
    claim=holds("after one epoch SWS beats scratch, reversed stages and layers learnt without repeats", lead, above=0),
    also=[
        beats("SWS", "scratch", on=EARLY),
        beats("SWS", "stages reversed", on=EARLY),
        beats("SWS", "learnt without repeats", on=EARLY),
        beats("SWS", "learnt without repeats, as many steps", on=EARLY),
        beats("SWS", "scratch, equal total cost", on="accuracy"),
        beats("SWS", "TLEG", on="accuracy"),
    ],
    equal="images, teacher, test; cost of distillation, but where the arm's name says otherwise; epochs of fine-tuning, but in "
    "the arm of equal total cost",
    data=("digits",),
)
