"""RankMe from a streamed Gram matrix, raced against singular values of all embeddings at once.

`python benchmarks/rankme.py` prints ratios of times: below 1, ours is faster.
"""

from statistics import median

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from firsthand.diagnose.rankme import RankMe, rankme

ROUNDS = 5


def from_svd(Z: Tensor, eps: float = 1e-7) -> Tensor:
    """What one would write without thinking: equation 1 on `torch.linalg.svdvals`."""
    sigma = torch.linalg.svdvals(Z)
    p = sigma / sigma.sum() + eps
    return (-p * p.log()).sum().exp()


def gathered(batches: list[Tensor]) -> Tensor:
    """Keep every batch, then decompose all of them."""
    return from_svd(torch.cat(batches))


def streamed(batches: list[Tensor]) -> Tensor:
    metric = RankMe()
    for batch in batches:
        metric.update(batch)
    return metric.compute()


def race(**statements: tuple[str, dict]) -> dict[str, float]:
    """Median seconds of each, taken in turns so that a busy machine slows all alike."""
    timers = {name: Timer(code, globals=scope, num_threads=torch.get_num_threads()) for name, (code, scope) in statements.items()}
    times: dict[str, list[float]] = {name: [] for name in timers}
    for timer in timers.values():
        timer.timeit(1)
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            times[name].append(timer.timeit(1).median)
    return {name: median(values) for name, values in times.items()}


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device}, {torch.get_num_threads()} threads; ratios of times, ours / other")
    header = (
        "one shot / svdvals fp32",
        "/ svdvals fp64",
        "streamed / gather all",
        "one shot / fp64 ZᵀZ",
        "/ read Z",
        "bytes kept, ours / all rows",
    )
    print(f"{'rows × features':>16}  " + "  ".join(header))
    for rows, features in ((25_600, 64), (25_600, 256), (12_800, 512)):
        scale = torch.logspace(0, -3, features)
        Z = (torch.randn(rows, features, generator=torch.Generator().manual_seed(0)) * scale).to(device)
        batches = list(Z.split(256))
        for other in (from_svd(Z.double()), streamed(batches), gathered(batches).double()):
            torch.testing.assert_close(other, rankme(Z), rtol=1e-4, atol=0)
        scope = {"Z": Z, "batches": batches, **globals()}
        seconds = race(
            ours=("rankme(Z).item()", scope),
            fp32=("from_svd(Z).item()", scope),
            fp64=("from_svd(Z.double()).item()", scope),
            streamed=("streamed(batches).item()", scope),
            gathered=("gathered(batches).item()", scope),
            product=("W = Z.double(); (W.T @ W)[0, 0].item()", scope),
            read=("Z.sum().item()", scope),
        )
        ours = seconds["ours"]
        ratios = (
            ours / seconds["fp32"],
            ours / seconds["fp64"],
            seconds["streamed"] / seconds["gathered"],
            ours / seconds["product"],
            ours / seconds["read"],
            8 * features * (features + 1) / (4 * rows * features),
        )
        print(
            f"{rows:>8} × {features:<5}  "
            + "  ".join(f"{ratio:>{len(name)}.3g}" for ratio, name in zip(ratios, header, strict=True))
        )


if __name__ == "__main__":
    main()
