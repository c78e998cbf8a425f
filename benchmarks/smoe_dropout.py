"""SMoE-Dropout's layer, forward and backward, at every number of active experts: only the chosen, or all of them and a mask.

Peer: the same experts as a Python loop over them, as one writes it. Limit: the time of the dense feed-forward block with as many
neurons as all experts together, times k/N. "Ours" is the way that the layer takes by itself.
"""

from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from firsthand.moe.smoe_dropout import SMoEDropout

ROUNDS = 5


def loop(layer: SMoEDropout, x: Tensor) -> Tensor:
    _, weights, index = layer.router(x)
    y = torch.zeros_like(x)
    for expert in range(len(layer.down_proj)):
        token, place = (index == expert).nonzero(as_tuple=True)
        h = F.linear(x[token], layer.gate_up_proj[expert], layer.gate_up_bias[expert])
        part = F.linear(F.gelu(h), layer.down_proj[expert]) * weights[token, place, None]
        y = y.index_add(0, token, part)
    return y + layer.output_bias


def race(dim: int, hidden: int, experts: int, tokens: int, number: int, device: str) -> None:
    torch.manual_seed(0)
    layer = SMoEDropout(dim, hidden // experts, experts).to(device)
    dense = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)).to(device)
    x = torch.randn(tokens, dim, device=device, requires_grad=True)

    def call(name: str) -> list[Tensor]:
        model = dense if name == "dense" else layer
        if name == "loop":
            y = loop(layer, x)
        else:
            layer.impl = name
            y = model(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]

    print(f"{tokens} tokens, dim {dim}, {hidden} hidden neurons in {experts} experts ({device})")
    for k in sorted({1, experts // 4, experts // 2, 3 * experts // 4, 7 * experts // 8, experts}):
        layer.router.top_k = k
        expected = call("loop")
        for name in ("sparse", "masked"):
            for ours, theirs in zip(call(name), expected, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
        names = ("sparse", "masked", "auto", "loop", "dense")
        timers = {name: Timer("call(name)", globals={"call": call, "name": name}) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(ROUNDS):  # alternating, so that a slow moment meets all
            for name, timer in timers.items():
                times[name].append(timer.timeit(number).mean)
        seconds = {name: median(each) for name, each in times.items()}
        limit = seconds["dense"] * k / experts
        ratios = {
            "sparse/limit": seconds["sparse"] / limit,
            "masked/limit": seconds["masked"] / limit,
            "ours/limit": seconds["auto"] / limit,
            "ours/peer": seconds["auto"] / seconds["loop"],
        }
        print(f"  {k:2} of {experts}: " + "  ".join(f"{name} {ratio:5.2f}" for name, ratio in ratios.items()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    race(dim=64, hidden=512, experts=8, tokens=1024, number=3, device=device)
    race(dim=512, hidden=2048, experts=16, tokens=512, number=1, device=device)
