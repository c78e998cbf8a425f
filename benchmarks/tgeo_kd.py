"""TGeo-KD: what a step costs against a plain distillation step, by how often the ratio network is trained.

The peer for the virtual step is written by hand for a network of two layers, as libraries for inner loops do it: parameters as
arguments, one step, the loss, its gradient.
"""

from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from firsthand.distill.tgeo_kd import (
    FusionRatioNet,
    class_mean_probs,
    fused_kd_loss,
    fusion_ratio_step,
    tgeo_kd_step,
    trilateral_features,
)

ROUNDS, BATCH, WIDTH, CLASSES = 9, 128, 512, 20


def race(racers: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds a call, the racers taking turns."""
    times: dict[str, list[float]] = {name: [] for name in racers}
    for name in [*racers] + [*racers] * ROUNDS:
        times[name].append(Timer("call()", globals={"call": racers[name]}).timeit(20).median)
    return {name: median(seconds[1:]) for name, seconds in times.items()}


def main() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    net = FusionRatioNet(CLASSES)
    batch, val = ((torch.randn(BATCH, WIDTH), torch.arange(BATCH) % CLASSES) for _ in range(2))
    teacher = torch.randn(BATCH, CLASSES)
    means = class_mean_probs(teacher.softmax(-1), batch[1], CLASSES)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    ratio_optimizer = torch.optim.SGD(net.parameters(), lr=0.0)

    def plain() -> None:
        optimizer.zero_grad()
        fused_kd_loss(student(batch[0]), teacher, batch[1], 0.5).backward()
        optimizer.step()

    def fused(every: int) -> Callable[[], None]:
        count = iter(range(1_000_000))

        def call() -> None:
            tgeo_kd_step(
                student, optimizer, batch, teacher, net, means,
                val_batch=val, ratio_optimizer=ratio_optimizer, step=next(count), every=every,
            )  # fmt: skip

        return call

    def ours() -> Tensor:
        fusion_ratio_step(student, batch, val, teacher, net, ratio_optimizer, means, 0.1)
        gradient = next(net.parameters()).grad
        assert gradient is not None
        return gradient.clone()

    def by_hand() -> Tensor:
        weights = [p.detach().requires_grad_() for p in student.parameters()]

        def logits(x: Tensor, w: list[Tensor]) -> Tensor:
            return F.linear(F.relu(F.linear(x, w[0], w[1])), w[2], w[3])

        z = logits(batch[0], weights)
        ratio = net(trilateral_features(z.softmax(-1), teacher.softmax(-1), batch[1], means))
        gradients = torch.autograd.grad(fused_kd_loss(z, teacher, batch[1], ratio), weights, create_graph=True)
        moved = [w - 0.1 * g for w, g in zip(weights, gradients, strict=True)]
        return torch.autograd.grad(F.cross_entropy(logits(val[0], moved), val[1]), list(net.parameters()))[0]

    torch.testing.assert_close(ours(), by_hand())
    racers = {"plain": plain, "ours": ours, "by hand": by_hand} | {f"every {k}": fused(k) for k in (1, 2, 5)}
    spent = race(racers)
    print(f"an MLP of width {WIDTH}, batch {BATCH}, as many validation samples; the same gradient as by hand")
    print(f"  the network's step: ours / by hand = {spent['ours'] / spent['by hand']:.2f}")
    for k in (1, 2, 5):
        print(f"  a whole step, network trained in every {k}: / plain distillation = {spent[f'every {k}'] / spent['plain']:.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
