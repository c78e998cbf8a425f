"""What TLEG costs: expansion against stacking copies of layers, and a training step against an ordinary one.

Expansion makes a BERT of 12 layers. The peer is the way one would write it by hand: build the model as transformers does, compute
each tensor, and load. The limit is a deep copy of the model that comes out. A training step computes the weights of all layers
from two; the peer is the same model without.
"""

import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.utils.benchmark import Timer
from transformers import BertConfig, BertModel

from firsthand.weights.tleg import LinearLearngene

ROUNDS = 5
LAYERS = 12


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


def bert(layers: int) -> Any:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(vocab_size=4096, hidden_size=384, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=6)
    ).eval()


def expansion(learngene: LinearLearngene, tokens: torch.Tensor) -> None:
    def ours() -> Any:
        return learngene.expand(LAYERS)

    @torch.no_grad()
    def peer() -> Any:
        config = copy.deepcopy(learngene.model.config)
        config.num_hidden_layers = LAYERS
        model = BertModel(config).eval()
        state = {name: weight for name, weight in learngene.model.state_dict().items() if ".layer." not in name}
        slopes = dict(learngene.slope.named_parameters())
        for index in range(LAYERS):
            for name, base in learngene.base.named_parameters():
                state[f"encoder.layer.{index}.{name}"] = base + index / LAYERS * slopes[name]
        model.load_state_dict(state)
        return model

    made = ours()
    with torch.no_grad():
        torch.testing.assert_close(made(tokens).last_hidden_state, peer()(tokens).last_hidden_state)
    seconds = race({"ours": ours, "peer": peer, "limit": lambda: copy.deepcopy(made)})
    size = sum(parameter.nbytes for parameter in made.parameters())
    print(f"expansion to {LAYERS} layers, {size / 2**20:.0f} MB come out")
    print(
        f"  ours / by hand = {seconds['ours'] / seconds['peer']:.3f}, ours / deep copy = {seconds['ours'] / seconds['limit']:.2f}"
    )


def step(learngene: LinearLearngene, tokens: torch.Tensor) -> None:
    plain = learngene.expand()

    def train(model: Any) -> None:
        model.zero_grad()
        model(tokens).last_hidden_state.square().mean().backward()

    torch.testing.assert_close(plain(tokens).last_hidden_state, learngene(tokens).last_hidden_state)
    seconds = race({"ours": lambda: train(learngene), "peer": lambda: train(plain)})
    print(f"forward and backward, {tokens.numel()} tokens: ours / plain model = {seconds['ours'] / seconds['peer']:.3f}")


def main() -> None:
    learngene = LinearLearngene(bert(LAYERS), generator=torch.Generator().manual_seed(0)).eval()
    expansion(learngene, torch.randint(4096, (2, 16)))
    for length in (32, 256):
        step(learngene, torch.randint(4096, (4, length)))


if __name__ == "__main__":
    main()
