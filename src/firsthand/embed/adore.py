"""ADORE: the query encoder learns against the documents that the whole index gives it now, in every step."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from firsthand.embed.hard_negatives import nearest_documents, relevant_ids

Relevant = Sequence[Sequence[int]] | Int[Tensor, "batch relevant"]


@overload
def adore_loss(
    query: Tensor,
    corpus: Tensor,
    relevant: Relevant,
    *,
    topk: int = 200,
    metric_cut: int | None = None,
    index: Any = None,
    return_details: Literal[False] = False,
) -> Tensor: ...


@overload
def adore_loss(
    query: Tensor,
    corpus: Tensor,
    relevant: Relevant,
    *,
    topk: int = 200,
    metric_cut: int | None = None,
    index: Any = None,
    return_details: Literal[True],
) -> tuple[Tensor, dict[str, Tensor]]: ...


def adore_loss(
    query: Float[Tensor, "batch dim"],
    corpus: Float[Tensor, "documents dim"],
    relevant: Relevant,
    *,
    topk: int = 200,
    metric_cut: int | None = None,
    index: Any = None,
    return_details: bool = False,
) -> Float[Tensor, ""] | tuple[Float[Tensor, ""], dict[str, Tensor]]:
    r"""Pairwise loss over the list that each query retrieves now, pairs weighted by what exchanging their ranks would change.

    With the retrieved list $C_i$, its relevant documents $A_i$ and the others $B_i$, and $y_c = q_i \cdot d_c$:

    $$ L_i = \frac{1}{|A_i||B_i|} \sum_{a \in A_i} \sum_{b \in B_i}
             \left|\tfrac1{r_a} - \tfrac1{r_b}\right| \log(1 + e^{y_b - y_a}) $$

    and the loss is the mean over queries. Where nothing relevant is among the first `topk`, all relevant documents join the list
    at its end. Ranks r are those of the list, and no gradient goes through them. So a loss falls as a relevant document
    gains on the others, but jumps, up or down, where ranks change.

    Args:
        query: embeddings of the queries in training.
        corpus: of all documents, fixed. It may be on another device than `query`: then only what is retrieved moves.
        relevant: ids of the documents relevant to each query, at least one each; or the same as a matrix filled up with -1.
        topk: how many documents are retrieved for a query, at least 1; more than there are become all, with a warning.
        metric_cut: ranks beyond it count as 1/r = 0, at least 1; None for no cut.
        index: see `nearest_documents`.
        return_details: whether to return more than the loss.

    Returns:
        The loss, in the dtype of `query`; scores are computed in float32 or wider. With `return_details` also a dictionary of
        matrices, one row a query: `"ids"`, the lists, filled up with -1; `"relevant"`, which of them are; and `"scores"`.

    Raises:
        ValueError: `corpus` wants a gradient; see `nearest_documents` and `mine_static_negatives`; `metric_cut` below 1.

    Source:
        Zhan et al., "Optimizing Dense Retrieval Model Training with Hard Negatives", SIGIR 2021, arXiv 2104.08051, section ADORE,
        and its code, which goes query by query over matrices of all pairs. There, in one version, leaving out the cut sets every
        weight to 0; here it means no cut. Relevant documents that join a list do so in the order of their ids, our choice.
    """
    if corpus.requires_grad:
        raise ValueError("corpus must not want a gradient: ADORE trains queries against fixed documents. Pass corpus.detach()")
    if metric_cut is not None and metric_cut < 1:
        raise ValueError(f"metric_cut must be at least 1, or None, got {metric_cut}")
    known = relevant_ids(relevant, len(query), len(corpus)).to(corpus.device)
    ids, hits = _lists(nearest_documents(query.detach(), corpus, topk, index), known)
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        documents = corpus.index_select(0, ids.clamp(min=0).flatten()).to(query.device, dtype)
        documents = documents.unflatten(0, ids.shape)
        scores = torch.bmm(query.to(dtype)[:, None], documents.transpose(1, 2))[:, 0]  # in this order both ways are fast
    ids, hits = ids.to(query.device), hits.to(query.device)
    losses = _weighted_pairs(scores, hits, ids >= 0, metric_cut)
    loss = losses.mean().to(query.dtype)
    return (loss, {"ids": ids, "relevant": hits, "scores": scores.detach()}) if return_details else loss


def _lists(ids: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """What was retrieved, and at its end the relevant documents of queries that found none; and which are relevant."""
    hits = torch.zeros_like(ids, dtype=torch.bool)
    for column in known.T:
        hits |= (ids == column[:, None]) & (ids >= 0)
    missed = hits.sum(dim=1, keepdim=True) == 0
    if missed.any():
        tail = known.masked_fill(~missed, -1)
        ids, hits = torch.cat([ids, tail], dim=1), torch.cat([hits, tail >= 0], dim=1)
    return ids, hits


def _weighted_pairs(scores: Tensor, hits: Tensor, there: Tensor, metric_cut: int | None) -> Tensor:
    """The loss of each list, over pairs of a relevant document and another."""
    rank = there.cumsum(dim=1)  # of a list with gaps: only what is there is counted
    most = int(hits.sum(dim=1).max())
    counts, place = hits.to(torch.uint8).topk(most, dim=1)  # the places of the relevant documents
    counts, others = counts.bool(), there & ~hits
    margins = scores[:, None, :] - scores.gather(1, place)[:, :, None]
    weights = rank_weights(rank.gather(1, place)[:, :, None], rank[:, None, :], metric_cut).to(scores.dtype)
    pairs = counts[:, :, None] & others[:, None, :]
    total = (F.softplus(margins) * weights.masked_fill(~pairs, 0.0)).sum(dim=(1, 2))
    return total / pairs.sum(dim=(1, 2)).clamp(min=1)


def rank_weights(
    first: Int[Tensor, "*#shape"], second: Int[Tensor, "*#shape"], metric_cut: int | None = None
) -> Float[Tensor, "..."]:
    r"""What exchanging two documents changes in the reciprocal rank.

    $$ w = |\rho(r) - \rho(s)|, \qquad \rho(r) = 1/r \text{ if } r \le \mathrm{cut}, \text{ else } 0 $$

    Args:
        first: ranks r, at least 1.
        second: ranks s, of a shape that goes with the other.
        metric_cut: the cut; None for none.

    Returns:
        Weights, float32.

    Source:
        arXiv 2104.08051, after LambdaRank.
    """

    def value(rank: Tensor) -> Tensor:
        reciprocal = 1 / rank.float().clamp(min=1)
        return reciprocal if metric_cut is None else reciprocal.masked_fill(rank > metric_cut, 0.0)

    return (value(first) - value(second)).abs()


class ADORELoss(nn.Module):
    """`adore_loss` as a sentence-transformers loss: one text column, the query, and a column `label` with what is relevant to it.

    `label` holds the ids of the relevant documents, a list a row, all of one length: fill up with -1. The documents were embedded
    beforehand (`refresh_corpus`) and stay as they are, and so does the index: a model that encodes queries and documents becomes
    two. Save them as one with `Router.for_query_document`. There is no state: give a resumed run the same corpus.

    Args:
        model: the `SentenceTransformer` that encodes queries.
        corpus: embeddings of all documents, by the encoder they are searched with.
        topk: see `adore_loss`, as for the next two.
        metric_cut: see there.
        index: see there.
        scale: what inner products are multiplied by, positive: see `STARLoss`.

    Raises:
        ValueError: `scale` is out of range; or, in `forward`, there are several text columns or no such labels.
    """

    corpus: Tensor

    def __init__(
        self,
        model: nn.Module,
        corpus: Float[Tensor, "documents dim"],
        *,
        topk: int = 200,
        metric_cut: int | None = None,
        index: Any = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.model, self.topk, self.metric_cut, self.index, self.scale = model, topk, metric_cut, index, scale
        self.register_buffer("corpus", corpus, persistent=False)

    def forward(self, sentence_features: Iterable[Any], labels: Tensor | None) -> Float[Tensor, ""]:
        columns = list(sentence_features)
        if len(columns) != 1:
            raise ValueError(f"ADORELoss needs one text column, the query, got {len(columns)}")
        if labels is None or labels.ndim > 2 or labels.is_floating_point():
            raise ValueError(
                "labels must hold the ids of the documents relevant to each query, integers (batch, most), "
                f"got {None if labels is None else tuple(labels.shape)}"
            )
        query = self.scale * self.model(columns[0])["sentence_embedding"]
        labels = labels.reshape(len(query), -1)
        return adore_loss(query, self.corpus, labels, topk=self.topk, metric_cut=self.metric_cut, index=self.index)

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card records."""
        return {"topk": self.topk, "metric_cut": self.metric_cut, "scale": self.scale, "documents": len(self.corpus)}
