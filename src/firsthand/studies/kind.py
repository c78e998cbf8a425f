"""Does diverting what is particular to classes out of a diffusion model leave a core that learns new classes better?

A small diffusion transformer is pre-trained on the digits 0 to 5, in three forms for as many steps: with KIND's factors and class
gate, with as many factors but no gate, and dense. Then it has to draw 6 to 9, from 25 pictures each. KIND keeps its learngene,
frozen, and trains fresh tailors, a few for each new class. It is compared with LoRA on the dense model and with the form without
gate, whose largest singular components are frozen in the learngene's place: with as many parameters trained (the factors' scales
apart, which LoRA has none of), for as many steps. A frozen learngene that was never trained, and fine-tuning of all weights,
stand below and above.

What is measured is the Fréchet distance of the new classes' samples to real pictures that were not trained on. The claim is that
KIND's is smaller than both: it is about its lead over the better one.

To see it on clothes: `study = dataclasses.replace(kind.study, data=("fashion-mnist",))` in a file of one's own.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from firsthand import Study, Trial, beats, holds
from firsthand.testbeds import diffusion, digits
from firsthand.weights.kind import attach_tailors, divert, gate_by, keep_classes, merge

KNOWN, NEW, EXAMPLES = 6, 4, 25  # classes, classes, pictures of each new class
WIDTH = 48
SHARED, TAILOR = (
    WIDTH // 2,
    WIDTH // 2 // KNOWN,
)  # components in a layer: half are shared, the rest divided among the known classes
TARGET = ("q", "k", "v", "o", "fc1", "fc2")
# Learning rates: the best on two seeds below 100; of 1e-2, 2e-2 and 5e-2 for the new classes, of 4e-3 and 1e-2 before.
PRETRAIN = {"dense": 1e-2, "no gate": 4e-3, "gate": 4e-3}
ADAPT = {"LoRA": 2e-2, "KIND": 2e-2, "no gate": 5e-2, "gated adapters": 5e-2, "random": 2e-2, "full": 1e-2}


@dataclass
class World:
    known: digits.Labelled
    few: digits.Labelled  # of the new classes, which are numbered from 0
    real: Tensor  # other pictures of the new classes
    judge: diffusion.Classifier
    models: dict[str, nn.Module]  # pre-trained
    fresh: nn.Module  # the factors before any training
    embedding: nn.Embedding  # of the new classes
    seed: int


def prepare(trial: Trial) -> World:
    pictures = diffusion.pictures(trial.data[0], trial.rng)
    judge = diffusion.Classifier(trial.generator)
    digits.fit(judge, pictures, nn.functional.cross_entropy, epochs=1 if trial.smoke else 10, trial=trial)

    is_known = pictures.labels < KNOWN
    known = digits.Labelled(pictures.images[is_known], pictures.labels[is_known])
    by_class = [pictures.images[pictures.labels == KNOWN + label] for label in range(NEW)]
    few = digits.Labelled(torch.cat([each[:EXAMPLES] for each in by_class]), torch.arange(NEW).repeat_interleave(EXAMPLES))
    rest = min(len(each) for each in by_class) - EXAMPLES  # as many of each class, as there are samples
    real = torch.cat([each[EXAMPLES:][: min(rest, 500)] for each in by_class])

    dense = diffusion.Denoiser(trial.generator, KNOWN, width=WIDTH)
    no_gate, gated = copy.deepcopy(dense), copy.deepcopy(dense)
    divert(no_gate, SHARED + KNOWN * TAILOR, 0, 0, target=TARGET, generator=trial.generator)
    divert(gated, SHARED, KNOWN, TAILOR, target=TARGET, generator=trial.generator)
    gate_by(gated, "labels")
    fresh = copy.deepcopy(gated)
    models = {"dense": dense, "no gate": no_gate, "gate": gated}
    embedding = diffusion.class_embedding(NEW, WIDTH, trial.generator)
    world = World(known, few, real, judge, models, fresh, embedding, int(torch.randint(2**31, (), generator=trial.generator)))
    for name, model in models.items():
        steps = 3 if trial.smoke else 600
        label = f"pre-training, {name}"
        diffusion.fit(model, known, steps=steps, lr=PRETRAIN[name], seed=world.seed, trial=trial, label=label)
    return world


def adapt(model: Any, world: World, trial: Trial, lr: float) -> dict[str, float]:
    """Train what is trainable and an embedding of the new classes, and score samples."""
    model.classes = world.embedding
    trial.count(model)
    steps, samples = (3, 40) if trial.smoke else (200, 800)
    loss = diffusion.fit(model, world.few, steps=steps, lr=lr, seed=world.seed + 1, trial=trial, label="adapting")
    labels = torch.arange(samples) % NEW
    drawn = diffusion.sample(model, labels, seed=world.seed + 2, trial=trial)
    quality = diffusion.quality(world.judge, drawn, labels + KNOWN, world.real)
    return {"distance": quality.distance, "recognised": quality.accuracy, "loss": loss}


def lora(trial: Trial, world: World) -> dict[str, float]:
    model = world.models["dense"].requires_grad_(False)
    rank = NEW * TAILOR
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGET)), model)
    with torch.no_grad():  # peft draws from the global generator
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                nn.init.kaiming_uniform_(parameter, a=5**0.5, generator=trial.generator)
    return adapt(model, world, trial, ADAPT["LoRA"])


def kind(trial: Trial, world: World) -> dict[str, float]:
    known = known_classes(world, trial)
    model = attach_tailors(world.models["gate"], NEW, TAILOR, generator=trial.generator)
    return adapt(model, world, trial, ADAPT["KIND"]) | known


def no_gate(trial: Trial, world: World) -> dict[str, float]:
    dense = merge(world.models["no gate"], None)
    model = divert(dense, SHARED, 0, 0, target=TARGET, keep_weights=True)
    attach_tailors(model, NEW, TAILOR, generator=trial.generator)
    gate_by(model, "labels")
    return adapt(model, world, trial, ADAPT["no gate"])


def gated_adapters(trial: Trial, world: World) -> dict[str, float]:
    """What the class gate does for adaptation alone: the whole dense model frozen, and tailors of each class beside it."""
    model = divert(world.models["dense"], WIDTH, 0, 0, target=TARGET, keep_weights=True)
    attach_tailors(model, NEW, TAILOR, generator=trial.generator)
    gate_by(model, "labels")
    return adapt(model, world, trial, ADAPT["gated adapters"])


def random_learngene(trial: Trial, world: World) -> dict[str, float]:
    """All else that is pre-trained (embeddings, modulation) stays: only the learngene of the layers is the untrained one."""
    model = world.models["gate"]
    for name, module in world.fresh.named_modules():
        if name.split(".")[-1] in TARGET:
            model.get_submodule(name).load_state_dict(module.state_dict())
    attach_tailors(model, NEW, TAILOR, generator=trial.generator)
    return adapt(model, world, trial, ADAPT["random"])


def full(trial: Trial, world: World) -> dict[str, float]:
    return adapt(world.models["dense"], world, trial, ADAPT["full"])


def known_classes(world: World, trial: Trial) -> dict[str, float]:
    """Samples of the known classes with the tailors of their class open, with all, and with none; and what one of them takes."""
    model = world.models["gate"]
    samples = 60 if trial.smoke else 600
    labels = torch.arange(samples) % KNOWN
    found = {}
    for name, opened in (("own", model), ("all", merge(model, None)), ("no", merge(model, -1)), ("dense", world.models["dense"])):
        drawn = diffusion.sample(opened, labels, seed=world.seed + 3, trial=trial)
        found[f"known classes, {name} tailors"] = diffusion.quality(world.judge, drawn, labels, world.known.images).distance
    found["known classes, dense model"] = found.pop("known classes, dense tailors")
    one = keep_classes(copy.deepcopy(model), [0])
    dense_flops = flops(world.models["dense"], trial)
    return found | {
        "FLOPs of a class, ratio to dense": flops(one, trial) / dense_flops,
        "FLOPs of all classes, ratio to dense": flops(model, trial) / dense_flops,
    }


def flops(model: nn.Module, trial: Trial) -> int:
    nothing = torch.zeros(1, diffusion.SIDE, diffusion.SIDE, device=trial.device)
    label = torch.zeros(1, dtype=torch.long, device=trial.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(nothing, nothing[:, 0, 0], label)
    return counter.get_total_flops()


def lead(metrics: Mapping[str, Mapping[str, float]]) -> float:
    rivals = ("LoRA", "pre-trained without gate")
    return min(metrics[rival]["distance"] for rival in rivals) - metrics["KIND"]["distance"]


def own_over_all(metrics: Mapping[str, Mapping[str, float]]) -> float:
    return metrics["KIND"]["known classes, all tailors"] - metrics["KIND"]["known classes, own tailors"]


study = Study(
    method="kind",
    prepare=prepare,
    arms={
        "LoRA": lora,
        "KIND": kind,
        "pre-trained without gate": no_gate,
        "dense with tailors": gated_adapters,
        "random learngene": random_learngene,
        "full fine-tuning": full,
    },
    claim=holds("KIND's samples of new classes are closer to real ones than LoRA's and those without gate", lead, above=0),
    also=[
        beats("KIND", "LoRA", on="distance", lower_is_better=True),
        beats("KIND", "pre-trained without gate", on="distance", lower_is_better=True),
        beats("KIND", "dense with tailors", on="distance", lower_is_better=True),
        beats("KIND", "random learngene", on="distance", lower_is_better=True),
        beats("KIND", "full fine-tuning", on="distance", lower_is_better=True),
        holds("a known class is drawn better with its own tailors open than with all", own_over_all, above=0),
    ],
    equal="pictures, steps, batches, noise, embedding of the new classes; trained parameters, but for full fine-tuning, and the "
    "scales of the tailors, 1 %, which LoRA has not",
    seeds=4,
    data=("digits",),
)
