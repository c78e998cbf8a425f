"""Vision transformers of several depths from one ancestor: how well they do, and what training and storing them takes.

The digits are in three parts: the ancestry's, for whatever is trained before the depths are known, with a teacher's opinion of
each image; the task's, to train the models of all depths on; and the test's. Training is counted in steps × blocks: one block,
forward and backward, for one batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from firsthand.testbeds import digits, vit

BATCH = 32
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class World:
    """The digits, the teacher's logits, and a seed for the order of the batches, the same in all arms."""

    ancestry: digits.Labelled
    teacher_logits: Float[Tensor, "n 10"]  # of the ancestry's images
    task: digits.Labelled
    test: digits.Labelled
    order: int

    @property
    def labelled(self) -> digits.Labelled:
        """All images with labels: those of the ancestry and those of the task."""
        images, labels = (torch.cat(parts) for parts in zip(self.ancestry, self.task, strict=True))
        return digits.Labelled(images, labels)


def world(trial: Any) -> World:
    """Half of the training digits for the ancestry, the other half for the task, and a convolutional teacher from the former."""
    train, test = digits.split(trial.rng)
    middle = len(train.images) // 2
    most = 96 if trial.smoke else len(train.images)
    ancestry, task, test = (
        digits.Labelled(part.images[:most], part.labels[:most])
        for part in (
            digits.Labelled(train.images[:middle], train.labels[:middle]),
            digits.Labelled(train.images[middle:], train.labels[middle:]),
            test,
        )
    )
    teacher = vit.cnn(trial.generator)
    vit.fit(teacher, *ancestry, epochs=1 if trial.smoke else 20, lr=3e-3, trial=trial, label="teacher")
    order = torch.randint(2**31, (), generator=trial.generator).item()
    return World(ancestry, vit.predict(teacher, ancestry.images), task, test, int(order))


def steps(data: digits.Labelled, epochs: int) -> int:
    """How many batches there are in so many epochs."""
    return epochs * -(-len(data.images) // BATCH)


def stored(model: nn.Module) -> int:
    """Parameters of a model, those that are shared counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def distil(model: nn.Module, layers: int, world: World, loss: Loss, *, epochs: int, lr: float, trial: Any) -> int:
    """Train a model in place to agree with the teacher on the ancestry's images.

    Args:
        model: from images to logits.
        layers: how many blocks it has, for the count.
        world: data and teacher.
        loss: from the model's and the teacher's logits to a scalar.
        epochs: passes over the images.
        lr: largest learning rate.
        trial: device and progress.

    Returns:
        What it took, in steps × blocks.
    """
    trial.generator.manual_seed(world.order)
    label = f"distilling {layers} layers"
    images, opinion = world.ancestry.images, world.teacher_logits
    vit.fit(model, images, opinion, loss=loss, epochs=epochs, lr=lr, trial=trial, batch=BATCH, label=label)
    return steps(world.ancestry, epochs) * layers


def fine_tune(
    models: Mapping[int, nn.Module],
    data: digits.Labelled,
    world: World,
    *,
    epochs: int,
    lr: float,
    trial: Any,
    spent: int = 0,
    kept: int = 0,
) -> dict[str, float]:
    """Train models of several depths on labels, and say how good they are and what they took.

    Records accuracy against depth, and mean accuracy over depths against training cost, one point an epoch.

    Args:
        models: depth -> model, trained in place.
        data: what to train on.
        world: what to test on.
        epochs: passes over the data, at least 1.
        lr: largest learning rate.
        trial: device, progress, curves.
        spent: training cost until now, in steps × blocks.
        kept: parameters that one keeps to make the models from.

    Returns:
        Mean test accuracy over depths at the end, before, and after one epoch; that of each depth at the end; the training cost
        and what is kept.

    Raises:
        ValueError: no epochs.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    trial.count(models[max(models)])
    accuracies = {}
    for depth, model in models.items():
        trial.generator.manual_seed(world.order + depth)  # whatever was drawn before, the batches are the same
        model.to(trial.device)
        seen = [vit.accuracy(model, *world.test)]

        def test(_: int, model: nn.Module = model, seen: list[float] = seen) -> None:
            seen.append(vit.accuracy(model, *world.test))

        label = f"fine-tuning {depth} layers"
        vit.fit(model, *data, epochs=epochs, lr=lr, trial=trial, batch=BATCH, after_epoch=test, label=label)
        accuracies[depth] = seen
        trial.record(depth, accuracy_by_depth=seen[-1])
    means = np.mean(list(accuracies.values()), axis=0)
    each_epoch = steps(data, 1) * sum(models)
    for epoch, mean in enumerate(means):
        trial.record(spent + epoch * each_epoch, accuracy_by_training_cost=float(mean))
    return {
        "accuracy": float(means[-1]),
        "accuracy after 1 epoch": float(means[1]),
        "accuracy before": float(means[0]),
        **{f"accuracy at depth {depth}": seen[-1] for depth, seen in accuracies.items()},
        "training cost": float(spent + epochs * each_epoch),
        "stored parameters": float(kept),
    }
