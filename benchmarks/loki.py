"""Loki raced against the direct product of probabilities and squared distances, as the paper's code has it.

`python benchmarks/loki.py` prints ratios of times: below 1, ours is faster.
"""

import resource
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from firsthand.decode.locus import graph_distances
from firsthand.decode.loki import loki_predict, loki_predict_embedding, loki_predict_tree

SAMPLES = 1000


def race(rounds: int = 5, **racers: Callable[[], object]) -> dict[str, float]:
    """Median seconds a call, the racers taking turns."""
    timers = {name: Timer("call()", globals={"call": call}) for name, call in racers.items()}
    times: dict[str, list[float]] = {name: [] for name in timers}
    for timer in timers.values():
        timer.timeit(1)
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(1).median)
    return {name: median(each) for name, each in times.items()}


def probabilities(observed: int) -> Tensor:
    return torch.randn(SAMPLES, observed, generator=torch.Generator().manual_seed(0)).mul(3).softmax(dim=1)


def check(probs: Tensor, squared: Tensor, found: Tensor, expected: Tensor) -> None:
    """The same labels, or others that cost the same but for rounding."""
    at = (found != expected).nonzero().flatten()
    cost, least = ((probs[at].double() * squared[:, labels[at]].T.double()).sum(dim=1) for labels in (found, expected))
    torch.testing.assert_close(cost, least, rtol=1e-4, atol=1e-6)


def tree(nodes: int, fan: int) -> Tensor:
    child = torch.arange(1, nodes)
    return torch.stack([(child - 1) // fan, child], dim=1)


def on_a_matrix() -> None:
    labels, observed = 4000, torch.arange(0, 4000, 4)
    p, d = probabilities(len(observed)), graph_distances(tree(labels, 6), labels, sources=observed)
    squared = d.square().numpy()
    check(p, d.square(), loki_predict(p, d), torch.from_numpy(np.argmin(p.numpy() @ squared, axis=1)))
    seconds = race(
        ours=lambda: loki_predict(p, d),
        numpy=lambda: np.argmin(p.numpy() @ squared, axis=1),
        torch=lambda: (p @ d).argmin(dim=1),
        limit=lambda: p @ d,
    )
    ratios = {name: seconds["ours"] / seconds[name] for name in ("numpy", "torch", "limit")}
    print(f"matrix, {labels} labels, {len(observed)} observed: ours / argmin(P @ D²) with D² at hand, in NumPy ", end="")
    print(f"{ratios['numpy']:.2f}, in torch {ratios['torch']:.2f}; ours / torch's product alone {ratios['limit']:.2f}")


def on_trees() -> None:
    for labels, fan, share in ((10_000, 10, 10), (100_000, 10, 400)):
        edges, observed = tree(labels, fan), torch.randperm(labels, generator=torch.Generator().manual_seed(1))[: labels // share]
        p = probabilities(len(observed))
        begun = time.perf_counter()
        squared = graph_distances(edges, labels, sources=observed).square()
        building = time.perf_counter() - begun
        check(p, squared, loki_predict_tree(p, edges, observed), (p @ squared).argmin(dim=1))
        seconds = race(
            3,
            ours=lambda: loki_predict_tree(p, edges, observed),  # noqa: B023
            product=lambda: (p @ squared).argmin(dim=1),  # noqa: B023
        )
        given, both = seconds["ours"] / seconds["product"], seconds["ours"] / (seconds["product"] + building)
        print(f"tree, {labels} labels, {len(observed)} observed: ours {seconds['ours']:.3f} s, ", end="")
        print(f"ours / product with D² at hand {given:.3f}, / product and making D² {both:.4f}")


def on_a_large_tree() -> None:
    print(f"tree, 100 000 labels, {SAMPLES} samples, where no matrix fits (half of the labels observed would take 20 GB)")
    for name, edges, observed in (
        ("7 levels, 50 000 observed", tree(100_000, 10), 50_000),
        ("17 levels, 50 000 observed", tree(100_000, 2), 50_000),
        ("7 levels, 1 000 observed", tree(100_000, 10), 1_000),
    ):
        chosen = torch.randperm(100_000, generator=torch.Generator().manual_seed(1))[:observed]
        p = probabilities(observed)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = race(1, ours=lambda: loki_predict_tree(p, edges, chosen))["ours"]  # noqa: B023
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(f"  {name}: {seconds:.2f} s; peak memory grew by {more:.0f} MB")
    edges, ends = tree(3_000, 1), torch.tensor([0, 1_000, 2_999])
    p = probabilities(3)
    squared = graph_distances(edges, 3_000, sources=ends).square()
    check(p, squared, loki_predict_tree(p, edges, ends), (p @ squared).argmin(dim=1))
    seconds = race(3, ours=lambda: loki_predict_tree(p, edges, ends), product=lambda: (p @ squared).argmin(dim=1))
    ratio = seconds["ours"] / seconds["product"]
    print(f"  the worst case, a line of 3 000 nodes: {seconds['ours']:.2f} s, ours / product with D² at hand {ratio:.0f}")


def on_points() -> None:
    labels, observed, width = 20_000, torch.arange(0, 20_000, 20), 64
    points = torch.randn(labels, width, generator=torch.Generator().manual_seed(0))
    p = probabilities(len(observed))
    squared = torch.cdist(points[observed], points).square()
    check(p, squared, loki_predict_embedding(p, points[observed], points), (p @ squared).argmin(dim=1))
    seconds = race(
        3,
        ours=lambda: loki_predict_embedding(p, points[observed], points),
        product=lambda: (p @ squared).argmin(dim=1),
        limit=lambda: (p @ points[observed]) @ points.T,
    )
    print(f"points, {labels} labels, {len(observed)} observed, width {width}: ours / product with D² at hand ", end="")
    print(f"{seconds['ours'] / seconds['product']:.3f}; ours / the two small products {seconds['ours'] / seconds['limit']:.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    on_a_large_tree()
    on_a_matrix()
    on_trees()
    on_points()
