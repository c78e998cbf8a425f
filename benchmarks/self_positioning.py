"""A search by self-positioning, autograd through the merge, and the bare passes of the model.

The peer writes the merged weights as a differentiable sum and lets `torch.func.functional_call` do the rest: shorter, and it
keeps the sum's graph. The limit is forward and backward pass at fixed weights. The model is all-MiniLM-L6-v2, 22.7 million
weights.
"""

import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.benchmark import Timer
from transformers import AutoModel

from firsthand import data
from firsthand.weights.self_positioning import merge_at, self_positioning

STEPS, ROUNDS, LR = 8, 3, 0.1


def world() -> tuple[torch.nn.Module, list[dict[str, Tensor]], Tensor]:
    torch.manual_seed(0)
    base = AutoModel.from_pretrained(data.load("minilm")).eval()
    names = [name for name, _ in base.named_parameters()]
    state = base.state_dict()
    experts = [
        {name: value + 0.02 * torch.randn_like(value) if name in names else value for name, value in state.items()} for _ in "12"
    ]
    return base, experts, torch.randint(1000, 20000, (8, 32))


def probe_loss(states: Tensor) -> Tensor:
    return states.mean(dim=1).square().mean()


def ours() -> list[float]:
    base, experts, ids = WORLD
    found = self_positioning(
        base, experts, lambda model, _: probe_loss(model(ids).last_hidden_state), [None], steps=STEPS, lr=LR, progress=False
    )
    return found.history


def peer() -> list[float]:
    base, experts, ids = WORLD
    start = dict(base.named_parameters())
    changes = [{name: expert[name] - value.detach() for name, value in start.items()} for expert in experts]
    norms = [torch.sqrt(sum((value.double() ** 2).sum() for value in change.values())) for change in changes]
    dot = sum((changes[0][name].double() * changes[1][name].double()).sum() for name in start)
    angle = torch.acos(dot / norms[0] / norms[1])
    a, b = torch.zeros((), dtype=torch.float64, requires_grad=True), torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([a, b], lr=LR, momentum=0.9)
    history = []
    for _ in range(STEPS):
        t, s = torch.sigmoid(a), torch.exp(b)
        length = s * ((1 - t) * norms[0] + t * norms[1])
        weights = (
            length * torch.sin((1 - t) * angle) / angle.sin() / norms[0],
            length * torch.sin(t * angle) / angle.sin() / norms[1],
        )
        first, second = (weight.float() for weight in weights)
        merged = {n: value.detach() + first * changes[0][n] + second * changes[1][n] for n, value in start.items()}
        loss = probe_loss(functional_call(base, merged, (ids,)).last_hidden_state)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


def limit() -> None:
    base, _, ids = WORLD
    for _ in range(STEPS):
        base.zero_grad()
        probe_loss(base(ids).last_hidden_state).backward()


def main() -> None:
    torch.testing.assert_close(torch.tensor(ours()), torch.tensor(peer()), rtol=1e-3, atol=1e-6)
    merge_at(WORLD[0], WORLD[1], 0.5)
    times: dict[str, list[float]] = {"ours": [], "peer": [], "limit": []}
    for _ in range(ROUNDS):
        for name, call in (("ours", ours), ("peer", peer), ("limit", limit)):
            times[name].append(Timer("call()", globals={"call": call}).timeit(1).median)
    ratio = {name: median(seconds) / median(times["ours"]) for name, seconds in times.items()}
    print(f"{STEPS} steps of a search, one thread: ours {median(times['ours']):.1f} s")
    print(f"  time: ours / autograd through the merge = {1 / ratio['peer']:.2f}, ours / bare passes = {1 / ratio['limit']:.2f}")
    peaks = {}
    for name in ("world", "ours", "peer"):
        run = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True)
        peaks[name] = float(run.stdout.split()[-1])
    grown = {name: (peaks[name] - peaks["world"]) / (22.7 * 4) for name in ("ours", "peer")}
    print(f"  memory beside base and experts, in models: ours {grown['ours']:.1f}, through the merge {grown['peer']:.1f}")


WORLD = world()

if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        {"world": lambda: None, "ours": ours, "peer": peer}[sys.argv[1]]()
        status = Path("/proc/self/status").read_text()  # of this program alone; the other way counts the parent's peak
        print(float(status.split("VmHWM:")[1].split()[0]) / 1024)
    else:
        main()
