"""A layer behind a dense-to-sparse gate, forward and backward: only the chosen pairs of token and expert against all of them.

One peer works out all experts for all tokens and sums them with the gate's weights. The other dispatches and combines as the
method's published code does, with a tensor of tokens × experts × tokens. The limit is one dense block on as many rows as there
are chosen pairs; where these are many, it can be beaten, because an expert's share of them fits the cache better.
"""

from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

from firsthand.moe.evomoe import DTSRouter
from firsthand.moe.layer import MoE

ROUNDS = 5
TOKENS, DIM, HIDDEN, EXPERTS = 512, 128, 352, 8


def race(racers: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds a call, the racers taking turns."""
    times: dict[str, list[float]] = {name: [] for name in racers}
    timers = {name: Timer("call()", globals={"call": call}) for name, call in racers.items()}
    for timer in timers.values():
        timer.timeit(1)
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            times[name].append(timer.timeit(2).median)
    return {name: median(seconds) for name, seconds in times.items()}


def expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def compare(temperature: float, hard: bool) -> None:
    torch.manual_seed(0)
    router = DTSRouter(DIM, EXPERTS)
    router.set(temperature, hard)
    layer = MoE(DIM, HIDDEN, EXPERTS, 1, router=router)
    torch.nn.init.normal_(router.weight, std=DIM**-0.5)  # scores of deviation 1: a gate that has learnt to prefer
    x = torch.randn(TOKENS, DIM, requires_grad=True)
    learnt = [x, layer.gate_up_proj, layer.down_proj, router.weight]

    def run(forward: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(1)  # the same noise each time, for all
        y = forward()
        return y, *torch.autograd.grad(y.square().sum(), learnt)

    def ours() -> Tensor:
        return layer(x)

    def gate_weights() -> Tensor:
        router(x)
        return router.last_gate.weights

    def every_expert() -> Tensor:
        weights = gate_weights()
        pairs = zip(layer.gate_up_proj, layer.down_proj, weights.T, strict=True)
        return sum(w[:, None] * expert(x, gate_up, down) for gate_up, down, w in pairs)

    def diagonal() -> Tensor:
        combine = torch.diag_embed(gate_weights().T).permute(1, 0, 2)  # token, expert, place
        sent = torch.einsum("sec,sm->ecm", combine.bool().to(x.dtype), x)
        done = torch.stack([expert(*each) for each in zip(sent, layer.gate_up_proj, layer.down_proj, strict=True)])
        return torch.einsum("sec,ecm->sm", combine, done)

    expected = run(ours)
    for peer in (every_expert, diagonal):
        for mine, theirs in zip(expected, run(peer), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)

    pairs = int((layer.last_routing.index < EXPERTS).sum())
    rows = torch.randn(pairs, DIM, requires_grad=True)
    weights = [layer.gate_up_proj[0].detach().requires_grad_(), layer.down_proj[0].detach().requires_grad_()]

    def limit() -> tuple[Tensor, ...]:
        return torch.autograd.grad(expert(rows, *weights).square().sum(), [rows, *weights])

    seconds = race(
        {"ours": lambda: run(ours), "every": lambda: run(every_expert), "diagonal": lambda: run(diagonal), "limit": limit}
    )
    ratios = {name: seconds["ours"] / seconds[name] for name in ("every", "diagonal", "limit")}
    name = "hard gate" if hard else f"temperature {temperature:g}"
    print(
        f"  {name}: {pairs / TOKENS:.2f} experts a token; time ours / every expert = {ratios['every']:.3f}, "
        f"ours / combine tensor = {ratios['diagonal']:.3f}, ours / limit = {ratios['limit']:.3f}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"forward and backward, {TOKENS} tokens of {DIM}, {EXPERTS} gated experts of {HIDDEN}, float32")
    for setting in ((2.0, False), (0.7, False), (0.3, False), (0.1, False), (0.3, True)):
        compare(*setting)
    size, pieces = TOKENS * EXPERTS * TOKENS * 4 / 2**20, TOKENS * EXPERTS * 4 / 2**20
    print(f"  the combine tensor has {size:.1f} MB, our weights {pieces:.3f} MB; it grows with the square of the tokens")
