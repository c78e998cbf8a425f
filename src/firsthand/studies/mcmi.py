"""Does a teacher that was fine-tuned for more information within classes teach better than one that was just trained for longer?

A small convolutional network learns digits; then it is trained on for some epochs, on labels alone, or with MCMI, its λ chosen on
validation images. A small MLP learns from each: from 5 % and 10 % of the training images (mean over three draws), from all, and
from all but those of one class (mean over three classes). As a control the plain teacher's logits are divided by the temperature
that makes its answers as uncertain as those of MCMI: the gain must be more than smoothing.
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from firsthand import Study, Trial, beats, holds
from firsthand.distill.mcmi import ConditionalMutualInformation, mcmi_finetune
from firsthand.distill.soft import soft_distillation_loss
from firsthand.testbeds import digits, vit

LAMBDAS = (0.1, 0.25, 0.5)
TEMPERATURE, KD_WEIGHT = 4.0, 0.9  # of the student's loss, as in the paper's code
FEW, TENTH, OMITTED = "accuracy, 5 % of the data", "accuracy, 10 % of the data", "accuracy, omitted class"


@dataclass
class World:
    """Images of three parts; the teachers' logits for those to train on, by name; and which of them a student is given."""

    train: digits.Labelled
    validation: digits.Labelled
    test: digits.Labelled
    logits: dict[str, Tensor]
    teachers: dict[str, dict[str, float]]  # what is to be said of each
    draws: dict[str, list[Tensor]]  # rows of train, by metric
    omitted: list[int]  # classes
    chosen: dict[str, str]  # kind of teacher -> name of the one to take


def prepare(trial: Trial) -> World:
    split = digits.split(trial.rng)
    count = 120 if trial.smoke else 1000
    first, second = (1, 1) if trial.smoke else (15, 20)
    train = digits.Labelled(split.train.images[:count], split.train.labels[:count])
    validation = digits.Labelled(split.train.images[1000:], split.train.labels[1000:])
    teacher = vit.cnn(trial.generator)
    vit.fit(teacher, *train, epochs=first, lr=3e-3, trial=trial, label="teacher")
    seed = int(torch.randint(2**31, (), generator=trial.generator))

    def tuned(lam: float, refresh: str = "epoch") -> Any:
        """The same start, order and number of epochs."""
        model = copy.deepcopy(teacher).to(trial.device)
        data = TensorDataset(train.images[:, None], train.labels)
        loader = DataLoader(data, 64, shuffle=True, generator=torch.Generator().manual_seed(seed))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        return mcmi_finetune(model, loader, digits.CLASSES, lam, second, optimizer, refresh)

    models = {"longer": tuned(0.0)}
    for lam in trial.track(LAMBDAS, "teachers"):
        models[f"MCMI {lam}"] = tuned(lam)
        models[f"MCMI once {lam}"] = tuned(lam, "once")
    logits = {name: vit.predict(model, train.images) for name, model in models.items()}
    rows = [torch.from_numpy(trial.rng.permutation(count)) for _ in range(3)]
    omitted = trial.rng.permutation(digits.CLASSES)[:3].tolist()
    draws = {FEW: [balanced(order, train, 0.05) for order in rows], TENTH: [balanced(order, train, 0.1) for order in rows]}
    draws |= {"accuracy": rows[:1], OMITTED: [torch.nonzero(train.labels != label)[:, 0] for label in omitted]}
    said = {name: described(model, split.test, logits[name], train) for name, model in models.items()}
    world = World(train, validation, split.test, logits, said, draws, omitted, {"longer": "longer"})
    for kind in ("MCMI", "MCMI once"):
        world.chosen[kind] = best(trial, world, kind)
    return world


def balanced(order: Tensor, data: digits.Labelled, share: float) -> Tensor:
    """That share of the images of each class, at least one."""
    picked = []
    for label in range(digits.CLASSES):
        own = order[data.labels[order] == label]
        picked.append(own[: max(1, round(share * len(own)))])
    return torch.cat(picked)


def described(model: Any, test: digits.Labelled, logits: Tensor, train: digits.Labelled) -> dict[str, float]:
    information = ConditionalMutualInformation(digits.CLASSES)
    information.update(logits, train.labels)
    return {"information of the teacher": information.compute().item(), "accuracy of the teacher": vit.accuracy(model, *test)}


def student(trial: Trial, world: World, rows: Tensor, logits: Tensor, kd_weight: float = KD_WEIGHT) -> Any:
    """Trained with `0.1 CE + 0.9 τ² KL`, on these rows, for as many steps whatever their number."""
    trial.generator.manual_seed(trial.seed)
    model = digits.mlp(trial.generator, hidden=32)
    labels = world.train.labels

    def loss(z: Tensor, at: Tensor) -> Tensor:
        hard = F.cross_entropy(z, labels[at.cpu()].to(z.device))
        soft = soft_distillation_loss(z, logits[at.cpu()].to(z.device), TEMPERATURE)
        return (1 - kd_weight) * hard + kd_weight * soft

    steps = 4 if trial.smoke else 300
    epochs = max(1, round(steps / -(-len(rows) // 64)))
    digits.fit(model, digits.Labelled(world.train.images[rows], rows), loss, epochs=epochs, trial=trial, lr=3e-3)
    return model


def students(trial: Trial, world: World, logits: Tensor, data: digits.Labelled, kd_weight: float = KD_WEIGHT) -> dict[str, float]:
    """Accuracy of a student in each setting, the mean over its draws."""
    metrics = {}
    for name, draws in world.draws.items():
        reached = []
        for number, rows in enumerate(draws):
            judged = data
            if name == OMITTED:
                own = data.labels == world.omitted[number]
                judged = digits.Labelled(data.images[own], data.labels[own])
            reached.append(digits.score(student(trial, world, rows, logits, kd_weight), judged)["accuracy"])
        metrics[name] = sum(reached) / len(reached)
    return metrics


def best(trial: Trial, world: World, kind: str) -> str:
    """The λ whose students do best on validation images, over all settings alike."""

    def value(name: str) -> float:
        return sum(students(trial, world, world.logits[name], world.validation).values())

    return max((f"{kind} {lam}" for lam in LAMBDAS), key=value)


def taught(trial: Trial, world: World, kind: str) -> dict[str, float]:
    name = world.chosen[kind]
    return students(trial, world, world.logits[name], world.test) | world.teachers[name]


def smoothed(trial: Trial, world: World) -> dict[str, float]:
    """The plain teacher, as uncertain as the one by MCMI."""
    wanted, plain = entropy(world.logits[world.chosen["MCMI"]]), world.logits["longer"].double()
    temperature = brentq(lambda log: entropy(plain / 10**log) - wanted, -2, 2)
    softer = (plain / 10**temperature).float()
    return students(trial, world, softer, world.test) | {"temperature of the teacher": 10**temperature}


def entropy(logits: Tensor) -> float:
    log_probs = logits.double().log_softmax(dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1).mean().item()


def labels_alone(trial: Trial, world: World) -> dict[str, float]:
    return students(trial, world, world.logits["longer"], world.test, kd_weight=0.0)


study = Study(
    method="mcmi",
    prepare=prepare,
    arms={
        "trained longer": partial(taught, kind="longer"),
        "MCMI": partial(taught, kind="MCMI"),
        "MCMI, centroids once": partial(taught, kind="MCMI once"),
        "trained longer, as uncertain": smoothed,
        "labels alone": labels_alone,
    },
    claim=beats("MCMI", "trained longer", on=FEW),
    also=[
        beats("MCMI", "trained longer", on=OMITTED),
        beats("MCMI", "trained longer, as uncertain", on=FEW),
        beats("MCMI", "trained longer, as uncertain", on=OMITTED),
        beats("MCMI", "trained longer", on="accuracy"),
        beats("MCMI", "MCMI, centroids once", on=FEW),
        holds(
            "MCMI raises the teacher's conditional mutual information",
            lambda arms: arms["MCMI"]["information of the teacher"] - arms["trained longer"]["information of the teacher"],
            above=0.0,
        ),
    ],
    equal="images, start and epochs of the teachers; the student's initial weights, steps, batches and loss",
    seeds=5,
    data=("digits",),
)
