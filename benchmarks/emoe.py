"""EMoE: the layer against the dense block with a mask, as the paper's code for Llama has it, and the balanced clustering against
an assignment problem with each cluster's column repeated.

The layer's limit is a dense block of the size of what is chosen. `k-means-constrained`, which the paper's code uses, joins the
race where it is installed.
"""

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils.benchmark import Timer

from firsthand.moe.emoe import EMoEMLP, balanced_assignment, cluster_ffn_neurons
from firsthand.moe.ffn import FFNWeights

ROUNDS = 5


def race(racers: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of a call, the racers taking turns."""
    for run in racers.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in racers}
    for _ in range(rounds):
        for name, run in racers.items():
            times[name].append(Timer("run()", globals={"run": run}).timeit(1).median)
    return {name: median(seconds) for name, seconds in times.items()}


def layer(dim: int, hidden: int, experts: int, chosen: int, tokens: int) -> None:
    torch.manual_seed(0)
    up, down = ((torch.randn(shape) / dim**0.5).requires_grad_() for shape in ((hidden, dim), (dim, hidden)))
    ffn = FFNWeights(up, down, None, None, None, None, "gelu")
    contiguous = torch.arange(hidden) // (hidden // experts)  # so that the peer need not move its neurons
    x = torch.randn(tokens, dim, requires_grad=True)
    emoe = EMoEMLP(ffn, contiguous, chosen)
    part = hidden * chosen // experts

    def masked(x: Tensor) -> Tensor:
        first = F.linear(x, up)
        scores = first.view(tokens, experts, -1).mean(-1)
        mask = torch.zeros_like(scores).scatter_(-1, scores.topk(chosen).indices, 1.0)
        return F.linear(F.gelu(first) * mask.repeat_interleave(hidden // experts, dim=-1), down)

    def limit(x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, up[:part])), down[:, :part])

    torch.testing.assert_close(emoe(x), masked(x), atol=1e-4, rtol=1e-4)

    def trained(function: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: function(x).sum().backward()

    seconds = race({"ours": trained(emoe), "mask": trained(masked), "limit": trained(limit)})
    print(
        f"  {dim} / {hidden}, {chosen} of {experts} experts, {tokens} tokens: ours {1e3 * seconds['ours']:.1f} ms, "
        f"ours / mask = {seconds['ours'] / seconds['mask']:.2f}, ours / limit = {seconds['ours'] / seconds['limit']:.2f}"
    )


def assignment(points: int, clusters: int) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(points, 64))
    cost = ((rows[:, None] - rows[rng.permutation(points)[:clusters]]) ** 2).sum(axis=2)

    def repeated() -> np.ndarray:
        _, column = linear_sum_assignment(np.repeat(cost, points // clusters, axis=1))
        return column // (points // clusters)

    costs = [cost[np.arange(points), assigned].sum() for assigned in (balanced_assignment(cost), repeated())]
    np.testing.assert_allclose(*costs)
    seconds = race({"ours": lambda: balanced_assignment(cost), "repeated": repeated}, rounds=3)
    print(
        f"  {points} points, {clusters} clusters: ours {1e3 * seconds['ours']:.1f} ms, "
        f"ours / repeated columns = {seconds['ours'] / seconds['repeated']:.3f}"
    )


def clustering(hidden: int, dim: int, experts: int) -> None:
    weight = torch.randn(hidden, dim, generator=torch.Generator().manual_seed(0))
    begun = time.perf_counter()
    cluster_ffn_neurons(weight, experts)
    ours = time.perf_counter() - begun
    print(f"  {hidden} neurons of {dim}, {experts} experts: ours {ours:.2f} s", end="")
    try:
        from k_means_constrained import KMeansConstrained
    except ImportError:
        print("; k-means-constrained is not installed")
        return
    size = hidden // experts
    begun = time.perf_counter()
    peer = KMeansConstrained(experts, size_min=size, size_max=size, n_init=1, max_iter=100, random_state=0, n_jobs=1)
    peer.fit(F.normalize(weight, dim=1).numpy())
    print(f", ours / k-means-constrained = {ours / (time.perf_counter() - begun):.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("the layer, forward and backward, float32")
    layer(384, 1536, 64, 16, tokens=256)
    layer(384, 1536, 16, 4, tokens=256)
    layer(768, 3072, 64, 16, tokens=512)
    print("balanced assignment, once")
    assignment(256, 16)
    assignment(1536, 64)
    print("clustering the neurons of a block")
    clustering(1536, 384, 64)
    clustering(4096, 1024, 64)
