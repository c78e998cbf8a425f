"""A search for starting weights of an attention-LSTM: the population in one pass, one by one, and SciPy's differential evolution.

All searches evaluate as many individuals. SciPy's runs DE/rand/1/bin as ours without clusters does, one individual at a time, as
is its default, on the same loss. The limit is what the losses alone take, in one pass, without a search around them.
"""

from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from scipy.optimize import differential_evolution
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from firsthand.match.clude import clude_initialize
from firsthand.match.focal import sigmoid_focal_loss
from firsthand.match.plagiarism import AttentionLSTMPair, population_logits

ROUNDS = 3
POPULATION = 30


def race(racers: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds a call, the racers taking turns."""
    times: dict[str, list[float]] = {name: [] for name in racers}
    timers = {name: Timer("call()", globals={"call": call}) for name, call in racers.items()}
    for timer in timers.values():
        timer.timeit(1)
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            times[name].append(timer.timeit(1).median)
    return {name: median(seconds) for name, seconds in times.items()}


def texts(count: int, longest: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random token vectors; lengths are uniform."""
    lengths = torch.randint(3, longest + 1, (count,), generator=generator)
    return torch.randn(count, longest, width, generator=generator), torch.arange(longest) < lengths[:, None]


def stacked(modules: list[nn.Module]) -> dict[str, Tensor]:
    return {name: torch.stack([m.get_parameter(name).detach() for m in modules]) for name, _ in modules[0].named_parameters()}


@torch.no_grad()
def one_pass(width: int = 64, hidden: int = 16) -> None:
    print(f"logits of {POPULATION} attention-LSTMs, width {width}, hidden {hidden}, texts of 3 to 40 tokens")
    for count in (16, 64, 128):
        generator = torch.Generator().manual_seed(0)
        inputs = [*texts(count, 40, width, generator), *texts(count, 40, width, generator)]
        modules = [AttentionLSTMPair(width, hidden, generator=generator) for _ in range(POPULATION)]
        stack = stacked(modules)

        def ours(stack=stack, inputs=inputs):
            return population_logits(stack, *inputs)

        def loop(modules=modules, inputs=inputs):
            return torch.stack([module(*inputs) for module in modules])

        torch.testing.assert_close(ours(), loop(), atol=1e-5, rtol=1e-4)
        seconds = race({"ours": ours, "loop": loop})
        print(f"  {count} pairs: ours {1e3 * seconds['ours']:.1f} ms, ours / nn.LSTM = {seconds['ours'] / seconds['loop']:.3f}")


def search(pairs: int = 64, generations: int = 4, width: int = 64, hidden: int = 16) -> None:
    evaluations = POPULATION * (1 + generations)
    print(f"differential evolution of its weights: {evaluations} evaluations of focal loss on {pairs} pairs")
    generator = torch.Generator().manual_seed(0)
    inputs = [*texts(pairs, 40, width, generator), *texts(pairs, 40, width, generator)]
    target = (torch.arange(pairs) % 6 == 0).float()

    def fresh() -> AttentionLSTMPair:
        return AttentionLSTMPair(width, hidden, generator=torch.Generator().manual_seed(0))

    def loss(logits: Tensor) -> Tensor:
        return sigmoid_focal_loss(logits, target.expand_as(logits), reduction="none").mean(dim=-1)

    def find(loss_fn: Callable[..., Tensor], is_stacked: bool) -> object:
        return clude_initialize(
            fresh(), loss_fn, stacked=is_stacked, pop_size=POPULATION, generations=generations, clustering=False,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip

    def ours() -> object:
        return find(lambda parameters: loss(population_logits(parameters, *inputs)), True)

    def loop() -> object:
        return find(lambda module: loss(module(*inputs)), False)

    module = fresh()
    first = ours()
    torch.testing.assert_close(torch.tensor(first.history), torch.tensor(loop().history), atol=1e-5, rtol=1e-4)
    dimensions = len(first.x)
    drawn = np.random.default_rng(0).uniform(-0.4, 0.4, (POPULATION, dimensions))

    @torch.no_grad()
    def loss_of(weights: np.ndarray) -> float:
        nn.utils.vector_to_parameters(torch.from_numpy(weights).float(), module.parameters())
        return loss(module(*inputs)).item()

    def scipys() -> object:
        return differential_evolution(
            loss_of, [(-0.4, 0.4)] * dimensions, strategy="rand1bin", mutation=0.5, recombination=0.9, init=drawn,
            maxiter=generations, tol=0.0, polish=False, updating="deferred", workers=1, rng=0,
        )  # fmt: skip

    torch.testing.assert_close(loss_of(first.x.numpy()), first.fun, atol=1e-5, rtol=1e-4)
    assert scipys().nfev == evaluations
    stack = stacked([fresh() for _ in range(POPULATION)])

    def limit() -> None:
        for _ in range(1 + generations):
            loss(population_logits(stack, *inputs))

    seconds = race({"ours": ours, "loop": loop, "scipy": scipys, "limit": limit})
    print(
        f"  ours {seconds['ours']:.2f} s; ours / one by one = {seconds['ours'] / seconds['loop']:.3f}, "
        f"ours / SciPy = {seconds['ours'] / seconds['scipy']:.3f}, ours / limit = {seconds['ours'] / seconds['limit']:.3f}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_pass()
    search()
