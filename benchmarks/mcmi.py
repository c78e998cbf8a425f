"""MCMI: what its loss adds to a training step with cross-entropy, and its metric against one that keeps all answers."""

from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from firsthand.distill.mcmi import ConditionalMutualInformation, class_centroids, conditional_mutual_information, mcmi_loss

ROUNDS, BATCH, CLASSES = 11, 64, 100


def race(racers: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds a call, the racers taking turns."""
    times: dict[str, list[float]] = {name: [] for name in racers}
    for name in [*racers] + [*racers] * ROUNDS:
        times[name].append(Timer("call()", globals={"call": racers[name]}).timeit(5).median)
    return {name: median(seconds[1:]) for name, seconds in times.items()}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, CLASSES))


def steps() -> None:
    model, images, labels = network(), torch.randn(BATCH, 3, 32, 32), torch.arange(BATCH) % CLASSES
    centroids = class_centroids(model(images).detach(), labels, CLASSES)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "cross-entropy": lambda logits: F.cross_entropy(logits, labels),
        "MCMI": lambda logits: mcmi_loss(logits, labels, centroids),
    }

    def step(name: str) -> None:
        losses[name](model(images)).backward()

    spent = race({name: lambda name=name: step(name) for name in losses})
    print(f"a step with {CLASSES} classes, batch {BATCH}: MCMI / cross-entropy = {spent['MCMI'] / spent['cross-entropy']:.3f}")
    logits = model(images).detach().requires_grad_()
    alone = race({name: lambda loss=loss: loss(logits).backward() for name, loss in losses.items()})
    print(f"  the loss alone: {alone['MCMI'] / alone['cross-entropy']:.1f}")


def metric(samples: int = 20_000) -> None:
    logits, labels = torch.randn(samples, CLASSES), torch.arange(samples) % CLASSES

    def streamed() -> Tensor:
        found = ConditionalMutualInformation(CLASSES)
        for some, of in zip(logits.split(500), labels.split(500), strict=True):
            found.update(some, of)
        return found.compute()

    def kept() -> Tensor:
        answers = [(some, of) for some, of in zip(logits.split(500), labels.split(500), strict=True)]
        together = torch.cat([some for some, _ in answers]).double()
        return conditional_mutual_information(together, torch.cat([of for _, of in answers]), CLASSES)

    torch.testing.assert_close(streamed(), kept())
    spent = race({"streamed": streamed, "kept": kept})
    numbers = CLASSES**2 + 2 * CLASSES
    print(f"metric over {samples} samples: streamed / kept = {spent['streamed'] / spent['kept']:.2f} of the time, ", end="")
    print(f"{numbers / (samples * CLASSES):.3f} of the numbers in memory")


if __name__ == "__main__":
    torch.set_num_threads(1)
    steps()
    metric()
