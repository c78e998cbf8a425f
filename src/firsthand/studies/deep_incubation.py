"""Is a deep model whose modules were trained apart, inside one shallow model, better than one trained end to end for as long?

A ViT of 8 blocks on digits is cut into 4 modules. Training is counted in steps × blocks, one block forward and backward for one
batch; all arms but one end with as many. Deep incubation spends them on the meta model of 4 blocks, on each module inside it
(5 blocks at a time), and on fine-tuning what was assembled; training end to end spends all on the deep model.

Three ablations: the modules imitate the meta model's; the meta model is not trained, and its share goes to the modules; and each
module has a meta model of its own, trained from other initial weights, which costs three more meta models.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from firsthand import Study, Trial, beats, holds
from firsthand.testbeds import digits, vit
from firsthand.weights.deep_incubation import assemble, incubate, module_state, split_modules

BLOCKS, MODULES, BATCH = 8, 4, 32
HYBRID = BLOCKS // MODULES + MODULES - 1  # blocks of a hybrid network
Metrics = dict[str, float]
World = tuple[digits.Split, Any]  # the digits, and the trained meta model
# Learning rates, and how the training is shared out: tried on seeds below 100.
META, MODULE, END_TO_END, TUNING = 2e-3, 2e-3, 1e-3, 1e-3


def epochs(trial: Trial) -> dict[str, int]:
    """Chosen so that 4 meta + 20 module + 8 tuning = 8 end to end."""
    return {"meta": 1, "module": 1, "tuning": 1, "all": 4} if trial.smoke else {"meta": 8, "module": 8, "tuning": 4, "all": 28}


def prepare(trial: Trial) -> World:
    split = digits.split(trial.rng)
    if trial.smoke:
        split = digits.Split(digits.Labelled(*(part[:96] for part in split.train)), split.test)
    return split, meta_model(trial, split, trial.generator)


def meta_model(trial: Trial, split: digits.Split, generator: torch.Generator) -> Any:
    model = vit.vit(generator, MODULES)
    vit.fit(model, *split.train, epochs=epochs(trial)["meta"], lr=META, trial=trial, batch=BATCH, label="meta model")
    return model


def end_to_end(trial: Trial, world: World) -> Metrics:
    split, _ = world
    model = vit.vit(trial.generator, BLOCKS)
    vit.fit(model, *split.train, epochs=epochs(trial)["all"], lr=END_TO_END, trial=trial, batch=BATCH, label="end to end")
    return {"accuracy": accuracy(trial, model, split), "training cost": cost(split, epochs(trial)["all"], BLOCKS)}


def incubation(
    trial: Trial, world: World, metas: list[Any] | None = None, mode: str = "incubation", more: int = 0, spent: int | None = None
) -> Metrics:
    """Train the modules, each in its meta model, then put them together, look, and fine-tune."""
    split, meta = world
    metas = metas or [meta] * MODULES
    passes = epochs(trial) | {"module": epochs(trial)["module"] + more}
    spent = epochs(trial)["meta"] if spent is None else spent
    deep = vit.vit(trial.generator, BLOCKS)
    for index in trial.track(range(MODULES), "modules"):
        target = copy.deepcopy(deep)
        batches = [batch for _ in range(passes["module"]) for batch in drawn(trial, split.train)]
        incubate(metas[index].to(trial.device), target.to(trial.device), index, MODULES, batches, loss, lr=MODULE, mode=mode)
        trained = module_state(target, split_modules(deep, MODULES)[index])
        states = [trained] if index == 0 else [*states, trained]
    model = assemble(deep, states)
    before = accuracy(trial, model, split)
    vit.fit(model, *split.train, epochs=passes["tuning"], lr=TUNING, trial=trial, batch=BATCH, label="fine-tuning")
    work = cost(split, spent, MODULES) + MODULES * cost(split, passes["module"], HYBRID) + cost(split, passes["tuning"], BLOCKS)
    return {"accuracy": accuracy(trial, model, split), "accuracy before fine-tuning": before, "training cost": work}


def imitation(trial: Trial, world: World) -> Metrics:
    return incubation(trial, world, mode="imitation")


def untrained_meta(trial: Trial, world: World) -> Metrics:
    """What the meta model would cost goes to the modules, rounded down to whole epochs."""
    meta = vit.vit(trial.generator, MODULES)
    more = epochs(trial)["meta"] * MODULES // (MODULES * HYBRID)
    return incubation(trial, world, metas=[meta] * MODULES, more=more, spent=0)


def meta_models_apart(trial: Trial, world: World) -> Metrics:
    split, meta = world
    metas = [meta, *(meta_model(trial, split, trial.generator) for _ in range(MODULES - 1))]
    return incubation(trial, world, metas=metas, spent=MODULES * epochs(trial)["meta"])


def drawn(trial: Trial, data: digits.Labelled) -> list[tuple[Tensor, Tensor]]:
    """One epoch of batches."""
    order = torch.randperm(len(data.images), generator=trial.generator).split(BATCH)
    return [(data.images[rows][:, None].to(trial.device), data.labels[rows].to(trial.device)) for rows in order]


def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).logits, batch[1])


def accuracy(trial: Trial, model: Any, split: digits.Split) -> float:
    trial.count(model)
    return vit.accuracy(model, *split.test)


def cost(split: digits.Split, passes: int, blocks: int) -> float:
    return float(passes * -(-len(split.train.images) // BATCH) * blocks)


BEFORE = "accuracy before fine-tuning"

study = Study(
    method="deep-incubation",
    prepare=prepare,
    arms={
        "end to end": end_to_end,
        "deep incubation": incubation,
        "meta models apart": meta_models_apart,
        "imitation": imitation,
        "untrained meta model": untrained_meta,
    },
    claim=beats("deep incubation", "end to end", on="accuracy"),
    also=[
        beats("deep incubation", "meta models apart", on=BEFORE),
        beats("deep incubation", "imitation", on=BEFORE),
        beats("deep incubation", "untrained meta model", on=BEFORE),
        holds(
            "put together and not yet fine-tuned it is above 50 %, where chance is 10 %",
            lambda arms: arms["deep incubation"][BEFORE],
            above=0.5,
        ),
        beats("deep incubation", "meta models apart", on="accuracy"),
        beats("deep incubation", "imitation", on="accuracy"),
    ],
    equal="images, batch, training cost in steps × blocks but for 'meta models apart', which has more",
    seeds=4,
    data=("digits",),
)
