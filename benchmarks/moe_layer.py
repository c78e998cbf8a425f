"""A Mixtral block on our experts, raced against what transformers offers: `eager`, `grouped_mm` and, for few tokens,
`batched_mm`.

`python benchmarks/moe_layer.py` prints ratios. "peer / ours" is the time of the fastest of them over ours: above 1, ours is
faster. "ours / limit" is our time over that of the six matrix products of a dense block of the same total size, computed with
`torch.mm`; where it is below 1, our products are faster than those of `torch.mm` (see `firsthand.moe.experts`). Two threads,
float32.
"""

import copy
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from firsthand.moe.blocks import register_experts_backend

SIZES = ((64, 64, 64, 8, 4096), (128, 128, 32, 4, 4096), (128, 256, 8, 2, 2048), (512, 1024, 8, 2, 1024))
ROUNDS = 9


def block(dim: int, hidden: int, experts: int, top_k: int, backend: str) -> nn.Module:
    config = MixtralConfig(hidden_size=dim, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=top_k)
    config._experts_implementation = backend
    module = MixtralSparseMoeBlock(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return module


def race(contestants: dict[str, tuple[str, dict]], rounds: int = ROUNDS, repeats: int = 3) -> dict[str, float]:
    """Median seconds of each, taken in turns so that a busy machine slows all alike."""
    timers = {name: Timer(code, globals=scope, num_threads=2) for name, (code, scope) in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in timers}
    for timer in timers.values():
        timer.timeit(2)
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(repeats).median)
    return {name: statistics.median(values) for name, values in times.items()}


def step(module: nn.Module, inputs: Iterator[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    x = next(inputs)
    module.zero_grad()
    x.grad = None
    y = module(x)
    y.backward(dy)
    return (y.detach(), x.grad, *(parameter.grad for parameter in module.parameters()))


def products(a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor) -> None:
    """The products of one dense gated block, forward and backward."""
    torch.mm(a, b.t(), out=e)
    torch.mm(c, d.t())
    torch.mm(a, d)
    torch.mm(a.t(), c)
    torch.mm(e, b)
    torch.mm(e.t(), a)


def training() -> None:
    print("forward and backward of the whole block")
    print(f"{'D, F, E, k, T':>24}  peer / ours  ours / limit  fastest peer")
    for dim, hidden, experts, top_k, tokens in SIZES:
        generator = torch.Generator().manual_seed(1)
        # Other tokens in each step, as in training: libraries cache what they compile for the sizes that they have seen.
        x = [torch.randn(1, tokens, dim, generator=generator, requires_grad=True) for _ in range(ROUNDS)]
        dy = torch.randn(1, tokens, dim, generator=generator)
        blocks = {name: block(dim, hidden, experts, top_k, name) for name in ("eager", "grouped_mm", "firsthand")}
        results = {name: [part.clone() for part in step(module, iter(x), dy)] for name, module in blocks.items()}
        for ours, expected in zip(results["firsthand"], results["eager"], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        pairs = tokens * top_k
        a, c = torch.randn(pairs, dim), torch.randn(pairs, hidden)
        b, d, e = torch.randn(2 * hidden, dim), torch.randn(dim, hidden), torch.empty(pairs, 2 * hidden)
        contestants = {
            name: ("step(module, x, dy)", {"step": step, "module": module, "x": itertools.cycle(x), "dy": dy})
            for name, module in blocks.items()
        }
        limit = ("products(a, b, c, d, e)", {"products": products, "a": a, "b": b, "c": c, "d": d, "e": e})
        seconds = race(contestants | {"limit": limit})
        report((dim, hidden, experts, top_k, tokens), seconds)


def report(sizes: tuple[int, ...], seconds: dict[str, float]) -> None:
    peers = {name: value for name, value in seconds.items() if name not in ("firsthand", "limit")}
    best = min(peers, key=peers.__getitem__)
    limit = f"{seconds['firsthand'] / seconds['limit']:12.2f}" if "limit" in seconds else ""
    print(f"{', '.join(map(str, sizes)):>24}  {peers[best] / seconds['firsthand']:11.2f}  {limit}  {best}", flush=True)


@torch.no_grad()
def decoding() -> None:
    print("\nforward of a few tokens")
    print(f"{'D, F, E, k, T':>24}  peer / ours  fastest peer")
    for dim, hidden, experts, top_k, _ in SIZES:
        for tokens in (1, 8):
            x = torch.randn(1, tokens, dim)
            backends = ("eager", "grouped_mm", "batched_mm", "firsthand")
            blocks = {name: block(dim, hidden, experts, top_k, name) for name in backends}
            expected = blocks["eager"](x)
            torch.testing.assert_close(blocks["firsthand"](x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
            seconds = race({name: ("module(x)", {"module": module, "x": x}) for name, module in blocks.items()}, repeats=30)
            report((dim, hidden, experts, top_k, tokens), seconds)


def memory() -> None:
    """Each in a process of its own, as memory that a process has freed may stay with it."""
    print("\npeak memory of forward and backward, beyond what is there before")
    print(f"{'D, F, E, k, T':>24}  ours / peer  leanest peer")
    for place, sizes in enumerate(SIZES):
        peaks = {}
        for backend in ("eager", "grouped_mm", "firsthand"):
            command = [sys.executable, __file__, "--peak", str(place), backend]
            peaks[backend] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        ours = peaks.pop("firsthand")
        best = min(peaks, key=peaks.__getitem__)
        print(f"{', '.join(map(str, sizes)):>24}  {ours / peaks[best]:11.2f}  {best}", flush=True)


def peak(place: int, backend: str) -> None:
    dim, hidden, experts, top_k, tokens = SIZES[place]
    module = block(dim, hidden, experts, top_k, backend)
    x, dy = torch.randn(1, tokens, dim, requires_grad=True), torch.randn(1, tokens, dim)
    step(module, iter([x[:, :64].detach().requires_grad_()]), dy[:, :64])  # libraries allocate on first use
    module.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far, which is that of the imports
    before = resident("VmRSS")
    step(module, iter([x]), dy)
    print(resident("VmHWM") - before)


def resident(what: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(what))


def whole_model() -> None:
    """A tiny Mixtral: all of a training step, attention and optimiser included."""
    config = MixtralConfig(
        vocab_size=512, hidden_size=128, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        num_local_experts=32, num_experts_per_tok=4, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    start = MixtralForCausalLM(config)
    batches = [torch.randint(3, 512, (8, 256)) for _ in range(8)]
    models, losses = {}, {}
    for backend in ("eager", "grouped_mm", "firsthand"):
        model = copy.deepcopy(start)
        model.set_experts_implementation(backend)
        models[backend] = (model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    times: dict[str, list[float]] = {name: [] for name in models}
    for tokens in batches:
        for name, (model, optimizer) in models.items():
            began = time.perf_counter()
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            times[name].append(time.perf_counter() - began)
            losses.setdefault(name, []).append(loss.item())
    torch.testing.assert_close(losses["firsthand"], losses["eager"], rtol=1e-3, atol=0)
    print("\ntraining steps of a Mixtral of 4 layers (D, F, E, k = 128, 128, 32, 4; 2048 tokens)")
    seconds = {name: statistics.median(values[2:]) for name, values in times.items()}
    print(" " * 26 + "peer / ours                fastest peer")
    report((128, 128, 32, 4, 2048), seconds)


if __name__ == "__main__":
    torch.set_num_threads(2)
    register_experts_backend()
    if sys.argv[1:2] == ["--peak"]:
        peak(int(sys.argv[2]), sys.argv[3])
    else:
        training()
        decoding()
        memory()
        whole_model()
