"""A small class-conditional diffusion transformer on 8×8 pictures: training, sampling, and how close its samples come.

The pictures are handwritten digits, or Fashion-MNIST where it is on the machine. The transformer is that of DiT: a token for each
patch, blocks whose norms are shifted, scaled and gated by time and class. Closeness is the Fréchet distance between features of
a small classifier.
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from firsthand.data import load
from firsthand.testbeds.digits import CLASSES, Labelled, linear
from firsthand.testbeds.lm import learning_rate

SIDE = 8
TIMES = 100  # steps of the forward process


def pictures(name: str, rng: np.random.Generator, most: int = 12_000) -> Labelled:
    """All pictures of a data set in a random order, 8×8.

    Args:
        name: `"digits"`, or `"fashion-mnist"`, whose pictures get a black border and are averaged over 4×4 pixels.
        rng: draws the order.
        most: how many at most.

    Raises:
        ValueError: another name.
    """
    if name not in ("digits", "fashion-mnist"):
        raise ValueError(f"name must be 'digits' or 'fashion-mnist', got {name!r}")
    found = load(name)
    prefix = "" if name == "digits" else "train_"
    images, labels = found[f"{prefix}images"], found[f"{prefix}labels"]
    order = rng.permutation(len(images))[:most]
    images, labels = torch.from_numpy(images[order]), torch.from_numpy(labels[order])
    if name == "fashion-mnist":
        images = F.avg_pool2d(F.pad(images.float() / 255, (2,) * 4)[:, None], 4)[:, 0]
    return Labelled(images, labels)


# The network


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (linear(width, width, generator) for _ in range(4))

    def forward(self, x: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n tokens width"]:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, generator: torch.Generator) -> None:
        super().__init__()
        self.attention = Attention(width, heads, generator)
        self.fc1, self.fc2 = linear(width, 2 * width, generator), linear(2 * width, width, generator)
        self.modulation = silent(width, 6 * width)

    def forward(self, x: Float[Tensor, "n tokens width"], condition: Float[Tensor, "n width"]) -> Float[Tensor, "n tokens width"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(normed(x) * (1 + scale1) + shift1)
        return x + gate2 * self.fc2(F.gelu(self.fc1(normed(x) * (1 + scale2) + shift2)))


class Denoiser(nn.Module):
    """From noisy pictures in about [-1, 1], times in [0, 1] and classes to the noise in the pictures."""

    def __init__(
        self, generator: torch.Generator, classes: int, *, width: int = 48, layers: int = 4, heads: int = 3, patch: int = 2
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embed = linear(patch * patch, width, generator)
        self.position = nn.Parameter(0.5 * torch.randn((SIDE // patch) ** 2, width, generator=generator))
        self.time = nn.Sequential(linear(width, width, generator), nn.SiLU(), linear(width, width, generator))
        self.classes = class_embedding(classes, width, generator)
        self.blocks = nn.ModuleList(Block(width, heads, generator) for _ in range(layers))
        self.modulation = silent(width, 2 * width)
        self.out = silent(width, patch * patch)

    def forward(
        self, noisy: Float[Tensor, "n 8 8"], times: Float[Tensor, " n"], labels: Int[Tensor, " n"]
    ) -> Float[Tensor, "n 8 8"]:
        width = self.position.shape[1]
        frequencies = torch.exp(torch.linspace(0, math.log(1000), width // 2, device=times.device))
        angles = times[:, None] * frequencies
        condition = F.silu(self.time(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.classes(labels))
        patches = F.unfold(noisy[:, None], self.patch, stride=self.patch).transpose(1, 2)
        x = self.embed(patches) + self.position
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        patches = self.out(normed(x) * (1 + scale) + shift).transpose(1, 2)
        return F.fold(patches, (SIDE, SIDE), self.patch, stride=self.patch)[:, 0]


def class_embedding(classes: int, width: int, generator: torch.Generator) -> nn.Embedding:
    """A vector for each class, from `generator`."""
    return nn.Embedding.from_pretrained(torch.randn(classes, width, generator=generator), freeze=False)


def silent(inputs: int, outputs: int) -> nn.Linear:
    """A layer that begins at zero, as DiT's modulation and last layer do."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


# Training and sampling


def signal(times: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The share of the picture's variance that is left at a time in [0, 1]: the cosine schedule."""
    return torch.cos((times + 0.008) / 1.008 * torch.pi / 2).square().clamp(1e-4, 0.9999)


def fit(
    model: nn.Module, data: Labelled, *, steps: int, lr: float, seed: int, trial: Any, batch: int = 32, label: str = "training"
) -> float:
    """Train what needs gradients, in place, to predict the noise; Adam, the rate rises and falls as a cosine.

    Args:
        model: from noisy pictures, times and labels to the noise.
        data: pictures in [0, 1].
        steps: optimiser steps.
        lr: largest learning rate.
        seed: of pictures, times and noise.
        trial: device and progress.
        batch: pictures drawn in a step, with replacement.
        label: what the progress is called.

    Returns:
        The mean loss over the last fifth of the steps.
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = data.images.to(trial.device) * 2 - 1, data.labels.to(trial.device)
    model.to(trial.device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr, betas=(0.9, 0.99), fused=True)
    losses = []
    for step in trial.track(range(steps), label):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, lr, floor=0.01)
        rows = torch.randint(len(images), (batch,), generator=generator).to(trial.device)
        times = (torch.randint(1, TIMES + 1, (batch,), generator=generator) / TIMES).to(trial.device)
        noise = torch.randn(batch, SIDE, SIDE, generator=generator).to(trial.device)
        left = signal(times)[:, None, None]
        loss = F.mse_loss(model(left.sqrt() * images[rows] + (1 - left).sqrt() * noise, times, labels[rows]), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses[-max(1, steps // 5) :]).mean().item()


@torch.no_grad()
def sample(model: nn.Module, labels: Int[Tensor, " n"], *, seed: int, trial: Any, steps: int = 20) -> Float[Tensor, "n 8 8"]:
    """Pictures in [0, 1] of given classes, by the deterministic sampler of DDIM.

    Args:
        model: from noisy pictures, times and labels to the noise.
        labels: the classes.
        seed: of the noise to begin with.
        trial: the device.
        steps: how often the model is asked.
    """
    model.eval()
    labels = labels.to(trial.device)
    x = torch.randn(len(labels), SIDE, SIDE, generator=torch.Generator().manual_seed(seed)).to(trial.device)
    times = torch.linspace(1, 0, steps + 1, device=trial.device)
    for now, then in pairwise(times):
        here, there = signal(now), signal(then)
        noise = model(x, now.expand(len(labels)), labels)
        picture = ((x - (1 - here).sqrt() * noise) / here.sqrt()).clamp(-1, 1)
        noise = (x - here.sqrt() * picture) / (1 - here).sqrt()
        x = there.sqrt() * picture + (1 - there).sqrt() * noise
    return (picture.cpu() + 1) / 2


# How close


class Classifier(nn.Module):
    """A small convolutional classifier, whose 32 features before the last layer pictures are compared by."""

    def __init__(self, generator: torch.Generator, channels: int = 16, features: int = 32) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.utils.skip_init(nn.Conv2d, *sizes, 3, padding=1) for sizes in ((1, channels), (channels, 2 * channels))
        )
        for layer in self.convolutions:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
        self.hidden = linear(2 * channels * (SIDE // 2) ** 2, features, generator)
        self.head = linear(features, CLASSES, generator)

    def features(self, images: Float[Tensor, "n 8 8"]) -> Float[Tensor, "n features"]:
        x = images[:, None]
        for layer in self.convolutions:
            x = F.relu(layer(x))
        return F.relu(self.hidden(F.max_pool2d(x, 2).flatten(1)))

    def forward(self, images: Float[Tensor, "n 8 8"]) -> Float[Tensor, "n 10"]:
        return self.head(self.features(images))


class Quality(NamedTuple):
    """Of samples."""

    distance: float  # Fréchet distance to real pictures, 0 for the same mean and covariance of features
    accuracy: float  # share that the classifier takes for the class they were to be


@torch.no_grad()
def quality(
    judge: Classifier, samples: Float[Tensor, "n 8 8"], labels: Int[Tensor, " n"], real: Float[Tensor, "m 8 8"]
) -> Quality:
    """How close samples are to real pictures.

    Args:
        judge: a trained classifier.
        samples: in [0, 1].
        labels: in [0, 10), the classes they were asked for.
        real: pictures of the same classes, in about the same shares.
    """
    judge = judge.eval().cpu()
    accuracy = (judge(samples).argmax(dim=1) == labels).double().mean().item()
    return Quality(frechet_distance(judge.features(samples), judge.features(real)), accuracy)


def frechet_distance(a: Float[Tensor, "n features"], b: Float[Tensor, "m features"]) -> float:
    r"""Of two normal distributions with the means and covariances of two samples.

    $$ \lVert \mu_a - \mu_b \rVert^2 + \operatorname{tr}\big(C_a + C_b - 2 (C_a^{1/2} C_b C_a^{1/2})^{1/2}\big) $$
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    middle = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(dim=0) - b.mean(dim=0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * middle
    return max(distance.item(), 0.0)
