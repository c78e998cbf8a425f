"""What KIND's layer costs: against the dense layer it replaces, a low-rank layer, and LoRA as peft does it.

Forward and backward on one thread. The ratio of arithmetic is what the factors say: (in + out) times the components, to in times
out. The limit is a low-rank layer of as many components, all open and without a gate.
"""

import copy
from collections.abc import Callable
from statistics import median

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from firsthand.weights.kind import DiversionLinear, attach_tailors, class_gate, divert, merge

ROUNDS = 7
CLASSES = 6


def race(racers: dict[str, Callable[[], object]], number: int) -> dict[str, float]:
    """Median seconds a call, the racers taking turns."""
    times: dict[str, list[float]] = {name: [] for name in racers}
    timers = {name: Timer("call()", globals={"call": call}) for name, call in racers.items()}
    for timer in timers.values():
        timer.timeit(1)
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            times[name].append(timer.timeit(number).median)
    return {name: median(seconds) for name, seconds in times.items()}


def trained(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        layer.zero_grad()
        layer(x).square().mean().backward()

    return step


def pretraining(width: int, samples: int, tokens: int) -> None:
    shared, tailor = width // 2, width // 2 // CLASSES
    rank = shared + CLASSES * tailor
    x, ids = torch.randn(samples, tokens, width, requires_grad=True), torch.arange(samples) % CLASSES
    ours, dense = DiversionLinear(width, width, shared, CLASSES, tailor), nn.Linear(width, width)
    limit = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))
    ours.class_ids = ids
    for row in range(CLASSES):
        expected = nn.functional.linear(x[row], ours.dense_weight(row), ours.bias)
        torch.testing.assert_close(ours(x[row : row + 1], ids[row : row + 1])[0], expected, atol=1e-4, rtol=1e-4)
    number = max(2, 10**9 // (samples * tokens * width * width * 6))
    seconds = race({"ours": trained(ours, x), "dense": trained(dense, x), "limit": trained(limit, x)}, number)
    print(
        f"width {width}, {samples}×{tokens} tokens, {rank} components: ours / dense = {seconds['ours'] / seconds['dense']:.2f} "
        f"(arithmetic {2 * rank / width:.2f}), ours / low-rank = {seconds['ours'] / seconds['limit']:.2f}"
    )


def adaptation(width: int, samples: int, tokens: int) -> None:
    """Only the tailors of four new classes, or an adapter of as many parameters, are trained."""
    rank = width // 2 // CLASSES
    base = nn.Sequential(nn.Linear(width, width))
    x, ids = torch.randn(samples, tokens, width), torch.arange(samples) % 4
    ours = divert(copy.deepcopy(base), width // 2, CLASSES, rank, target=("0",))
    attach_tailors(ours, 4, rank)
    peer = inject_adapter_in_model(LoraConfig(r=4 * rank, lora_alpha=4 * rank, target_modules=["0"]), copy.deepcopy(base))
    with class_gate(ours, ids):
        torch.testing.assert_close(ours(x)[:1], merge(ours, 0)(x[:1]), atol=1e-4, rtol=1e-4)
        number = max(2, 10**9 // (samples * tokens * width * width * 6))
        seconds = race({"ours": trained(ours, x), "peer": trained(peer, x)}, number)
    print(f"width {width}, adaptation with rank {4 * rank}: ours / peft's LoRA = {seconds['ours'] / seconds['peer']:.2f}")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for width, samples, tokens in ((48, 32, 16), (256, 16, 64), (768, 8, 64)):
        pretraining(width, samples, tokens)
        adaptation(width, samples, tokens)


if __name__ == "__main__":
    main()
