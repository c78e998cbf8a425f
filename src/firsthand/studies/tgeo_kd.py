"""Does weighing the teacher sample by sample, learnt from where student, teacher and truth are, beat the best weight for all?

A small MLP learns digits from 300 images, a fifth of the labels of five classes wrong, and from a teacher that was trained on 700
others with right labels. On 200 more images with right labels the constant ratio is chosen, the best of five, and on them
those ratios that are learnt learn, by the gradient through one step of the student. Everything again with right labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from firsthand import Study, Trial, beats
from firsthand.distill.tgeo_kd import (
    FusionRatioNet,
    annealed_ratio,
    class_mean_probs,
    fused_kd_loss,
    fusion_ratio_step,
    loss_ratio,
    trilateral_features,
)
from firsthand.testbeds import digits

CONSTANTS = (0.1, 0.3, 0.5, 0.7, 0.9)
TEMPERATURE = 4.0
BATCH, RATE = 50, 3e-3
INNER, RATIO_RATE = 0.5, 0.03  # of the virtual step and of the ratio network: the best of four pairs on four seeds below 100


@dataclass
class World:
    """What the student is trained on, with wrong labels or right ones; for choosing; for the test; and the teacher's logits."""

    train: dict[str, digits.Labelled]  # by what is put after a metric's name
    validation: digits.Labelled
    test: digits.Labelled
    logits: Tensor
    seed: int


def prepare(trial: Trial) -> World:
    split = digits.split(trial.rng)
    images, labels = split.train
    own, teachers, held = torch.arange(len(images)).split([300, 700, len(images) - 1000])
    teacher = digits.mlp(trial.generator)
    data = digits.Labelled(images[teachers], labels[teachers])
    digits.fit(teacher, data, nn.functional.cross_entropy, epochs=1 if trial.smoke else 30, trial=trial)
    with torch.no_grad():
        logits = teacher.cpu()(images[own])
    return World(
        train={
            "": digits.Labelled(images[own], noisy(labels[own], trial.rng)),
            ", right labels": digits.Labelled(images[own], labels[own]),
        },
        validation=digits.Labelled(images[held[:200]], labels[held[:200]]),
        test=split.test,
        logits=logits,
        seed=int(torch.randint(2**31, (), generator=trial.generator)),
    )


def noisy(labels: Tensor, rng: np.random.Generator) -> Tensor:
    """A fifth of the labels of five classes replaced by another class."""
    classes = torch.from_numpy(rng.permutation(digits.CLASSES)[:5])
    rows = torch.nonzero(torch.isin(labels, classes))[:, 0].numpy()
    wrong = torch.from_numpy(rng.permutation(rows)[: len(rows) // 5])
    labels = labels.clone()
    labels[wrong] = (labels[wrong] + torch.from_numpy(rng.integers(1, digits.CLASSES, len(wrong)))) % digits.CLASSES
    return labels


# From the student's and the teacher's logits, labels, rows, number of the step and of all steps to ratios
Weigh = Callable[[Any, Tensor, Tensor, Tensor, Tensor, int, int], Any]


def train(trial: Trial, world: World, suffix: str, weigh: Weigh) -> nn.Sequential:
    """The same initial weights, batches and steps for all."""
    generator = torch.Generator().manual_seed(world.seed)
    student = nn.Sequential(
        nn.Flatten(),
        digits.linear(64, 16, generator),
        nn.ReLU(),
        digits.linear(16, digits.CLASSES, generator),
    )
    images, labels = world.train[suffix]
    optimizer = torch.optim.Adam(student.parameters(), lr=RATE)
    steps = 6 if trial.smoke else 300
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(steps * BATCH // len(images) + 1)])
    for step, rows in enumerate(order[: steps * BATCH].split(BATCH)):
        x, y, teacher = images[rows], labels[rows], world.logits[rows]
        ratio = weigh(student, x, y, teacher, rows, step, steps)
        loss = fused_kd_loss(student(x), teacher, y, ratio, TEMPERATURE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def scores(trial: Trial, world: World, weigh_for: Callable[[str], Weigh]) -> dict[str, float]:
    metrics = {}
    for suffix in world.train:
        found = digits.score(train(trial, world, suffix, weigh_for(suffix)), world.test)
        metrics |= {f"{name}{suffix}": found[name] for name in ("accuracy", "nll")}
    return metrics


def constant(trial: Trial, world: World) -> dict[str, float]:
    """The ratio that is best on validation images, by likelihood."""

    def weigh_for(suffix: str) -> Weigh:
        def reached(ratio: float) -> float:
            return digits.score(train(trial, world, suffix, lambda *_: ratio), world.validation)["nll"]

        best = min(CONSTANTS, key=reached)
        return lambda *_: best

    return scores(trial, world, weigh_for)


def annealed(trial: Trial, world: World) -> dict[str, float]:
    return scores(trial, world, lambda _: lambda *given: annealed_ratio(*given[-2:]))


def by_losses(trial: Trial, world: World) -> dict[str, float]:
    return scores(trial, world, lambda _: lambda student, x, y, teacher, *__: loss_ratio(student(x), teacher, y))


class Free(nn.Module):
    """A ratio for each image, learnt as the network's are, from 0.5; it looks at nothing."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(count))
        self.rows = torch.arange(count)

    def forward(self, features: Tensor) -> Tensor:
        return self.logits[self.rows].sigmoid()


def learnt(trial: Trial, world: World, free: bool = False, frozen: bool = False, every: int = 1) -> dict[str, float]:
    def weigh_for(suffix: str) -> Weigh:
        labels = world.train[suffix].labels
        means = class_mean_probs(world.logits.softmax(-1), labels, digits.CLASSES)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(world.seed)
            net: Any = Free(len(labels)) if free else FusionRatioNet(digits.CLASSES)
        rate = 1.0 if free else RATIO_RATE  # an image's own ratio learns from nothing but its own turn
        optimizer = torch.optim.Adam(net.parameters(), lr=rate)
        generator = torch.Generator().manual_seed(world.seed)

        def weigh(student: Any, x: Tensor, y: Tensor, teacher: Tensor, rows: Tensor, step: int, steps: int) -> Tensor:
            net.rows = rows
            if not frozen and step % every == 0:
                held = torch.randperm(len(world.validation.images), generator=generator)[: 2 * BATCH]
                val = world.validation.images[held], world.validation.labels[held]
                said = fusion_ratio_step(student, (x, y), val, teacher, net, optimizer, means, INNER, TEMPERATURE)
                if not suffix:
                    trial.record(step, val_loss=said["val_loss"], ratio=said["ratio"].mean().item())
                ratio: Tensor = said["ratio"]
                return ratio
            with torch.no_grad():
                now: Tensor = net(trilateral_features(student(x).softmax(-1), teacher.softmax(-1), y, means))
                return now

        return weigh

    return scores(trial, world, weigh_for)


study = Study(
    method="tgeo-kd",
    prepare=prepare,
    arms={
        "best constant": constant,
        "TGeo-KD": learnt,
        "network as it began": partial(learnt, frozen=True),
        "TGeo-KD, every 5 steps": partial(learnt, every=5),
        "free ratio for each image": partial(learnt, free=True),
        "by losses": by_losses,
        "annealed": annealed,
    },
    claim=beats("TGeo-KD", "best constant", on="accuracy"),
    also=[
        beats("TGeo-KD", "network as it began", on="accuracy"),
        beats("TGeo-KD", "best constant", on="nll", lower_is_better=True),
        beats("TGeo-KD", "free ratio for each image", on="accuracy"),
        beats("TGeo-KD", "by losses", on="accuracy"),
        beats("TGeo-KD", "annealed", on="accuracy"),
        beats("TGeo-KD", "best constant", on="accuracy, right labels"),
    ],
    equal="images, labels, teacher, validation images, the student's initial weights, batches, steps and optimiser",
    seeds=10,
    data=("digits",),
)
