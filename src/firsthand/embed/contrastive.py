"""InfoNCE with hard negatives, where the other texts of a batch are negatives only if one says so."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


def info_nce_loss(
    query: Float[Tensor, "batch dim"],
    target: Float[Tensor, "targets dim"],
    negatives: Float[Tensor, "batch hard dim"] | None = None,
    *,
    temperature: float = 0.02,
    in_batch_negatives: bool = True,
    valid: Bool[Tensor, "batch candidates"] | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Float[Tensor, "*batch"]:
    r"""Cross-entropy of each query's own positive among its candidates.

    $$ L_i = -\log \frac{e^{s(q_i,p_i)/\tau}}{\sum_{c \in C_i} e^{s(q_i,c)/\tau}} $$

    With in-batch negatives, $C_i$ are all targets and the hard negatives of all rows. Without, it is the row's own group of
    targets and its own hard negatives: nothing that belongs to another row counts, as it must be where rows share labels.

    Args:
        query: embeddings (B, d), of any length.
        target: (B·g, d), g at least 1: the rows i·g to i·g + g - 1 belong to query i. The first is its positive, the others are
            negatives.
        negatives: further hard negatives of each query, (B, K, d).
        temperature: τ, positive.
        in_batch_negatives: whether the targets and negatives of other rows count.
        valid: false where a candidate is left out. Its columns are all targets, then all negatives, row by row, B·(g + K) in
            number; without in-batch negatives the row's own targets, then its own negatives, g + K. The positive always stays.
        normalize: whether s is the cosine; else it is the inner product.
        reduction: `"mean"`, `"sum"` or `"none"` (one loss per row).

    Returns:
        The loss, in the dtype of `query`. Scores are computed in float32 or wider, under autocast too: at τ = 0.02 bfloat16 would
        round logits to a quarter of a unit.

    Raises:
        ValueError: shapes that do not belong together, no negative at all, an unknown `reduction`, `temperature` out of range.

    Source:
        Lee et al., "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models", 2024, arXiv 2405.17428: the
        loss of its first stage (in-batch negatives on) and of its second (off). τ = 0.02 is our choice: we found none.
    """
    _check(query, target, negatives, temperature, reduction)
    rows, width = query.shape
    group = len(target) // rows
    hard = 0 if negatives is None else negatives.shape[1]
    if (rows if in_batch_negatives else 1) * (group + hard) < 2:
        raise ValueError(
            "negatives must be given where neither target nor the batch holds any: "
            f"got {rows} rows, {group} target a row, in_batch_negatives={in_batch_negatives}"
        )
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        unit = [each.to(dtype) for each in (query, target, negatives) if each is not None]
        if normalize:
            unit = [F.normalize(each, dim=-1) for each in unit]
        q, candidates = unit[0], unit[1:]
        if in_batch_negatives:
            scores = q @ torch.cat([each.reshape(-1, width) for each in candidates]).T
            own = torch.arange(rows, device=q.device) * group
        else:
            candidates[0] = candidates[0].reshape(rows, group, width)
            scores = (torch.cat(candidates, dim=1) @ q[:, :, None])[:, :, 0]
            own = torch.zeros(rows, dtype=torch.int64, device=q.device)
        if valid is not None:
            if valid.shape != scores.shape:
                raise ValueError(f"valid must have shape {tuple(scores.shape)}, got {tuple(valid.shape)}")
            scores = scores.masked_fill(~valid.scatter(1, own[:, None], True), -torch.inf)
    return F.cross_entropy(scores / temperature, own, reduction=reduction).to(query.dtype)


def _check(query: Tensor, target: Tensor, negatives: Tensor | None, temperature: float, reduction: str) -> None:
    for name, value in (("query", query), ("target", target), ("negatives", negatives)):
        if value is not None and not value.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {value.dtype}")
    if query.ndim != 2 or not len(query):
        raise ValueError(f"query must have shape (B, d) with B at least 1, got {tuple(query.shape)}")
    rows, width = query.shape
    if target.ndim != 2 or target.shape[1] != width or not len(target) or len(target) % rows:
        raise ValueError(
            f"target must have shape (g·{rows}, {width}) with a whole number g of rows a query, got {tuple(target.shape)}"
        )
    if negatives is not None and (negatives.ndim != 3 or negatives.shape[::2] != query.shape):
        raise ValueError(f"negatives must have shape ({rows}, K, {width}), got {tuple(negatives.shape)}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


class HardNegativeInfoNCELoss(nn.Module):
    """`info_nce_loss` as a sentence-transformers loss, over the columns (query, positive, negative_1, ..., negative_K).

    The trainer takes a loss for each data set, so in-batch negatives can be on for retrieval and off for classification:
    `loss={"search": HardNegativeInfoNCELoss(model), "topics": HardNegativeInfoNCELoss(model, in_batch_negatives=False)}`.

    Args:
        model: the `SentenceTransformer` to train.
        temperature: τ, positive.
        in_batch_negatives: whether the positives and negatives of other rows count.

    Raises:
        ValueError: in the first step, for fewer than 2 columns, or fewer than 3 without in-batch negatives.
    """

    def __init__(self, model: nn.Module, temperature: float = 0.02, in_batch_negatives: bool = True) -> None:
        super().__init__()
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        self.model = model
        self.temperature = temperature
        self.in_batch_negatives = in_batch_negatives

    def forward(self, sentence_features: Iterable[Any], labels: Tensor | None = None) -> Float[Tensor, ""]:
        try:
            from sentence_transformers.base.losses.merged_forward import embed_columns
        except ImportError as error:
            message = "HardNegativeInfoNCELoss needs sentence-transformers 6.2 or later: pip install 'firsthand[embed]'"
            raise ImportError(message) from error

        query, *others = embed_columns(self.model, list(sentence_features))
        needed = 1 if self.in_batch_negatives else 2
        if len(others) < needed:
            columns = "query, positive" if self.in_batch_negatives else "query, positive, negative (no in-batch negatives)"
            raise ValueError(f"the data set must have the text columns {columns}, got {len(others) + 1} columns")
        if len(query) < 2 and len(others) < 2:
            return 0 * sum(each.sum() for each in (query, *others))  # the last batch of an epoch may be a single pair
        return info_nce_loss(
            query,
            others[0],
            torch.stack(others[1:], dim=1) if len(others) > 1 else None,
            temperature=self.temperature,
            in_batch_negatives=self.in_batch_negatives,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card records."""
        return {"temperature": self.temperature, "in_batch_negatives": self.in_batch_negatives}
