"""One vector a layer, taken while the layers run, against all hidden states kept until the end: time and peak memory.

Three ways to pool over the layers of one model in a `SentenceTransformer`: ours (`reduce_layers`), the same pooling over
`output_hidden_states` as in the paper's code, and sentence-transformers' own `WeightedLayerPooling` with a mean over tokens,
which learns one number a layer and needs all hidden states too. The limit is the model with mean pooling of its last layer.

Memory is that of tensors which operations of torch have made and which still live, at its peak, without the weights. A backward
pass needs the layers' inputs anyway, and checkpoints are those inputs, so in training there is little to be saved.
"""

import copy
import weakref
from collections.abc import Callable
from statistics import median

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer, WeightedLayerPooling
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer

from firsthand.embed.multi_layer_pooling import MultiLayerTrainablePooling, reduce_layers
from firsthand.testbeds import embedding

ROUNDS = 3
WIDTH, LAYERS, TEXTS, TOKENS = 128, 12, 8, 64


class Peak(TorchDispatchMode):
    """Most MB of tensors at once, of those made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.known | given:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak(call: Callable[[], object]) -> float:
    with Peak() as watch:
        call()
    return watch.most / 2**20


def race(racers: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds a call, the racers taking turns."""
    timers = {name: Timer("call()", globals={"call": call}) for name, call in racers.items()}
    times: dict[str, list[float]] = {name: [] for name in racers}
    for timer in timers.values():
        timer.timeit(1)
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            times[name].append(timer.timeit(1).median)
    return {name: median(seconds) for name, seconds in times.items()}


def racers() -> dict[str, SentenceTransformer]:
    generator = torch.Generator().manual_seed(0)
    llama = embedding.llama(generator, 100, hidden=WIDTH, layers=LAYERS, context=TOKENS).model
    transformer = embedding.sentence_transformer(llama, embedding.tokenizer(["a few words"], 100))[0]
    keeping: Transformer = copy.deepcopy(transformer)
    keeping.config.output_hidden_states = True
    pooling = MultiLayerTrainablePooling(WIDTH, LAYERS, num_latents=16)
    weighted = WeightedLayerPooling(WIDTH, num_hidden_layers=LAYERS, layer_start=1)
    pipelines = {
        "limit": (transformer, Pooling(WIDTH)),
        "ours": (copy.deepcopy(transformer), pooling),
        "all hidden states": (keeping, copy.deepcopy(pooling)),
        "WeightedLayerPooling": (copy.deepcopy(keeping), weighted, Pooling(WIDTH)),
    }
    models = {name: SentenceTransformer(modules=list(modules), device="cpu") for name, modules in pipelines.items()}
    reduce_layers(models["ours"])
    return models


def main() -> None:
    models = racers()
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(TOKENS // 2, TOKENS + 1, (TEXTS,), generator=generator)
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    ids = torch.randint(5, 100, (TEXTS, TOKENS), generator=generator)

    def embed(model: SentenceTransformer) -> Tensor:
        return model({"input_ids": ids, "attention_mask": mask})["sentence_embedding"]

    @torch.no_grad()
    def infer(model: SentenceTransformer) -> Tensor:
        return embed(model.eval())

    def step(model: SentenceTransformer) -> None:
        model.train().zero_grad()
        embed(model).square().sum().backward()

    torch.testing.assert_close(infer(models["ours"]), infer(models["all hidden states"]), atol=1e-5, rtol=1e-4)

    states = TEXTS * TOKENS * WIDTH * 4 / 2**20
    print(f"{LAYERS} layers of width {WIDTH}, {TEXTS} texts of up to {TOKENS} tokens; one layer's states are {states:.1f} MB")
    for name, call, checkpoints in (("encoding", infer, False), ("training step", step, False), ("with checkpoints", step, True)):
        if checkpoints:
            for model in models.values():
                model[0].model.activation_checkpointing_enable({"use_reentrant": False})
        calls = {racer: (lambda model=model, call=call: call(model)) for racer, model in models.items()}
        seconds = race(calls)
        memory = {racer: peak(one) for racer, one in calls.items()}
        for racer in ("ours", "all hidden states", "WeightedLayerPooling"):
            print(
                f"  {name}, {racer}: time / limit = {seconds[racer] / seconds['limit']:.3f}, "
                f"peak {memory[racer]:.1f} MB, / limit = {memory[racer] / memory['limit']:.2f}"
            )
        for other in ("all hidden states", "WeightedLayerPooling"):
            print(
                f"  {name}: ours / {other} = {seconds['ours'] / seconds[other]:.3f} in time, "
                f"{memory['ours'] / memory[other]:.3f} in memory"
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
