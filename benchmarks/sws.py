"""What SWS costs: expansion against remapping a state dict by hand, and a training step against an ordinary one.

Expansion makes a model of 12 layers from 5 stages. The peer builds the model as transformers does and loads renamed weights. The
limit is a deep copy of the model that comes out. A training step, AdamW included, is raced against that of the same model without
sharing, which has more to update, and against transformers' ALBERT where all layers are one.
"""

import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.utils.benchmark import Timer
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel

from firsthand.weights.sws import StageSharedModel, expansion_schedule

ROUNDS = 5
LAYERS = 12
REPEATS = [3, 3, 4, 3, 3]
SIZES = {"vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}


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
    return BertModel(BertConfig(**SIZES, num_hidden_layers=layers), add_pooling_layer=False).eval()


def expansion(shared: StageSharedModel, tokens: torch.Tensor) -> None:
    def ours() -> Any:
        return shared.expand(LAYERS)

    def peer() -> Any:
        config = copy.deepcopy(shared.model.config)
        config.num_hidden_layers = LAYERS
        model = BertModel(config, add_pooling_layer=False).eval()
        old = shared.model.state_dict()
        state = {name: weight for name, weight in old.items() if ".layer." not in name}
        first = [sum(REPEATS[:stage]) for stage in range(len(REPEATS))]
        for index, stage in enumerate(expansion_schedule(LAYERS, len(REPEATS))):
            prefix = f"encoder.layer.{first[stage]}."
            for name, weight in old.items():
                if name.startswith(prefix):
                    state[f"encoder.layer.{index}.{name.removeprefix(prefix)}"] = weight
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


def trainer(model: Any, tokens: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def train() -> None:
        optimizer.zero_grad()
        model(tokens).last_hidden_state.square().mean().backward()
        optimizer.step()

    return train


def step(shared: StageSharedModel, tokens: torch.Tensor) -> None:
    plain = shared.expand()
    torch.testing.assert_close(plain(tokens).last_hidden_state, shared(tokens).last_hidden_state)
    seconds = race({"ours": trainer(copy.deepcopy(shared), tokens), "peer": trainer(plain, tokens)})
    print(
        f"training step, {len(shared.stages)} layers of {len(REPEATS)}: ours / unshared = {seconds['ours'] / seconds['peer']:.3f}"
    )


def albert(tokens: torch.Tensor) -> None:
    ours = StageSharedModel(bert(LAYERS), [LAYERS]).eval()
    config = AlbertConfig(**SIZES, num_hidden_layers=LAYERS, embedding_size=384, hidden_act="gelu", layer_norm_eps=1e-12)
    peer = AlbertModel(config, add_pooling_layer=False).eval()
    names = {"attention.self.": "attention.", "attention.output.": "attention.", "intermediate.dense.": "ffn."}
    names |= {"output.dense.": "ffn_output.", "output.LayerNorm.": "full_layer_layer_norm."}
    state = {}
    for name, weight in ours.stage_layers()[0].items():
        old = next(each for each in names if name.startswith(each))
        state[names[old] + name.removeprefix(old)] = weight
    with torch.no_grad():
        peer.encoder.albert_layer_groups[0].albert_layers[0].load_state_dict(state)
        peer.encoder.embedding_hidden_mapping_in.weight.copy_(torch.eye(384))
        peer.encoder.embedding_hidden_mapping_in.bias.zero_()
        peer.embeddings.load_state_dict(ours.model.embeddings.state_dict(), strict=False)
        torch.testing.assert_close(ours(tokens).last_hidden_state, peer(tokens).last_hidden_state, atol=1e-4, rtol=1e-4)
    seconds = race({"ours": trainer(ours, tokens), "peer": trainer(peer, tokens)})
    print(f"training step, {LAYERS} layers of 1: ours / ALBERT = {seconds['ours'] / seconds['peer']:.3f}")


def main() -> None:
    tokens = torch.randint(4096, (4, 64))
    shared = StageSharedModel(bert(sum(REPEATS)), REPEATS).eval()
    expansion(shared, tokens)
    step(shared, tokens)
    albert(tokens)


if __name__ == "__main__":
    main()
