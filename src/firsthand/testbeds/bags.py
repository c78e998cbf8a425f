"""Bags of real digits, labelled only as a whole: does the bag hold the digit looked for?"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from firsthand import data

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""From the model, the bags `(bags, instances, 64)` and their labels `(bags,)` to the loss of this batch."""


@dataclass(frozen=True)
class Bags:
    features: Tensor  # (bags, instances, 64): pixels in [0, 1] and noise
    labels: Tensor  # (bags,), 1.0 where the bag holds the digit looked for
    instances: Tensor  # (bags, instances), True at the digit looked for

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Bags":
        return Bags(self.features.to(device), self.labels.to(device), self.instances.to(device))


@dataclass(frozen=True)
class World:
    train: Bags
    val: Bags
    test: Bags


def digit_bags(
    rng: np.random.Generator,
    *,
    train: int = 80,
    val: int = 80,
    test: int = 300,
    size: int = 60,
    digit: int = 9,
    most: int = 3,
    noise: float = 0.3,
    device: torch.device | str = "cpu",
) -> World:
    """Bags of `size` digits each; half of them positive, with one to `most` images of `digit` among the others.

    Images are split 60/20/20 before bags are drawn, so no image of a test bag was ever trained on. Within a split an image may be
    in several bags (in each at most once), under another draw of the pixel noise.

    Args:
        rng: draws split, bags and noise.
        train: number of training bags; `val` and `test` likewise.
        size: instances a bag.
        digit: the digit that makes a bag positive.
        most: the largest number of it in a positive bag; drawn evenly from 1 to `most`.
        noise: standard deviation of the Gaussian noise on each pixel.
        device: where the bags go.
    """
    digits = data.load("digits")
    pixels = digits["images"].reshape(len(digits["images"]), -1)
    is_target = digits["labels"] == digit
    order = rng.permutation(len(pixels))
    parts = np.split(order, [round(0.6 * len(order)), round(0.8 * len(order))])

    def draw(images: np.ndarray, count: int) -> Bags:
        targets, others = images[is_target[images]], images[~is_target[images]]
        labels = rng.permutation(np.arange(count) % 2)
        rows = []
        for label in labels:
            hits = rng.integers(1, most + 1) if label else 0
            row = np.concatenate([rng.choice(targets, hits, replace=False), rng.choice(others, size - hits, replace=False)])
            rows.append(rng.permutation(row))
        index = np.stack(rows)
        features = pixels[index] + noise * rng.standard_normal((*index.shape, pixels.shape[1]))
        return Bags(
            torch.from_numpy(features.astype(np.float32)),
            torch.from_numpy(labels.astype(np.float32)),
            torch.from_numpy(is_target[index]),
        ).to(torch.device(device))

    return World(*(draw(images, count) for images, count in zip(parts, (train, val, test), strict=True)))


def cross_entropy(model: nn.Module, features: Tensor, labels: Tensor) -> Tensor:
    """The plain bag loss, for a model that returns one logit a bag."""
    return binary_cross_entropy_with_logits(model(features), labels)


def fit(
    model: nn.Module,
    world: World,
    loss: Loss,
    *,
    epochs: int,
    lr: float,
    weight_decay: float = 1e-5,
    batch: int = 8,
    generator: torch.Generator,
    trial: Any = None,  # for its progress bar
    label: str = "",
) -> float:
    """Train with AdamW and a cosine to 0, and leave the model at the epoch that was best on the validation bags.

    The best epoch is the one with the highest validation AUROC (the first of equals). The order of the bags comes from
    `generator`, dropout from torch's global generator.

    Returns:
        The highest validation AUROC, to choose between runs by.
    """
    steps = -(-len(world.train) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    best, best_state = -1.0, {}
    for _ in trial.track(range(epochs), label) if trial else range(epochs):
        model.train()
        for index in torch.randperm(len(world.train), generator=generator).to(world.train.labels.device).split(batch):
            optimizer.zero_grad()
            loss(model, world.train.features[index], world.train.labels[index]).backward()
            optimizer.step()
            schedule.step()
        auroc = score(model, world.val)["auroc"]
        if auroc > best:
            best = auroc
            best_state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best_state)
    return best


@torch.no_grad()
def predict(model: nn.Module, bags: Bags, batch: int = 100) -> tuple[Tensor, Tensor]:
    """Logits of the bags and attention scores of their instances, of `model(features, return_att=True)` in eval mode."""
    model.eval()
    parts = [model(features, return_att=True) for features in bags.features.split(batch)]
    return torch.cat([logits for logits, _ in parts]), torch.cat([scores for _, scores in parts])


def score(model: nn.Module, bags: Bags) -> dict[str, float]:
    """AUROC and F1 (at probability ½) of the bags."""
    return score_logits(predict(model, bags)[0], bags)


def score_logits(logits: Tensor, bags: Bags) -> dict[str, float]:
    """`score` from logits at hand."""
    labels, logits = bags.labels.cpu().numpy(), logits.cpu().numpy()
    return {"auroc": float(roc_auc_score(labels, logits)), "f1": float(f1_score(labels, logits > 0, zero_division=0.0))}


def instance_auroc(scores: Tensor, bags: Bags) -> float:
    """How well attention scores tell the digit looked for from the others: AUROC within each positive bag, averaged."""
    positive = bags.labels.bool()
    pairs = zip(bags.instances[positive].cpu().numpy(), scores[positive].cpu().numpy(), strict=True)
    return float(np.mean([roc_auc_score(found, attention) for found, attention in pairs]))
