"""Growing and upcycling a Llama, against the ways one would otherwise do it, and against copying as many bytes.

For width: the product with matrices that choose and average, as the literature writes it, for all weights of the model. For
upcycling: make a Mixtral as transformers does, with random weights, and copy each expert into it. The limit is a plain copy of
the weights of the model that comes out.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

from firsthand.weights.aquilamoe import expand_linear, grow_width, scale_out, width_map

ROUNDS = 5


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


def report(title: str, seconds: dict[str, float], model: Any) -> None:
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(f"{title}, {size / 2**20:.0f} MB come out")
    print(
        f"  ours / peer = {seconds['ours'] / seconds['peer']:.3f}, ours / copy = {seconds['ours'] / seconds['limit']:.2f}, "
        f"{size / 2**30 / seconds['ours']:.2f} GB a second"
    )


def one_matrix() -> None:
    weight, inputs, outputs = torch.randn(1024, 1024), width_map(1024, 2048), width_map(1024, 2048)
    choose_out = torch.eye(1024)[outputs]
    average_in = torch.eye(1024)[inputs] / 2

    def ours() -> Tensor:
        return expand_linear(weight, inputs, outputs)

    def peer() -> Tensor:
        return choose_out @ weight @ average_in.T

    torch.testing.assert_close(ours(), peer())
    grown = ours()
    seconds = race({"ours": ours, "peer": peer, "limit": grown.clone})
    print("one matrix, 1024 × 1024 -> 2048 × 2048, against the product of three")
    print(f"  ours / peer = {seconds['ours'] / seconds['peer']:.3f}, ours / copy = {seconds['ours'] / seconds['limit']:.2f}")


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config)


def width(model: Any) -> None:
    def ours() -> Any:
        return grow_width(model, hidden_size=1024, intermediate_size=2816, num_attention_heads=16)

    grown = ours()

    def random() -> Any:
        return LlamaForCausalLM(grown.config)

    tokens = torch.arange(32)[None]
    with torch.no_grad():
        torch.testing.assert_close(grown(tokens).logits, model(tokens).logits, atol=1e-4, rtol=1e-4)
    seconds = race({"ours": ours, "peer": random, "limit": lambda: [each.clone() for each in grown.parameters()]})
    report("width × 2, against a model of that size with random weights", seconds, grown)


def out(model: Any) -> None:
    def ours() -> Any:
        return scale_out(model, 8, 2, generator=torch.Generator().manual_seed(0))

    sparse = ours()

    @torch.no_grad()
    def by_hand() -> Any:
        peer = MixtralForCausalLM(sparse.config)
        peer.load_state_dict({key: value for key, value in model.state_dict().items() if ".mlp." not in key}, strict=False)
        for dense, block, drawn in zip(model.model.layers, peer.model.layers, sparse.model.layers, strict=True):
            block.mlp.gate.weight.copy_(drawn.mlp.gate.weight)
            for expert in range(8):
                gate, up = block.mlp.experts.gate_up_proj[expert].chunk(2)
                gate.copy_(dense.mlp.gate_proj.weight)
                up.copy_(dense.mlp.up_proj.weight)
                block.mlp.experts.down_proj[expert].copy_(dense.mlp.down_proj.weight)
        return peer

    state = by_hand().state_dict()
    assert state.keys() == sparse.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in sparse.state_dict().items())
    seconds = race({"ours": ours, "peer": by_hand, "limit": lambda: [each.clone() for each in sparse.parameters()]})
    report("8 experts, against a Mixtral filled by hand", seconds, sparse)


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_matrix()
    model = llama()
    width(model)
    out(model)
