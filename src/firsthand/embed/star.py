"""STAR: hard negatives mined once beside random ones, every pair of a positive and a negative for itself."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from firsthand.embed.hard_negatives import NegativeRefresh, inner_products, relevant_ids


def star_loss(
    query: Float[Tensor, "batch dim"],
    positive: Float[Tensor, "batch dim"],
    hard: Float[Tensor, "batch hard dim"] | None = None,
    *,
    valid_random: Bool[Tensor, "batch batch"] | None = None,
    valid_hard: Bool[Tensor, "batch negatives"] | None = None,
    alpha: float = 1.0,
    reduction: str = "mean",
) -> Float[Tensor, "*batch"]:
    r"""Mean loss over pairs of a positive and one negative, the negatives being random and hard.

    With inner products $s$ and $\ell_i(c) = \log(1 + e^{s(q_i,c) - s(q_i,p_i)})$:

    $$ L = \frac{\alpha \sum_i \sum_{j \in R_i} \ell_i(p_j) + \sum_i \sum_{(j,k) \in H_i} \ell_i(h_{jk})}
                {\alpha \sum_i |R_i| + \sum_i |H_i|} $$

    $R_i$ are the other positives of the batch, $H_i$ the hard negatives of all rows: to its own row a hard negative is hard, to
    the others it is a random one more.

    Args:
        query: embeddings as they are: neither normalised nor divided by a temperature.
        positive: the document that belongs to each query.
        hard: hard negatives of each query, (B, H, d). Without them this is the in-batch pairwise (RankNet) loss.
        valid_random: false where positive j is relevant to query i too, (B, B); false on the diagonal.
        valid_hard: false where hard negative (j, k) is relevant to query i, (B, B·H); the H of the first row come first.
        alpha: weight of the random pairs, at least 0.
        reduction: `"mean"` as above, over pairs; `"none"`, the weighted sum of each row's pairs; `"sum"`, of all.

    Returns:
        The loss, in the dtype of `query`; scores are computed in float32 or wider. 0 if no pair is valid.

    Raises:
        ValueError: shapes that do not belong together, `valid_random` true on the diagonal, `alpha` or `reduction` out of range.

    Source:
        Zhan et al., "Optimizing Dense Retrieval Model Training with Hard Negatives", SIGIR 2021, arXiv 2104.08051, section STAR.
        All pairs weigh the same in its code, which has no α. Dividing by the weights, not by the number of pairs, is our choice.
    """
    _check_pairs(query, positive, hard, "hard")
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be at least 0 and finite, got {alpha}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    rows = len(query)
    if valid_random is None:
        valid_random = ~torch.eye(rows, dtype=torch.bool, device=query.device)
    else:
        _check_valid(valid_random, "valid_random", (rows, rows))
        if valid_random.diagonal().any():
            raise ValueError("valid_random must be false on the diagonal: a positive is no negative of its own query")
    scores = [inner_products(query, positive)]
    weights = [alpha * valid_random.to(scores[0].dtype)]
    if hard is not None:
        flat = hard.flatten(0, 1)
        if valid_hard is not None:
            _check_valid(valid_hard, "valid_hard", (rows, len(flat)))
        scores.append(inner_products(query, flat))
        weights.append(torch.ones_like(scores[1]) if valid_hard is None else valid_hard.to(scores[0].dtype))
    return _pairwise(scores[0].diagonal(), torch.cat(scores, dim=1), torch.cat(weights, dim=1), reduction).to(query.dtype)


def pairwise_negatives_loss(
    query: Float[Tensor, "batch dim"],
    positive: Float[Tensor, "batch dim"],
    negatives: Float[Tensor, "shared dim"] | Float[Tensor, "batch own dim"],
    valid: Bool[Tensor, "batch _"] | None = None,
    *,
    reduction: str = "mean",
) -> Float[Tensor, "*batch"]:
    r"""Mean loss over pairs of a positive and one of the given negatives: sampled at random, or hard ones alone.

    $$ L = \frac{\sum_i \sum_{c \in C_i} \log(1 + e^{s(q_i,c) - s(q_i,p_i)})}{\sum_i |C_i|} $$

    Args:
        query: see `star_loss`.
        positive: see `star_loss`. Positives of other rows are no negatives here.
        negatives: (M, d), shared by all rows; or (B, K, d), each row's own.
        valid: false where a negative is relevant to the query, (B, M) or (B, K).
        reduction: see `star_loss`.

    Raises:
        ValueError: shapes that do not belong together, or an unknown `reduction`.

    Source:
        arXiv 2104.08051: what STAR is compared with. Its code shares the random negatives of a batch.
    """
    shared = negatives.ndim == 2
    _check_pairs(query, positive, negatives[None].expand(len(query), -1, -1) if shared else negatives, "negatives")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    own = _dots(query, positive[:, None])[:, 0]
    scores = inner_products(query, negatives) if shared else _dots(query, negatives)
    if valid is not None:
        _check_valid(valid, "valid", tuple(scores.shape))
    weights = torch.ones_like(scores) if valid is None else valid.to(scores.dtype)
    return _pairwise(own, scores, weights, reduction).to(query.dtype)


def _pairwise(own: Tensor, scores: Tensor, weights: Tensor, reduction: str) -> Tensor:
    # A pair that does not count has its score replaced, not only its loss: 0 times an infinite loss would be NaN.
    excess = (scores - own[:, None]).masked_fill(weights == 0, 0.0)
    losses = (weights * F.softplus(excess)).sum(dim=1)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def _dots(query: Tensor, own: Tensor) -> Tensor:
    """Inner products of each query with its own documents, (B, K)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        return torch.bmm(query.to(dtype)[:, None], own.to(dtype).transpose(1, 2))[:, 0]


def _check_pairs(query: Tensor, positive: Tensor, negatives: Tensor | None, name: str) -> None:
    if query.ndim != 2 or not query.is_floating_point():
        raise ValueError(f"query must be floating point, of shape (B, d), got {query.dtype} {tuple(query.shape)}")
    if positive.shape != query.shape:
        raise ValueError(f"positive must have shape {tuple(query.shape)} like query, got {tuple(positive.shape)}")
    if negatives is not None and (negatives.ndim != 3 or negatives.shape[::2] != query.shape):
        raise ValueError(f"{name} must have shape ({len(query)}, K, {query.shape[1]}), got {tuple(negatives.shape)}")


def _check_valid(valid: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if valid.dtype != torch.bool or valid.shape != shape:
        raise ValueError(f"{name} must be boolean of shape {shape}, got {valid.dtype} {tuple(valid.shape)}")


class STARLoss(nn.Module):
    """`star_loss` as a sentence-transformers loss.

    Either the data set holds the negatives, in text columns (query, positive, hard negatives), or `negatives` does, and the
    columns are query and positive. What is relevant to what is known by ids: with `relevant` or `negatives`, a column `label`
    holds a list for each row, the ids of its query and of its documents in the order of the columns. Without either, only a row's
    own positive is taken to be relevant to its query.

    Args:
        model: the `SentenceTransformer` to train. Inner products of unit vectors differ by 2 at most, where this loss hardly
            tells right from wrong: leave out a `Normalize` module, or set `scale`.
        relevant: ids of the documents relevant to each query.
        alpha: see `star_loss`.
        negatives: draws the hard negatives.
        scale: what inner products are multiplied by, positive. 1 in the paper, which does not normalise.

    Raises:
        ValueError: both `relevant` and `negatives` are given, `scale` is out of range; or, in `forward`, the label column does
            not hold what it should.
    """

    def __init__(
        self,
        model: nn.Module,
        relevant: Sequence[Sequence[int]] | Int[Tensor, "queries relevant"] | None = None,
        *,
        alpha: float = 1.0,
        negatives: NegativeRefresh | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if relevant is not None and negatives is not None:
            raise ValueError("relevant must not be given with negatives, which knows it")
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.model, self.alpha, self.negatives, self.scale = model, alpha, negatives, scale
        known = negatives.relevant if negatives else relevant
        if known is not None and not isinstance(known, Tensor):
            known = relevant_ids(known, len(known), 1 + max(max(row, default=0) for row in known))
        self.relevant = known

    def forward(self, sentence_features: Iterable[Any], labels: Tensor | None) -> Float[Tensor, ""]:
        try:
            from sentence_transformers.base.losses.merged_forward import embed_columns
        except ImportError as error:
            message = "STARLoss needs sentence-transformers 6.2 or later: pip install 'firsthand[embed]'"
            raise ImportError(message) from error

        columns = list(sentence_features)
        ids = None
        if self.relevant is not None:
            if labels is None or labels.ndim != 2 or labels.shape[1] != len(columns) or labels.is_floating_point():
                raise ValueError(
                    f"labels must hold the ids of the query and of {len(columns) - 1} documents for each row, "
                    f"got {None if labels is None else tuple(labels.shape)}"
                )
            ids = labels.cpu()
        if self.negatives:
            drawn = self.negatives.draw(ids[:, 0], self.model.training)
            columns += [self._features(own.tolist(), columns[1]) for own in drawn.T]
            ids = torch.cat([ids, drawn], dim=1)
        query, positive, *hard = embed_columns(self.model, columns)
        masks = {} if ids is None else self._masks(ids, query.device)
        hard = torch.stack(hard, dim=1) if hard else None
        return star_loss(self.scale * query, positive, hard, **masks, alpha=self.alpha)

    def _features(self, ids: list[int], like: Mapping[str, Any]) -> dict[str, Any]:
        task = like.get("task")
        texts = [self.negatives.documents[number] for number in ids]
        features = dict(self.model.preprocess(texts, prompt=self.negatives.document_prompt, task=task))
        if task is not None:
            features["task"] = task
        device = next(self.model.parameters()).device
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in features.items()}

    def _masks(self, ids: Tensor, device: torch.device) -> dict[str, Tensor]:
        known = self.relevant[ids[:, 0]]
        valid = ~(ids[:, 1:, None, None] == known).any(dim=-1)  # (rows of documents, documents of a row, queries)
        valid_random = valid[:, 0].T.clone().fill_diagonal_(False)
        masks = {"valid_random": valid_random.to(device)}
        if ids.shape[1] > 2:
            masks["valid_hard"] = valid[:, 1:].flatten(0, 1).T.to(device)
        return masks

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card records."""
        refresh = (
            {"every": self.negatives.every, "topk": self.negatives.topk, "hard": self.negatives.hard} if self.negatives else None
        )
        return {"alpha": self.alpha, "scale": self.scale, "negatives": refresh}
