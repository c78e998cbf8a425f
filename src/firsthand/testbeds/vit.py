"""A tiny vision transformer on handwritten digits: transformers' ViT on 8×8 images, trained in seconds.

Needs transformers (`pip install 'firsthand[hf]'`).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from firsthand.testbeds.digits import CLASSES
from firsthand.testbeds.lm import learning_rate


class MeanPooledViT(ViTForImageClassification):
    """A ViT that classifies the mean of its patches and not the class token, which stays as one more token to attend to.

    Weights, names and configuration are those of its parent, so `ViTForImageClassification` loads it too, and then reads the
    class token. The mean is taken after the last norm.
    """

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> ImageClassifierOutput:
        patches = self.vit(pixel_values, **kwargs).last_hidden_state[:, 1:]
        return ImageClassifierOutput(logits=self.classifier(patches.mean(dim=1)))


def vit(generator: torch.Generator, layers: int, *, hidden: int = 48, heads: int = 3, patch: int = 2) -> MeanPooledViT:
    """A classifier of digits with its initial weights drawn from `generator`: 8×8 pixels, one channel, ten classes, no dropout.

    Args:
        generator: draws the weights.
        layers: number of blocks.
        hidden: width; the MLPs are twice as wide.
        heads: of the attention; they divide `hidden`.
        patch: side of a patch in pixels, a divisor of 8.

    Raises:
        ValueError: `heads` does not divide `hidden`, or `patch` does not divide 8.
    """
    if hidden % heads:
        raise ValueError(f"heads must divide hidden {hidden}, got {heads}")
    if patch < 1 or 8 % patch:
        raise ValueError(f"patch must divide 8, got {patch}")
    config = ViTConfig(
        image_size=8,
        patch_size=patch,
        num_channels=1,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_labels=CLASSES,
        initializer_range=0.02
        * (384 / hidden) ** 0.5,  # what 0.02 is to a ViT-S: with 0.02 itself these would begin almost silent
    )
    return initialised(lambda: MeanPooledViT(config), generator)


def cnn(generator: torch.Generator, channels: int = 32) -> nn.Sequential:
    """A small convolutional classifier, better at digits than the ViT, to teach it: from images (n, 1, 8, 8) to logits."""
    return initialised(
        lambda: nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * channels * 16, CLASSES),
        ),
        generator,
    )


def initialised(build: Callable[[], Any], generator: torch.Generator) -> Any:
    """What `build` makes, with weights drawn from `generator`: it is lent a global generator that is seeded from ours."""
    seed = torch.randint(2**62, (), generator=generator).item()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def fit(
    model: nn.Module,
    images: Float[Tensor, "n 8 8"],
    labels: Shaped[Tensor, "n *what"],
    *,
    epochs: int,
    lr: float,
    trial: Any,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    batch: int = 64,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    after_epoch: Callable[[int], None] | None = None,
    label: str = "epochs",
) -> None:
    """Train in place with AdamW; the learning rate rises to `lr` and falls as a cosine to a hundredth of it.

    Args:
        model: from images (n, 1, 8, 8) to logits, or to an object that has `.logits`. What needs no gradient is not trained.
        images: in [0, 1].
        labels: whatever `loss` wants beside the logits, a row for each image: classes, or a teacher's logits.
        epochs: passes over the images; 0 leaves the model as it is.
        lr: largest learning rate.
        trial: gives the order (`.generator`) and the device, and shows progress.
        loss: from logits and rows of `labels` to a scalar; None for cross-entropy.
        batch: images in a batch; the last one may be smaller.
        weight_decay: of AdamW, on matrices only.
        warmup: share of the steps in which the learning rate rises.
        after_epoch: called with the number of epochs done; it may change the mode of the model.
        label: what the progress is called.
    """
    loss = loss or F.cross_entropy
    images, labels = images.to(trial.device)[:, None], labels.to(trial.device)
    model.to(trial.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    step, steps = 0, epochs * -(-len(images) // batch)
    for epoch in trial.track(range(epochs), label):
        model.train()
        for rows in torch.randperm(len(images), generator=trial.generator).to(trial.device).split(batch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr, warmup, floor=0.01)
            optimizer.zero_grad()
            loss(_logits(model, images[rows]), labels[rows]).backward()
            optimizer.step()
            step += 1
        if after_epoch is not None:
            after_epoch(epoch + 1)


@torch.no_grad()
def predict(model: nn.Module, images: Float[Tensor, "n 8 8"]) -> Float[Tensor, "n classes"]:
    """The logits of a model in evaluation mode, on the CPU; its mode is left as it was."""
    mode = model.training
    logits = _logits(model.eval(), images.to(next(model.parameters()).device)[:, None]).cpu()
    model.train(mode)
    return logits


def accuracy(model: nn.Module, images: Float[Tensor, "n 8 8"], labels: Int[Tensor, " n"]) -> float:
    """Share of the images that a model puts into their class."""
    return (predict(model, images).argmax(dim=1) == labels.cpu()).double().mean().item()


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    output = model(images)
    return output if isinstance(output, Tensor) else output.logits
