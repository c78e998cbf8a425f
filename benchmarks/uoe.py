"""A step of unlearning in one expert against the same step with gradients for more than that.

All compute the same loss, gradient ascent and the anchor, on the same Mixtral, and the same gradient for the one expert;
optimisers are left out. *All*: every parameter has a gradient, as in plain unlearning. *Masked*: the router of that layer and the
stacked weights of its experts have one, of which a hook would keep one expert's. The limit is the forward pass alone.
"""

import copy
from collections.abc import Callable
from statistics import median

import torch
from torch.utils.benchmark import Timer
from transformers import MixtralConfig, MixtralForCausalLM

from firsthand.moe.blocks import capture_routing, moe_blocks, register_experts_backend
from firsthand.moe.uoe import SingleExpertUnlearner, router_anchor_loss, sequence_log_probs

ROUNDS = 5
LAYERS, EXPERTS, EXPERT = 8, 16, 3


def race(racers: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds a call, the racers taking turns."""
    times: dict[str, list[float]] = {name: [] for name in racers}
    timers = {name: Timer("call()", globals={"call": call}) for name, call in racers.items()}
    for timer in timers.values():
        timer.timeit(1)
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            times[name].append(timer.timeit(1).median)
    return {name: median(seconds) for name, seconds in times.items()}


def megabytes(tensors: list[torch.Tensor | None]) -> float:
    return sum(0 if tensor is None else tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


def at_layer(layer: int) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=8, num_local_experts=EXPERTS, num_experts_per_tok=2, max_position_embeddings=256,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("firsthand")
    forget = {"input_ids": torch.randint(1024, (4, 128))}
    everything, masked = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)
    unlearner = SingleExpertUnlearner(model, [(layer, EXPERT)])
    moe_blocks(masked)[layer].block.requires_grad_(True)

    def ours() -> None:
        unlearner.zero_grad()
        unlearner(forget)["loss"].backward()

    def theirs(model: MixtralForCausalLM) -> None:
        model.zero_grad()
        with capture_routing(model) as kept:
            logits = model(**forget).logits
        ascent = sequence_log_probs(logits, forget["input_ids"]).sum() / (4 * 127)
        (ascent + router_anchor_loss(kept[layer].logits, EXPERT)).backward()

    @torch.no_grad()
    def limit() -> None:
        model(**forget)

    ours(), theirs(everything), theirs(masked)
    for other in (everything, masked):
        experts = moe_blocks(other)[layer].experts
        for name, weight in unlearner.slices[0].weights.items():
            torch.testing.assert_close(weight.grad[0], getattr(experts, name).grad[EXPERT], atol=1e-5, rtol=1e-3)

    held = {
        name: megabytes([parameter.grad for parameter in each.parameters()])
        for name, each in (("ours", unlearner), ("all", everything), ("masked", masked))
    }
    seconds = race({"ours": ours, "all": lambda: theirs(everything), "masked": lambda: theirs(masked), "limit": limit})
    print(
        f"  layer {layer} of {LAYERS}: ours {1e3 * seconds['ours']:.1f} ms; time ours / all = "
        f"{seconds['ours'] / seconds['all']:.2f}, ours / masked = {seconds['ours'] / seconds['masked']:.2f}, "
        f"ours / limit = {seconds['ours'] / seconds['limit']:.2f}; gradients {held['ours']:.2f} MB, ours / all = "
        f"{held['ours'] / held['all']:.4f}, ours / masked = {held['ours'] / held['masked']:.4f}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    register_experts_backend()
    print(f"one step on 512 tokens, a Mixtral of {LAYERS} layers and {EXPERTS} experts, hidden size 256")
    for layer in (0, LAYERS // 2, LAYERS - 1):
        at_layer(layer)
