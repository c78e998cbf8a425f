"""GradCache for any model: time and memory against one graph for a batch, and against sentence-transformers' cached loss.

Texts alone, of unequal lengths, since sentence-transformers takes those as they are. First all three must come to the same loss
and gradient. The limit in time is the step with one graph plus a forward pass without any, in chunks.

Memory is that of tensors which operations of torch have made and which still live, at its peak, without weights and gradients; on
a GPU it is what its allocator has given out, beyond what was there before.
"""

import weakref
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer

from firsthand.embed.contrastive import info_nce_loss
from firsthand.embed.grad_cache import grad_cache_step
from firsthand.embed.vlm2vec import split_items
from firsthand.testbeds import embedding

ROUNDS = 3
PAIRS, CHUNK = 64, 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Columns = list[dict[str, Tensor]]


class Peak(TorchDispatchMode):
    """Most bytes of tensors at once, of those made inside."""

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


def peak(model: SentenceTransformer, call: Callable[[], object]) -> float:
    """In MB."""
    model.zero_grad(set_to_none=False)  # gradients are there already, and not counted
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
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


def world() -> tuple[SentenceTransformer, Columns]:
    functions = embedding.functions(("scipy",)).take(range(PAIRS))
    texts = [*functions.sentences, *functions.codes]
    tokenizer = embedding.tokenizer(texts, vocab=2000)
    bert = embedding.bert(torch.Generator().manual_seed(0), len(tokenizer), hidden=128, layers=4)
    model = embedding.sentence_transformer(bert, tokenizer, length=64).to(DEVICE).eval()  # without dropout, to compare gradients
    columns = []
    for side in (functions.sentences, functions.codes):
        tokens = model.preprocess(side)
        columns.append({name: value.to(DEVICE) for name, value in tokens.items() if isinstance(value, Tensor)})
    return model, columns


def steps(model: SentenceTransformer, columns: Columns) -> dict[str, Callable[[], Tensor]]:
    peer = CachedMultipleNegativesRankingLoss(model, scale=50, mini_batch_size=CHUNK)  # a temperature of 0.02

    def encode(inputs: dict[str, Tensor]) -> Tensor:
        return model(dict(inputs))["sentence_embedding"]

    def whole() -> Tensor:
        loss = info_nce_loss(*(encode(column) for column in columns))
        loss.backward()
        return loss.detach()

    def theirs() -> Tensor:
        loss = peer([dict(column) for column in columns], torch.empty(0))
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def forward() -> None:
        for column in columns:
            for chunk in split_items(column, CHUNK):
                encode(chunk)

    return {
        "ours": partial(
            grad_cache_step, encode, *columns, info_nce_loss, query_chunk=CHUNK, target_chunk=CHUNK, split=split_items
        ),
        "theirs": theirs,
        "one graph": whole,
        "forward": forward,
    }


def check(model: SentenceTransformer, calls: dict[str, Callable[[], Tensor]]) -> None:
    found = {}
    for name in ("ours", "theirs", "one graph"):
        model.zero_grad()
        loss = calls[name]()
        found[name] = [loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    for name in ("ours", "theirs"):
        torch.testing.assert_close(found[name], found["one graph"], atol=1e-4, rtol=1e-3)


def main() -> None:
    model, columns = world()
    calls = steps(model, columns)
    check(model, calls)
    seconds = race(calls)
    memory = {name: peak(model, call) for name, call in calls.items()}
    widths = " and ".join(str(column["input_ids"].shape[1]) for column in columns)
    print(f"{PAIRS} pairs of up to {widths} tokens in chunks of {CHUNK}, on {DEVICE}")
    limit = seconds["one graph"] + seconds["forward"]
    print(
        f"  time: ours / theirs = {seconds['ours'] / seconds['theirs']:.3f}, ours / limit = {seconds['ours'] / limit:.3f}, "
        f"ours / one graph = {seconds['ours'] / seconds['one graph']:.3f}"
    )
    print(
        f"  peak memory: ours {memory['ours']:.1f} MB; ours / theirs = {memory['ours'] / memory['theirs']:.3f}, "
        f"ours / one graph = {memory['ours'] / memory['one graph']:.3f}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
