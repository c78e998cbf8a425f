"""Hard negatives: the nearest documents that are not relevant, mined once, or again and again while a model trains."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

try:
    from transformers.trainer_callback import TrainerCallback
except ImportError:
    TrainerCallback = object  # type: ignore[assignment, misc]

BLOCK = 1024, 8192  # queries and documents that are scored at a time


def inner_products(
    query: Float[Tensor, "queries dim"], documents: Float[Tensor, "documents dim"]
) -> Float[Tensor, "queries documents"]:
    """Of each query with each document, in float32 or wider, under autocast too."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        return query.to(dtype) @ documents.to(dtype).T


@torch.no_grad()
def nearest_documents(
    query: Float[Tensor, "queries dim"], corpus: Float[Tensor, "documents dim"], k: int, index: Any = None
) -> Int[Tensor, "queries found"]:
    """The ids of the k documents with the largest inner product with each query, best first.

    Args:
        query: embeddings of the queries.
        corpus: of the documents; a document's id is its row.
        k: how many, at least 1. More than there are documents become all of them, with a warning.
        index: what searches: a faiss index of `corpus`, or a function from queries and k to ids. An exact search in blocks if
            None.

    Returns:
        The ids, on the device of `corpus`; -1 where an approximate index found fewer than k.

    Raises:
        ValueError: shapes that do not belong together, `k` below 1, an index of other documents or that returns no such ids.
    """
    if query.ndim != 2 or corpus.ndim != 2 or query.shape[1] != corpus.shape[1] or not len(corpus):
        raise ValueError(f"corpus must have shape (documents, {query.shape[-1]}) like query, got {tuple(corpus.shape)}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if k > len(corpus):
        warnings.warn(f"k = {k} is more than the {len(corpus)} documents there are: all are taken", stacklevel=2)
        k = len(corpus)
    if index is None:
        return torch.cat([_nearest_of_blocks(rows, corpus, k) for rows in query.to(corpus.device).split(BLOCK[0])])
    if hasattr(index, "search"):
        if index.ntotal != len(corpus):
            raise ValueError(f"index must hold the {len(corpus)} documents of corpus, got {index.ntotal}")
        ids = torch.from_numpy(index.search(query.float().cpu().contiguous().numpy(), k)[1])
    else:
        ids = index(query, k)
    if (
        ids.is_floating_point()
        or ids.shape[:-1] != query.shape[:1]
        or (ids.numel() and not -1 <= ids.min() <= ids.max() < len(corpus))
    ):
        raise ValueError(
            f"index must return integer ids below {len(corpus)} of shape ({len(query)}, {k}), got {tuple(ids.shape)}"
        )
    return ids.long().to(corpus.device)


def _nearest_of_blocks(query: Tensor, corpus: Tensor, k: int) -> Tensor:
    best: Tensor | None = None
    for start in range(0, len(corpus), BLOCK[1]):
        scores = inner_products(query, corpus[start : start + BLOCK[1]])
        values, places = scores.topk(min(k, scores.shape[1]), dim=1)
        places += start
        if best is not None:
            values, places = torch.cat([best, values], dim=1), torch.cat([ids, places], dim=1)
            values, order = values.topk(min(k, values.shape[1]), dim=1)
            places = places.gather(1, order)
        best, ids = values, places
    return ids


def mine_static_negatives(
    query: Float[Tensor, "queries dim"],
    corpus: Float[Tensor, "documents dim"],
    relevant: Sequence[Sequence[int]] | Int[Tensor, "queries relevant"],
    topk: int = 200,
    index: Any = None,
) -> Int[Tensor, "queries topk"]:
    """The nearest documents of each query that are not relevant to it, nearest first.

    Args:
        query: embeddings of the training queries by the model as it is, after a warm-up.
        corpus: of all documents.
        relevant: ids of the documents relevant to each query, at least one each; or the same as a matrix filled up with -1.
        topk: how many for each query, at least 1. Where the corpus has fewer, the last columns are -1.
        index: see `nearest_documents`. An approximate one may find fewer than `topk` too.

    Returns:
        The ids, on the device of `corpus`.

    Raises:
        ValueError: see `nearest_documents`; or a query without relevant documents, or an id out of range.

    Source:
        arXiv 2104.08051: the top 200 of the warm-up model, without the relevant ones.
    """
    if topk < 1:
        raise ValueError(f"topk must be at least 1, got {topk}")
    known = relevant_ids(relevant, len(query), len(corpus)).to(corpus.device)
    found = nearest_documents(query, corpus, min(topk + known.shape[1], len(corpus)), index)
    blocks = zip(found.split(BLOCK[0]), known.split(BLOCK[0]), strict=True)
    kept = torch.cat([_irrelevant_first(*block)[:, :topk] for block in blocks])
    return F.pad(kept, (0, topk - kept.shape[1]), value=-1)


def _irrelevant_first(ids: Tensor, relevant: Tensor) -> Tensor:
    gone = ids < 0
    for column in relevant.T:
        gone |= ids == column[:, None]
    gone, order = gone.to(torch.uint8).sort(dim=1, stable=True)
    return ids.gather(1, order).masked_fill(gone.bool(), -1)


def draw_negatives(
    mined: Int[Tensor, "queries topk"], rows: Int[Tensor, " batch"], count: int, generator: torch.Generator | None = None
) -> Int[Tensor, "batch count"]:
    """So many of the mined negatives of each query, any of them with the same chance, none twice.

    Args:
        mined: ids as `mine_static_negatives` returns them, on the CPU.
        rows: the queries to draw for.
        count: how many for each, at least 1.
        generator: decides which, on the CPU.

    Raises:
        ValueError: a query has fewer than `count`.
    """
    candidates = mined[rows]
    if count < 1 or int((candidates >= 0).sum(dim=1).min()) < count:
        raise ValueError(f"count must be from 1 to the number of negatives each query has, got {count}")
    lot = torch.rand(candidates.shape, generator=generator).masked_fill(candidates < 0, -1.0)
    return candidates.gather(1, lot.topk(count, dim=1).indices)


def refresh_corpus(
    encode: Callable[[list[str]], Any], documents: Sequence[str], batch_size: int = 4096
) -> Float[Tensor, "texts dim"]:
    """The embeddings of all documents by the model as it now is, float32.

    Args:
        encode: from texts to their embeddings, a tensor or array (texts, d), such as `model.encode_document`.
        documents: the corpus.
        batch_size: how many texts `encode` is given at a time; it may cut them into smaller batches itself.

    Returns:
        The embeddings, on the device that `encode` leaves them on.

    Raises:
        ValueError: there are no documents, or `encode` returns something else than one finite vector a text.
    """
    if not len(documents) or batch_size < 1:
        raise ValueError(f"documents and batch_size must be at least 1, got {len(documents)} and {batch_size}")
    parts = []
    for start in range(0, len(documents), batch_size):
        texts = list(documents[start : start + batch_size])
        part = torch.as_tensor(encode(texts)).detach().float()
        if part.ndim != 2 or len(part) != len(texts) or not part.isfinite().all():
            raise ValueError(f"encode must return a finite vector for each of {len(texts)} texts, got shape {tuple(part.shape)}")
        parts.append(part.clone())  # a host may compute in inference mode, and a copy may be trained on
    return torch.cat(parts)


def relevant_ids(
    relevant: Sequence[Sequence[int]] | Int[Tensor, "queries relevant"], queries: int, documents: int
) -> Int[Tensor, "queries most"]:
    """Lists of ids as a matrix: ascending, each once, filled up with -1.

    Args:
        relevant: of each query; or such a matrix in any order.
        queries: how many there are.
        documents: how many there are.

    Raises:
        ValueError: as many lists as queries there are not, one is empty, or holds an id out of range.
    """
    if len(relevant) != queries:
        raise ValueError(f"relevant must have a list for each of {queries} queries, got {len(relevant)}")
    if isinstance(relevant, Tensor):
        ids = relevant.long()
    else:
        most = max((len(row) for row in relevant), default=0)
        ids = torch.tensor([[*row, *[-1] * (most - len(row))] for row in relevant], dtype=torch.long).reshape(queries, most)
        if any(min(row, default=0) < 0 for row in relevant):
            raise ValueError("relevant must hold ids of at least 0, got a negative one")
    if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < documents:
        raise ValueError(f"relevant must hold ids below {documents}, got {int(ids.min())} to {int(ids.max())}")
    none = ~(ids >= 0).any(dim=1) if ids.shape[1] else torch.ones(queries, dtype=torch.bool)
    if none.any():
        raise ValueError(f"relevant must name a document for every query, got none for {int(none.sum())} of {queries}")
    ids = ids.sort(dim=1).values
    again = F.pad(ids[:, 1:] == ids[:, :-1], (1, 0))
    last = torch.iinfo(torch.long).max  # so that what is no id comes to the end
    ids = ids.masked_fill(again | (ids < 0), last).sort(dim=1).values
    return ids.masked_fill(ids == last, -1)[:, : int((ids != last).sum(dim=1).max())]


@torch.no_grad()
def ranking_error_profile(
    query: Float[Tensor, "queries dim"],
    corpus: Float[Tensor, "documents dim"],
    relevant: Sequence[Sequence[int]] | Int[Tensor, "queries relevant"],
    topk: int = 10,
) -> dict[str, Float[Tensor, " queries"]]:
    r"""What random and what hard negatives minimise: wrong pairs over the whole ranking, and at its top.

    $$ e_i = \sum_{r \in \mathrm{Rel}_i} \#\{c \notin \mathrm{Rel}_i : s(q_i, c) > s(q_i, r)\} $$

    The errors at the top count only those c that are among the first k.

    Args:
        query: embeddings of queries.
        corpus: of all documents.
        relevant: see `mine_static_negatives`.
        topk: k, at least 1.

    Returns:
        `"pairwise"` and `"top"`, one number a query. Where a few queries hold most of the first, a model trained with random
        negatives spends itself on them.

    Raises:
        ValueError: see `mine_static_negatives`.

    Source:
        arXiv 2104.08051, its analysis of random and hard negatives; the names are ours.
    """
    known = relevant_ids(relevant, len(query), len(corpus)).to(corpus.device)
    parts = [
        _wrong_pairs(*block, corpus, topk) for block in zip(query.to(corpus.device).split(256), known.split(256), strict=True)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in ("pairwise", "top")}


def _wrong_pairs(query: Tensor, known: Tensor, corpus: Tensor, topk: int) -> dict[str, Tensor]:
    scores = inner_products(query, corpus)
    there = known >= 0
    row = torch.arange(len(query), device=corpus.device)[:, None].expand_as(known)[there]
    others = scores.clone()
    others[row, known[there]] = -torch.inf
    first = nearest_documents(query, corpus, min(topk, len(corpus)))
    best = others.gather(1, first)
    wrong = {"pairwise": torch.zeros_like(scores[:, 0]), "top": torch.zeros_like(scores[:, 0])}
    for column, counts in zip(known.T, there.T, strict=True):
        own = scores.gather(1, column.clamp(min=0)[:, None]).masked_fill(~counts[:, None], torch.inf)
        wrong["pairwise"] += (others > own).sum(dim=1)
        wrong["top"] += (best > own).sum(dim=1)
    return wrong


class NegativeRefresh(TrainerCallback):
    """Hard negatives mined with the model as it is, and mined again while it trains, without a restart.

    Give it to `STARLoss`, which draws from it in every step, and to the trainer, as one of its `callbacks`. It mines when
    training begins and then after every so many steps, encoding all queries and documents anew. A checkpoint gets one file more,
    `negatives.safetensors`, with the ids and the state of the draws, so that a run resumed in the middle between two refreshes
    goes on bit for bit. Negatives are drawn when a step uses them, not when the data loader reads ahead, so none is stale.

    Of several processes each mines for itself, the same.

    Args:
        queries: the training queries; a query's id is its place.
        documents: the corpus; likewise.
        relevant: ids of the documents relevant to each query, at least one each.
        every: optimiser steps between two refreshes, at least 1; None to mine once, as STAR does.
        topk: from how many negatives to draw.
        hard: how many to draw for each query in each step.
        batch_size: texts encoded at a time.
        seed: of the draws.
        index: makes what `nearest_documents` searches with out of fresh embeddings of the corpus; exact search if None.
        query_prompt: what stands before a query when it is encoded; if None, the model's own prompt for queries, if any.
        document_prompt: likewise, and before negatives in training; there None is no prompt. Use the prompts of the trainer's
            arguments.

    Raises:
        ValueError: an argument is out of range; or, when training resumes, there is no such file in the checkpoint.
        ImportError: transformers is not installed.

    Source:
        arXiv 2104.08051 mines once, `every=None`. To refresh in the course of training is ANCE's, Xiong et al., 2020, arXiv
        2007.00808, which does it in another process, so that negatives lag behind; here training waits.
    """

    def __init__(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        relevant: Sequence[Sequence[int]] | Int[Tensor, "queries relevant"],
        every: int | None = None,
        *,
        topk: int = 200,
        hard: int = 1,
        batch_size: int = 64,
        seed: int = 0,
        index: Callable[[Tensor], Any] | None = None,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
    ) -> None:
        if TrainerCallback is object:
            raise ImportError("NegativeRefresh needs transformers: pip install 'firsthand[embed]'")
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1, or None, got {every}")
        if not 1 <= hard <= topk:
            raise ValueError(f"hard must be from 1 to topk = {topk}, got {hard}")
        self.queries, self.documents, self.every = list(queries), list(documents), every
        self.relevant = relevant_ids(relevant, len(self.queries), len(self.documents)).cpu()
        self.topk, self.hard, self.batch_size, self.index = topk, hard, batch_size, index
        self.query_prompt, self.document_prompt = query_prompt, document_prompt
        self.generator = torch.Generator().manual_seed(seed)
        self.mined: Tensor | None = None
        self.step = 0

    def mine(self, model: Any) -> None:
        """Mine with this `SentenceTransformer` as it is. It is left in the mode it was in, training or evaluation."""
        training = model.training
        how: dict[str, Any] = {"batch_size": self.batch_size, "convert_to_tensor": True, "show_progress_bar": False}
        asked = {} if self.query_prompt is None else {"prompt": self.query_prompt}
        shown = {} if self.document_prompt is None else {"prompt": self.document_prompt}
        corpus = refresh_corpus(lambda texts: model.encode_document(texts, **how, **shown), self.documents)
        queries = refresh_corpus(lambda texts: model.encode_query(texts, **how, **asked), self.queries)
        model.train(training)
        index = self.index(corpus) if self.index else None
        self.mined = mine_static_negatives(queries, corpus, self.relevant, self.topk, index).cpu()

    def draw(self, rows: Int[Tensor, " batch"], training: bool = True) -> Int[Tensor, "batch hard"]:
        """The ids of hard negatives for these queries: any of those mined, or in evaluation the nearest.

        Raises:
            ValueError: nothing is mined yet, or too few for one of the queries.
        """
        if self.mined is None:
            raise ValueError(
                "nothing is mined yet: give the NegativeRefresh to the trainer as one of its callbacks, or call mine"
            )
        rows = rows.cpu()
        return draw_negatives(self.mined, rows, self.hard, self.generator) if training else self.mined[rows, : self.hard]

    def state_dict(self) -> dict[str, Tensor]:
        """All that a run needs to go on: the ids, the state of the draws, and the step of the last refresh."""
        if self.mined is None:
            raise ValueError("nothing is mined yet, so there is no state")
        return {"mined": self.mined.int(), "generator": self.generator.get_state(), "step": torch.tensor(self.step)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict`'s state."""
        shape = (len(self.queries), self.topk)
        if state["mined"].shape != shape or int(state["mined"].max()) >= len(self.documents):
            raise ValueError(
                f"state must hold ids of shape {shape} below {len(self.documents)}, got {tuple(state['mined'].shape)} "
                f"up to {int(state['mined'].max())}: it is of other queries or documents"
            )
        self.mined, self.step = state["mined"].long(), int(state["step"])
        self.generator.set_state(state["generator"])

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        from safetensors.torch import load_file

        if not state.global_step:
            self.step = 0
            return self.mine(model)
        kept = _file(args, state)
        if not kept.is_file():
            raise ValueError(f"to resume at step {state.global_step}, {kept} must be there: the checkpoint was made without it")
        return self.load_state_dict(load_file(kept))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self.mine(model)
            self.step = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from safetensors.torch import save_file

        if state.is_world_process_zero:
            kept = _file(args, state)
            part = kept.with_suffix(".part")
            save_file(self.state_dict(), part)
            os.replace(part, kept)  # written whole or not at all


def _file(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "negatives.safetensors"
