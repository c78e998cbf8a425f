"""Deep incubation: modules in two processes against one after the other, and the step of a hybrid network against its peers.

Peers of a step are the deep model trained end to end, as it is and with gradient checkpointing. Whole processes are timed, so
that starting them is paid for.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer
from transformers import ViTConfig, ViTForImageClassification

from firsthand.weights.deep_incubation import hybrid_network, incubate_apart, meta_model, trainable_parameters

MODULES, BLOCKS, BATCH, STEPS, ROUNDS = 4, 12, 16, 20, 5


def vit() -> Any:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32, patch_size=4, hidden_size=192, intermediate_size=384, num_hidden_layers=BLOCKS, num_attention_heads=3
    )
    return ViTForImageClassification(config)


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(pixel_values=torch.ones(BATCH, 3, 32, 32)).logits, torch.zeros(BATCH, dtype=torch.long)).backward()
    optimizer.step()


def train(hybrid: Any, index: int) -> None:
    optimizer = torch.optim.AdamW(trainable_parameters(hybrid), lr=1e-4)
    for _ in range(STEPS):
        step(hybrid.train(), optimizer)


def processes() -> None:
    deep, meta = vit(), meta_model(vit(), MODULES)
    print(f"{MODULES} modules of {BLOCKS // MODULES} blocks, {STEPS} steps each, one thread a process")
    seconds: dict[int, float] = {}
    made = {}
    for workers in (1, 2):
        torch.set_num_threads(workers)  # one for each process
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            made[workers] = incubate_apart(meta, deep, MODULES, train, folder, workers=workers)
            seconds[workers] = time.perf_counter() - begin
    torch.testing.assert_close(made[1].state_dict(), made[2].state_dict())
    torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(deep.train().parameters(), lr=1e-4)
    begin = time.perf_counter()
    hybrid = BLOCKS // MODULES + MODULES - 1
    for _ in range(STEPS * MODULES * hybrid // BLOCKS):
        step(deep, optimizer)
    whole = time.perf_counter() - begin
    print(f"  two processes / one = {seconds[2] / seconds[1]:.2f}")
    print(f"  two processes / as many steps x blocks end to end in one = {seconds[2] / whole:.2f}")


def steps() -> None:
    deep, meta = vit(), meta_model(vit(), MODULES)
    saving = vit()
    saving.activation_checkpointing_enable()
    racers: dict[str, Callable[[], None]] = {}
    for name, model in {"end to end": deep, "checkpointing": saving}.items():
        racers[name] = partial(step, model.train(), torch.optim.AdamW(model.parameters(), lr=1e-4))
    for index in range(MODULES):
        hybrid = hybrid_network(meta, vit(), index, MODULES).train()
        racers[f"module {index}"] = partial(step, hybrid, torch.optim.AdamW(trainable_parameters(hybrid), lr=1e-4))
    times: dict[str, list[float]] = {name: [] for name in racers}
    for _ in range(ROUNDS):
        for name, call in racers.items():
            times[name].append(Timer("call()", globals={"call": call}).timeit(1).median)
    spent = {name: median(each) for name, each in times.items()}
    share = (BLOCKS // MODULES + MODULES - 1) / BLOCKS
    print(f"a step, by the step end to end ({share:.2f} of its blocks are in a hybrid network)")
    for name in racers:
        print(f"  {name}: {spent[name] / spent['end to end']:.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    steps()
    processes()
