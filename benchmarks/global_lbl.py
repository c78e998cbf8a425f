"""The balance loss beside transformers', and its share of a training step: the arithmetic, the message between ranks.

The message is timed between two processes on this machine, over gloo; between machines it takes longer, over NVLink less. What
carries over is that one message for all layers costs about as much as a message for one. The limit
of the arithmetic is the softmax and the top-k that any balance loss of these logits needs, forward and backward.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.benchmark import Timer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from firsthand.moe.balance import GlobalBatchBalance, load_balancing_loss
from firsthand.moe.blocks import register_experts_backend
from firsthand.testbeds import lm, moe_lm

ROUNDS = 7


def race(racers: dict[str, Callable[[], object]], number: int = 1) -> dict[str, float]:
    """Median seconds a call, the racers taking turns."""
    times: dict[str, list[float]] = {name: [] for name in racers}
    timers = {name: Timer("call()", globals={"call": call}) for name, call in racers.items()}
    for timer in timers.values():
        timer.timeit(1)
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            times[name].append(timer.timeit(number).median)
    return {name: median(seconds) for name, seconds in times.items()}


def arithmetic(layers: int, tokens: int, experts: int, top_k: int) -> None:
    torch.manual_seed(0)
    logits = tuple(torch.randn(tokens, experts, requires_grad=True) for _ in range(layers))
    balance = GlobalBatchBalance(top_k, weight=1.0, scope="micro")

    def ours() -> tuple[Tensor, ...]:
        loss = balance(logits)
        return loss, *torch.autograd.grad(loss, logits)

    def theirs() -> tuple[Tensor, ...]:
        loss = load_balancing_loss_func(logits, experts, top_k)
        return loss, *torch.autograd.grad(loss, logits)

    def limit() -> None:
        total = 0.0
        for layer in logits:
            probabilities = layer.softmax(-1)
            probabilities.detach().topk(top_k)
            total = total + probabilities.sum()
        torch.autograd.grad(total, logits)

    for layer in logits:  # theirs pools layers: the same for each one alone
        mine = load_balancing_loss(layer, top_k, normalize="tokens")
        torch.testing.assert_close(mine, load_balancing_loss_func((layer,), experts, top_k))
    each = [load_balancing_loss(layer, top_k) for layer in logits]
    torch.testing.assert_close(ours()[0], torch.stack(each).mean())
    seconds = race({"ours": ours, "theirs": theirs, "limit": limit})
    print(
        f"  {layers} layers, {tokens} tokens, {experts} experts, top-{top_k}: ours {1e3 * seconds['ours']:.1f} ms, "
        f"ours / theirs = {seconds['ours'] / seconds['theirs']:.2f}, ours / limit = {seconds['ours'] / seconds['limit']:.2f}"
    )


def step_of_training() -> float:
    """Seconds of a training step of the study's model, without its balance loss."""
    register_experts_backend()
    model = moe_lm.mixtral(torch.Generator().manual_seed(0), 1024, context=64)
    model.set_experts_implementation("firsthand")
    batch = torch.randint(1024, (32, 64))
    return race({"step": lambda: lm.next_token_loss(model, batch).backward()})["step"]


def rank(number: int, path: str) -> None:
    """Seconds of one message for 2 layers and one for 64, and of 64 messages for a layer each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=number, world_size=2)

    def seconds(messages: int, layers: int) -> float:
        counts = torch.ones(layers, 8, dtype=torch.int64)
        times = []
        for _ in range(30):
            dist.barrier()
            begun = time.perf_counter()
            for _ in range(messages):
                dist.all_reduce(counts.clone())
            times.append(time.perf_counter() - begun)
        return median(times[5:])

    found = [seconds(1, 2), seconds(1, 64), seconds(64, 1)]
    if number == 0:
        print(*found, flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort an orderly end


def message() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen([sys.executable, __file__, str(number), f"{folder}/rendezvous"], stdout=subprocess.PIPE, text=True)
            for number in range(2)
        ]
        outputs = [process.communicate(timeout=120)[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise RuntimeError(f"a rank failed: {[process.returncode for process in ranks]}")
    small, large, apart = map(float, outputs[0].split())
    step = step_of_training()
    print(
        f"  2 layers: {1e3 * small:.2f} ms, {small / step:.4f} of a training step of the study's model, 2048 tokens on one thread"
    )
    print(f"  64 layers in one message: {large / small:.2f} times 2 layers; in 64 messages: {apart / small:.1f} times")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        rank(int(sys.argv[1]), sys.argv[2])
    torch.set_num_threads(1)
    print("the loss alone, forward and backward, float32")
    arithmetic(layers=2, tokens=2048, experts=8, top_k=2)
    arithmetic(layers=24, tokens=2048, experts=64, top_k=8)
    print("the message between two processes")
    message()
