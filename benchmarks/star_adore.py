"""ADORE in one go with ADORE query by query, and STAR with `mine_hard_negatives` and `MultipleNegativesRankingLoss`.

The loop is ADORE as its authors run it: for each query of the batch, all pairs of its list, in both orders, as square matrices.
Both are given 200 candidates for each of 32 queries, and both search the same faiss index for them: the loss alone, then the step
with the search. The limit is one search, one reading of the candidates, and their inner products, forward and backward.

A round of STAR is mining, then some steps over frozen features and one trained layer, so that arithmetic is what is timed.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from statistics import median

import faiss
import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import mine_hard_negatives
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from firsthand.embed.adore import adore_loss
from firsthand.embed.hard_negatives import draw_negatives, mine_static_negatives
from firsthand.embed.star import star_loss

ROUNDS = 9
BATCH, CANDIDATES, WIDTH = 32, 200, 384


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


def query_by_query(query: Tensor, corpus: np.ndarray, relevant: list[list[int]], lists: np.ndarray) -> Tensor:
    """The mean over queries of the weighted loss over all pairs of a list, in both orders, over twice their number."""
    total = torch.zeros(())
    for embedding, known, found in zip(query, relevant, lists, strict=True):
        label = np.isin(found, known)
        if not label.any():
            found, label = np.append(found, known), np.append(label, [True] * len(known))
        difference = label[:, None].astype(np.float32) - label[None]
        better, worse = torch.tensor(difference > 0).float(), torch.tensor(difference < 0).float()
        scores = (embedding * torch.tensor(corpus[found])).sum(dim=1, keepdim=True)
        one_way, other_way = torch.log(1 + torch.exp(scores.T - scores)), torch.log(1 + torch.exp(scores - scores.T))
        value = 1 / torch.arange(1, 1 + len(found)).float()
        weight = (value[:, None] - value[None]).abs()
        total = total + ((better * one_way + worse * other_way) * weight).sum() / (2 * better.sum())
    return total / len(query)


def adore(documents: int = 20_000) -> None:
    print(f"ADORE, forward and backward: batch {BATCH}, {CANDIDATES} candidates of {documents} documents, width {WIDTH}, float32")
    generator = torch.Generator().manual_seed(0)
    corpus = torch.randn(documents, WIDTH, generator=generator)
    relevant = [[number] if number % 2 else [number, documents - 1 - number] for number in range(BATCH)]
    query = corpus[:BATCH] * 0.02 + 0.1 * torch.randn(BATCH, WIDTH, generator=generator)  # some find what they look for
    query.requires_grad_()
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(corpus.numpy())
    array = corpus.numpy()
    found = flat.search(query.detach().numpy(), CANDIDATES)[1]
    given = torch.from_numpy(found)

    def ours(index: object) -> tuple[Tensor, ...]:
        loss = adore_loss(query, corpus, relevant, topk=CANDIDATES, index=index)
        return loss, *torch.autograd.grad(loss, query)

    def loop(lists: np.ndarray | None = None) -> tuple[Tensor, ...]:
        lists = flat.search(query.detach().numpy(), CANDIDATES)[1] if lists is None else lists
        loss = query_by_query(query, array, relevant, lists)
        return loss, *torch.autograd.grad(loss, query)

    def products(lists: Tensor) -> None:
        candidates = corpus.index_select(0, lists.flatten()).unflatten(0, lists.shape)
        torch.bmm(query[:, None], candidates.transpose(1, 2)).sum().backward()

    def searched(q: Tensor, k: int) -> Tensor:
        return given

    for mine, other in zip(ours(flat), loop(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)
    none_found = 1 - np.mean([np.isin(known, row).any() for known, row in zip(relevant, found, strict=True)])
    print(f"  the same loss and gradient; {none_found:.0%} of the queries find nothing relevant")
    seconds = race({"ours": lambda: ours(searched), "loop": lambda: loop(found), "limit": lambda: products(given)}, number=10)
    report("candidates given", seconds, "loop")
    step = {
        "ours": lambda: ours(flat),
        "ours, own search": lambda: ours(None),
        "loop": loop,
        "limit": lambda: products(torch.from_numpy(flat.search(query.detach().numpy(), CANDIDATES)[1])),
    }
    seconds = race(step, number=3)
    report("search and step", seconds, "loop")
    print(f"  blocks of torch.topk for the search: ours / loop = {seconds['ours, own search'] / seconds['loop']:.3f}")


class Given:
    """What `mine_hard_negatives` asks of a model, for texts that are numbers: rows of embeddings already there."""

    def __init__(self, embeddings: Tensor) -> None:
        self.embeddings, self.prompts, self.device = embeddings, {}, torch.device("cpu")

    def _encode(self, texts: list[str], **kwargs: object) -> np.ndarray:
        return self.embeddings[[int(text) for text in texts]].numpy()

    encode = encode_query = encode_document = _encode
    similarity = staticmethod(lambda a, b: torch.as_tensor(a) @ torch.as_tensor(b).T)
    similarity_pairwise = staticmethod(lambda a, b: (torch.as_tensor(a) * torch.as_tensor(b)).sum(dim=-1))


def star(pairs: int = 2000, steps: int = 20) -> None:
    print(f"STAR: {pairs} pairs, width {WIDTH}; mining 200 for each query, one drawn; then {steps} steps of batch {BATCH}")
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(pairs, WIDTH, generator=generator)
    documents = queries + torch.randn(pairs, WIDTH, generator=generator)
    relevant = [[row] for row in range(pairs)]
    texts = Dataset.from_dict({"query": [str(n) for n in range(pairs)], "document": [str(pairs + n) for n in range(pairs)]})
    model = Given(torch.cat([queries, documents]))

    def theirs_mined() -> Dataset:
        options = {"range_max": 200, "num_negatives": 1, "sampling_strategy": "random", "verbose": False}
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            return mine_hard_negatives(texts, model, **options)

    def ours_mined() -> Tensor:
        return mine_static_negatives(queries, documents, relevant)

    head = nn.Linear(WIDTH, WIDTH)
    ranking = MultipleNegativesRankingLoss(nn.Identity(), scale=1.0, similarity_fct=lambda a, b: a @ b.T)
    order = torch.randperm(pairs, generator=generator)[: BATCH * steps].split(BATCH)

    def train(loss: Callable[[Tensor, Tensor, Tensor], Tensor], negatives: Callable[[Tensor], Tensor]) -> None:
        for rows in order:
            head.zero_grad()
            query, positive, hard = head(torch.stack([queries[rows], documents[rows], documents[negatives(rows)]])).unbind()
            loss(query, positive, hard).backward()

    def ours() -> None:
        mined = ours_mined()
        train(lambda q, p, h: star_loss(q, p, h[:, None]), lambda rows: draw_negatives(mined, rows, 1, generator)[:, 0])

    def theirs() -> None:
        mined = torch.tensor([int(text) - pairs for text in theirs_mined()["negative"]])
        train(lambda q, p, h: ranking.compute_loss_from_embeddings([q, p, h], None), lambda rows: mined[rows])

    ours_ids, one = ours_mined(), torch.tensor([int(text) - pairs for text in theirs_mined()["negative"]])
    inside = (ours_ids == one[:, None]).any(dim=1).float().mean()
    print(f"  of the negatives theirs draws, {inside:.1%} are among ours (theirs ranks the positive among its 200)")
    report(
        "mining", race({"ours": ours_mined, "theirs": theirs_mined, "limit": lambda: (queries @ documents.T).topk(201)}), "theirs"
    )
    nothing = torch.zeros(pairs, dtype=torch.long)
    seconds = race(
        {
            "ours": lambda: train(lambda q, p, h: star_loss(q, p, h[:, None]), lambda rows: nothing[rows]),
            "theirs": lambda: train(
                lambda q, p, h: ranking.compute_loss_from_embeddings([q, p, h], None), lambda rows: nothing[rows]
            ),
            "limit": lambda: train(lambda q, p, h: q.sum() + p.sum() + h.sum(), lambda rows: nothing[rows]),
        }
    )
    report("steps", seconds, "theirs")
    seconds = race({"ours": ours, "theirs": theirs})
    print(f"  mining and steps: ours / theirs = {seconds['ours'] / seconds['theirs']:.3f}")


def report(what: str, seconds: dict[str, float], peer: str) -> None:
    print(
        f"  {what}: ours {1e3 * seconds['ours']:.1f} ms, {seconds[peer] / seconds['ours']:.1f} times as fast as {peer} "
        f"(ours / {peer} = {seconds['ours'] / seconds[peer]:.3f}), ours / limit = {seconds['ours'] / seconds['limit']:.2f}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    disable_progress_bars()
    adore()
    star()
