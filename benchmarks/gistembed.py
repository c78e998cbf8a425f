"""GIST with sentence-transformers' `GISTEmbedLoss`: the arithmetic of the loss, its memory, and whole training steps.

In the steps, both train the first layer of all-MiniLM-L6-v2 with the whole of it, six layers, for a guide; in the paper the guide
is larger still beside what it trains. Theirs runs the guide in every step, ours reads its embeddings from the data set. The limit
is the student's forward and backward pass.
"""

import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer

from firsthand import data
from firsthand.embed.gistembed import GISTLoss, gist_loss

ROUNDS = 5


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation returns, in MB."""

    megabytes = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() / 2**20 for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.megabytes = max(self.megabytes, *sizes, 0.0)
        return result


class Given(nn.Module):
    """A model whose features already are the embeddings."""

    def __init__(self, column: str) -> None:
        super().__init__()
        self.column = column

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features[self.column]}


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


def arithmetic() -> None:
    print("the loss alone, forward and backward, float32, width 384")
    theirs = GISTEmbedLoss.__new__(GISTEmbedLoss)  # its constructor asks for tokenizers
    nn.Module.__init__(theirs)
    theirs.model, theirs.guide, theirs.must_retokenize, theirs.gather_across_devices = Given("x"), Given("guide"), False, False
    theirs.similarity_fct, theirs.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()
    theirs.temperature, theirs.margin, theirs.margin_strategy = 0.05, 0.0, "absolute"
    theirs.contrast_anchors = theirs.contrast_positives = True

    for rows in (16, 64, 128):
        torch.manual_seed(0)
        query, positive, guide_query = (torch.randn(rows, 384) for _ in range(3))
        guide_positive = guide_query + 2 * torch.randn(rows, 384)
        inputs = [query.requires_grad_(), positive.requires_grad_()]

        def ours(inputs=inputs, guide=(guide_query, guide_positive)):
            loss = gist_loss(*inputs, guide_query=guide[0], guide_positive=guide[1], temperature=0.05)
            return loss, *torch.autograd.grad(loss, inputs)

        def peer(inputs=inputs, guide=(guide_query, guide_positive)):
            loss = theirs([{"x": each, "guide": its} for each, its in zip(inputs, guide, strict=True)], None)
            return loss, *torch.autograd.grad(loss, inputs)

        for mine, other in zip(ours(), peer(), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)
        largest = {}
        for name, call in (("ours", ours), ("theirs", peer)):
            with Largest() as watch:
                call()
            largest[name] = watch.megabytes
        seconds = race({"ours": ours, "theirs": peer}, number=max(1, 64 // rows))
        print(
            f"  batch {rows}: ours {1e3 * seconds['ours']:.2f} ms, ours / theirs = {seconds['ours'] / seconds['theirs']:.3f}; "
            f"largest tensor {largest['ours']:.2f} MB, ours / theirs = {largest['ours'] / largest['theirs']:.4f}"
        )


def sentences() -> Iterator[tuple[str, str]]:
    for pair in data.load("docstrings"):
        yield pair["sentence"], pair["code"][:400]


def steps(rows: int = 32) -> None:
    print(f"a training step without the optimiser, {rows} pairs of docstring and code, at most 64 tokens")
    folder = str(data.load("minilm"))
    guide, student = SentenceTransformer(folder, device="cpu"), SentenceTransformer(folder, device="cpu")
    del student[0].auto_model.encoder.layer[1:]
    guide.max_seq_length = student.max_seq_length = 64
    student.eval()  # no dropout, so that both compute the same
    queries, codes = zip(*[pair for pair, _ in zip(sentences(), range(rows), strict=False)], strict=True)

    begun = time.perf_counter()
    embeddings = [guide.encode(list(texts), convert_to_tensor=True) for texts in (queries, codes)]
    once = time.perf_counter() - begun
    labels = torch.stack([each.clone() for each in embeddings], dim=1)

    def features() -> list[dict[str, Tensor]]:
        return [student.preprocess(list(texts)) for texts in (queries, codes)]

    def step(loss: nn.Module) -> Tensor:
        student.zero_grad()
        value = loss(features(), labels)
        value.backward()
        return value

    def limit() -> None:
        student.zero_grad()
        sum(student(column)["sentence_embedding"].sum() for column in features()).backward()

    ours, theirs = GISTLoss(student, temperature=0.05), GISTEmbedLoss(student, guide, temperature=0.05)
    torch.testing.assert_close(step(ours), step(theirs), atol=1e-4, rtol=1e-4)
    seconds = race({"ours": lambda: step(ours), "theirs": lambda: step(theirs), "limit": limit})
    print(
        f"  ours {1 / seconds['ours']:.2f} steps a second; time ours / theirs = {seconds['ours'] / seconds['theirs']:.3f}, "
        f"ours / limit = {seconds['ours'] / seconds['limit']:.3f}"
    )
    print(f"  asking the guide beforehand takes {once / seconds['theirs']:.2f} of one of their steps for each batch, once")


if __name__ == "__main__":
    torch.set_num_threads(1)
    arithmetic()
    steps()
