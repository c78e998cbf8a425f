"""Handwritten digits, 8×8: a classifier, and joint-embedding pre-training without labels with a linear probe after it.

Small enough that a run takes seconds, real enough that methods differ: the 1 797 scans that scikit-learn ships.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

from firsthand.data import load

CLASSES = 10
WIDTH = 2 * CLASSES  # of representations and embeddings: see JointEmbedding


class Labelled(NamedTuple):
    """Images and what they show."""

    images: Float[Tensor, "n 8 8"]  # in [0, 1]
    labels: Int[Tensor, " n"]  # in [0, 10)


class Split(NamedTuple):
    """Images to train on, and others to test on."""

    train: Labelled
    test: Labelled


def split(rng: np.random.Generator, *, label_noise: float = 0.0) -> Split:
    """A random two thirds of the digits to train on, the rest to test on.

    Args:
        rng: draws the split, then the noise.
        label_noise: this part of the training labels, in `[0, 1]`, is replaced by one of the other nine classes. Test labels are
            left alone.

    Raises:
        ValueError: `label_noise` out of range.
    """
    if not 0 <= label_noise <= 1:
        raise ValueError(f"label_noise must be in [0, 1], got {label_noise}")
    digits = load("digits")
    images, labels = digits["images"], digits["labels"]
    train, test = np.split(rng.permutation(len(images)), [2 * len(images) // 3])
    train_labels = labels[train]
    wrong = rng.choice(len(train), size=round(label_noise * len(train)), replace=False)
    train_labels[wrong] = (train_labels[wrong] + rng.integers(1, CLASSES, size=len(wrong))) % CLASSES
    return Split(
        Labelled(torch.from_numpy(images[train]), torch.from_numpy(train_labels)),
        Labelled(torch.from_numpy(images[test]), torch.from_numpy(labels[test])),
    )


# A classifier


def mlp(generator: torch.Generator, hidden: int = 128) -> nn.Sequential:
    """A classifier with one hidden layer, from images to logits."""
    return nn.Sequential(nn.Flatten(), linear(64, hidden, generator), nn.ReLU(), linear(hidden, CLASSES, generator))


def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """`nn.Linear` whose weights come from `generator`; PyTorch's own draws them from the global one."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def fit(
    model: nn.Module,
    data: Labelled,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    trial: Any,
    lr: float = 1e-3,
    batch: int = 64,
) -> None:
    """Train in place with Adam.

    Args:
        model: from images to logits.
        data: what to train on.
        loss: from logits and labels to a scalar.
        epochs: passes over the data.
        trial: gives the order of the batches (`.generator`) and the device; takes the loss of each epoch.
        lr: Adam's learning rate.
        batch: images in a batch; the last one may be smaller.
    """
    images, labels = (tensor.to(trial.device) for tensor in data)
    model.to(trial.device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for epoch in trial.track(range(epochs), "epochs"):
        total = 0.0
        for rows in torch.randperm(len(images), generator=trial.generator).to(trial.device).split(batch):
            value = loss(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            total += value.item() * len(rows)
        trial.record(epoch + 1, loss=total / len(images))


@torch.no_grad()
def score(model: nn.Module, data: Labelled) -> dict[str, float]:
    """Accuracy, expected calibration error (15 bins) and negative log-likelihood, in nats, of a classifier."""
    device = next(model.parameters()).device
    model.eval()
    logits, labels = model(data.images.to(device)).cpu(), data.labels
    return {
        "accuracy": (logits.argmax(dim=1) == labels).double().mean().item(),
        "calibration_error": multiclass_calibration_error(logits.softmax(dim=1), labels, num_classes=CLASSES, n_bins=15).item(),
        "nll": F.cross_entropy(logits, labels).item(),
    }


# Pre-training without labels: two views of an image should have the same embedding


class JointEmbedding(nn.Module):
    """An encoder, whose output is kept and probed, and a projector, whose output only the objective sees.

    Both are twice as wide as there are classes, about as ImageNet's 1 000 classes are to the 2 048 features of a ResNet-50: wide
    enough to hold the classes, too narrow to pass the image through.
    """

    def __init__(
        self, generator: torch.Generator, hidden: int = 128, representation: int = WIDTH, embedding: int = WIDTH
    ) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(),
            linear(64, hidden, generator),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            linear(hidden, representation, generator),
        )
        self.projector = nn.Sequential(
            nn.BatchNorm1d(representation),
            nn.ReLU(),
            linear(representation, hidden, generator),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            linear(hidden, embedding, generator),
        )

    def forward(self, images: Float[Tensor, "n 8 8"]) -> tuple[Float[Tensor, "n representation"], Float[Tensor, "n embedding"]]:
        representation = self.encoder(images)
        return representation, self.projector(representation)


def augment(
    images: Float[Tensor, "n 8 8"], generator: torch.Generator, *, shift: int = 1, noise: float = 0.1, cutout: int = 2
) -> Float[Tensor, "n 8 8"]:
    """A random view of each image: moved by up to `shift` pixels each way, with Gaussian noise, and a square blacked out.

    Args:
        images: in `[0, 1]`.
        generator: a CPU generator, so that the draw does not depend on the device.
        shift: largest move in pixels; black comes in from the edge.
        noise: standard deviation of the noise.
        cutout: side of the square in pixels; it lies wholly inside the image. 0 leaves it out.
    """
    n, device = len(images), images.device
    pixel = torch.arange(8, device=device)

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (2, n, 1), generator=generator).to(device)

    down, right = draw(0, 2 * shift + 1) + pixel  # (n, 8) rows and columns to read from the padded image
    views = F.pad(images, (shift,) * 4)[torch.arange(n, device=device)[:, None, None], down[:, :, None], right[:, None, :]]
    views = views + noise * torch.randn(n, 8, 8, generator=generator).to(device)
    offset = pixel - draw(0, 8 - cutout + 1)
    in_rows, in_columns = (offset >= 0) & (offset < cutout)
    return views.masked_fill(in_rows[:, :, None] & in_columns[:, None, :], 0.0)


def pretrain(
    network: JointEmbedding,
    images: Float[Tensor, "n 8 8"],
    objective: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float,
    epochs: int,
    trial: Any,
    batch: int = 128,
) -> float:
    """Train in place with Adam, without labels.

    Args:
        network: from images to representations and embeddings.
        images: what to train on.
        objective: from the embeddings of two views `(batch, embedding)`, row for row of the same images, to a scalar.
        lr: Adam's largest learning rate: it rises over the first tenth of the steps and falls to 0 as a cosine.
        epochs: passes over the images; images left over from the last whole batch wait for the next.
        trial: gives the order and the views (`.generator`) and the device.
        batch: images in a batch.

    Returns:
        The objective's mean over the last epoch.

    Raises:
        ValueError: fewer images than one batch.
    """
    if len(images) < batch:
        raise ValueError(f"images must fill a batch of {batch}, got {len(images)}")
    images = images.to(trial.device)
    network.to(trial.device).train()
    per_epoch = len(images) // batch
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=epochs * per_epoch, pct_start=0.1, cycle_momentum=False
    )
    for _ in range(epochs):
        values = []
        for rows in torch.randperm(len(images), generator=trial.generator).to(trial.device).split(batch)[:per_epoch]:
            views = torch.cat([augment(images[rows], trial.generator) for _ in range(2)])
            value = objective(*network(views)[1].chunk(2))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            values.append(value.item())
    return float(np.mean(values))


@torch.no_grad()
def embed(network: JointEmbedding, images: Float[Tensor, "n 8 8"]) -> tuple[Float[Tensor, "n r"], Float[Tensor, "n e"]]:
    """Representations and embeddings of images as they are, on the CPU."""
    representation, embedding = network.eval()(images.to(next(network.parameters()).device))
    return representation.cpu(), embedding.cpu()


def linear_probe(
    train_features: Float[Tensor, "train features"],
    train_labels: Int[Tensor, " train"],
    test_features: Float[Tensor, "test features"],
    test_labels: Int[Tensor, " test"],
) -> float:
    """Accuracy on the test set of a logistic regression on frozen, standardised features."""
    probe = _probe().fit(train_features.numpy(), train_labels.numpy())
    return float(probe.score(test_features.numpy(), test_labels.numpy()))


def cross_validated_probe(features: Float[Tensor, "n features"], labels: Int[Tensor, " n"], folds: int = 3) -> float:
    """Mean accuracy of `linear_probe` on the part left out, in turn."""
    return float(cross_val_score(_probe(), features.numpy(), labels.numpy(), cv=folds).mean())


def _probe() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
