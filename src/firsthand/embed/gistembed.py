"""GISTEmbed: in-batch negatives, except those that a guide model finds closer to the query than its own positive."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

if TYPE_CHECKING:
    import datasets


def gist_loss(
    query: Float[Tensor, "batch dim"],
    positive: Float[Tensor, "batch dim"],
    *,
    guide_query: Float[Tensor, "batch width"] | None = None,
    guide_positive: Float[Tensor, "batch width"] | None = None,
    negatives: Float[Tensor, "batch hard dim"] | None = None,
    guide_negatives: Float[Tensor, "batch hard width"] | None = None,
    temperature: float = 0.01,
    negative_mode: str = "all",
    margin: float = 0.0,
    margin_strategy: str = "absolute",
    contrast_queries: bool = True,
    contrast_positives: bool = True,
    reduction: str = "mean",
) -> Float[Tensor, "*batch"]:
    r"""Contrastive loss that leaves out what the guide takes for false negatives.

    With cosines $s$ of the trained model and $\hat s$ of the guide, over the candidates $c$ of row $i$:

    $$ L_i = -\log \frac{e^{s(q_i,p_i)/\tau}}{\sum_{c \in C_i} e^{s_{ic}/\tau}}, \qquad
       C_i = \{p_i\} \cup \{c : \hat s_{ic} \le \hat s(q_i, p_i)\} $$

    The candidates are the other positives, $s(q_i, p_j)$, all hard negatives, $s(q_i, n_{jk})$, the other queries,
    $s(q_i, q_j)$, and once more the other positives, now beside the row's own, $s(p_i, p_j)$.

    Args:
        query: embeddings by the model in training, of any length.
        positive: the text that belongs to each query.
        guide_query: the guide's embeddings of the same queries, of any width. Without a guide nothing is left out, and this is
            `contrastive_loss`.
        guide_positive: the guide's embeddings of the positives.
        negatives: hard negatives of each query; every row is contrasted with those of all rows.
        guide_negatives: the guide's embeddings of those.
        temperature: τ, positive.
        negative_mode: `"all"`, or `"hard"` to leave out also what the trained model already ranks below the positive. A row with
            nothing left costs 0.
        margin: lowers the guide's threshold, so that more is left out.
        margin_strategy: with t the guide's cosine of query and positive, the threshold is t - margin (`"absolute"`) or
            t - margin·|t| (`"relative"`).
        contrast_queries: contrast queries with queries.
        contrast_positives: contrast positives with positives.
        reduction: `"mean"`, `"sum"` or `"none"` (one loss per row).

    Returns:
        The loss, in the dtype of `query`. Cosines are computed in float32 or wider, under autocast too: at τ = 0.01 bfloat16
        would round logits to half a unit.

    Raises:
        ValueError: shapes that do not belong together, a guide for some of the embeddings only, fewer than 2 rows and no
            negatives, an unknown mode, or a temperature or margin out of range.

    Source:
        Solatorio, "GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning", 2024,
        arXiv 2402.16829. `negative_mode` is from its reference implementation; `margin`, `margin_strategy` and the `contrast_`
        switches are those of sentence-transformers. One departure: a text is never its own negative. The reference drops these
        entries because the guide's cosine of a text with itself, 1, is above the threshold, so it keeps them where the guide
        cannot tell the query from its positive.
    """
    _check_shapes("", query, positive, negatives)
    if (guide_query is None) != (guide_positive is None):
        raise ValueError("guide_query and guide_positive go together, got only one of them")
    if (guide_negatives is None) != (guide_query is None or negatives is None):
        raise ValueError(
            "guide_negatives must be given if there are a guide and negatives, and only then; "
            f"got guide_query {_shape(guide_query)}, negatives {_shape(negatives)}, guide_negatives {_shape(guide_negatives)}"
        )
    removed = None
    if guide_query is not None and guide_positive is not None:
        if len(guide_query) != len(query):
            raise ValueError(f"guide_query must have as many rows as query, {len(query)}, got {_shape(guide_query)}")
        if negatives is not None and guide_negatives is not None and guide_negatives.shape[:2] != negatives.shape[:2]:
            raise ValueError(f"guide_negatives must go with negatives {_shape(negatives)}, got {_shape(guide_negatives)}")
        removed = gist_mask(
            guide_query,
            guide_positive,
            guide_negatives,
            margin=margin,
            margin_strategy=margin_strategy,
            contrast_queries=contrast_queries,
            contrast_positives=contrast_positives,
        )
    return contrastive_loss(
        query,
        positive,
        removed,
        negatives=negatives,
        temperature=temperature,
        negative_mode=negative_mode,
        contrast_queries=contrast_queries,
        contrast_positives=contrast_positives,
        reduction=reduction,
    )


@torch.no_grad()
def gist_mask(
    guide_query: Float[Tensor, "batch width"],
    guide_positive: Float[Tensor, "batch width"],
    guide_negatives: Float[Tensor, "batch hard width"] | None = None,
    *,
    margin: float = 0.0,
    margin_strategy: str = "absolute",
    contrast_queries: bool = True,
    contrast_positives: bool = True,
) -> dict[str, Bool[Tensor, "batch _"]]:
    r"""Which candidates the guide takes for false negatives: those strictly closer than the row's own positive.

    $$ \hat s_{ic} > \hat s(q_i, p_i) - \mathrm{margin} $$

    Two copies of one pair in a batch tie with the threshold, so each keeps the other's positive as a negative;
    `margin=1e-6` removes it.

    Args:
        guide_query: the guide's embeddings of the queries.
        guide_positive: of their positives.
        guide_negatives: of their hard negatives.
        margin: see `gist_loss`.
        margin_strategy: see `gist_loss`.
        contrast_queries: whether there is a block of queries with queries.
        contrast_positives: whether there is a block of positives with positives.

    Returns:
        A mask for each block of candidates, true where one is removed: `"query_positive"` (B, B), `"query_negative"` (B, B·K; the
        K negatives of the first row come first), `"query_query"` (B, B) and `"positive_positive"` (B, B). The diagonal of the
        first is false, since a row keeps its positive; those of the last two are true, since no text is its own negative.

    Raises:
        ValueError: shapes that do not belong together, `margin` not finite, an unknown `margin_strategy`.
    """
    if not math.isfinite(margin):
        raise ValueError(f"margin must be finite, got {margin}")
    if margin_strategy not in ("absolute", "relative"):
        raise ValueError(f"margin_strategy must be 'absolute' or 'relative', got {margin_strategy!r}")
    _check_shapes("guide_", guide_query, guide_positive, guide_negatives)
    cosines = _cosines(guide_query, guide_positive, guide_negatives, contrast_queries, contrast_positives)
    threshold = cosines["query_positive"].diagonal()[:, None]
    threshold = threshold - margin * (threshold.abs() if margin_strategy == "relative" else 1.0)
    return _settle_diagonals({name: cosine > threshold for name, cosine in cosines.items()})


def contrastive_loss(
    query: Float[Tensor, "batch dim"],
    positive: Float[Tensor, "batch dim"],
    removed: Mapping[str, Bool[Tensor, "batch _"]] | None = None,
    *,
    negatives: Float[Tensor, "batch hard dim"] | None = None,
    temperature: float = 0.01,
    negative_mode: str = "all",
    contrast_queries: bool = True,
    contrast_positives: bool = True,
    reduction: str = "mean",
) -> Float[Tensor, "*batch"]:
    """In-batch contrastive loss with the candidates in `removed` left out, whoever chose them.

    `gist_loss` is this with the mask of `gist_mask`. With no mask it is the improved contrastive loss of GTE; with
    `contrast_queries=False, contrast_positives=False` as well, it is InfoNCE (multiple negatives ranking).

    Args:
        query: embeddings of the queries, of any length.
        positive: of their positives.
        removed: the mask of each block of candidates, as `gist_mask` returns it. A row's own positive stays and a text is
            never contrasted with itself, whatever the mask says.
        negatives: see `gist_loss`, as for all that follow.
        temperature: τ, positive.
        negative_mode: `"all"` or `"hard"`.
        contrast_queries: contrast queries with queries.
        contrast_positives: contrast positives with positives.
        reduction: `"mean"`, `"sum"` or `"none"`.

    Raises:
        ValueError: as `gist_loss`; or `removed` has other blocks or shapes than the candidates.

    Source:
        Li et al., "Towards General Text Embeddings with Multi-stage Contrastive Learning", 2023, arXiv 2308.03281, as the
        GISTEmbed implementation has it without a guide: GTE's fourth term, the positive against other queries, is not in it.
    """
    _check_shapes("", query, positive, negatives)
    if len(query) < 2 and negatives is None:
        raise ValueError(
            "query must have at least 2 rows where there are no negatives: one pair has nothing to be contrasted with"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if negative_mode not in ("all", "hard"):
        raise ValueError(f"negative_mode must be 'all' or 'hard', got {negative_mode!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    cosines = _cosines(query, positive, negatives, contrast_queries, contrast_positives)
    if removed is None:
        masks = {name: torch.zeros_like(cosine, dtype=torch.bool) for name, cosine in cosines.items()}
    else:
        _check_mask(removed, cosines)
        masks = {name: removed[name].clone() for name in cosines}
    if negative_mode == "hard":
        own = cosines["query_positive"].detach().diagonal()[:, None]
        masks = {name: masks[name] | (cosine.detach() < own) for name, cosine in cosines.items()}
    _settle_diagonals(masks)
    logits = torch.cat([cosine.masked_fill(masks[name], -torch.inf) for name, cosine in cosines.items()], dim=1)
    target = torch.arange(len(query), device=query.device)  # the positives are the first columns
    return F.cross_entropy(logits / temperature, target, reduction=reduction).to(query.dtype)


def _cosines(
    query: Tensor, positive: Tensor, negatives: Tensor | None, contrast_queries: bool, contrast_positives: bool
) -> dict[str, Tensor]:
    """The cosine of each row's query, or positive, with every candidate: memory B², where broadcasting takes B²d."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        q, p = F.normalize(query.to(dtype), dim=-1), F.normalize(positive.to(dtype), dim=-1)
        cosines = {"query_positive": q @ p.T}
        if negatives is not None:
            cosines["query_negative"] = q @ F.normalize(negatives.flatten(0, 1).to(dtype), dim=-1).T
        if contrast_queries:
            cosines["query_query"] = q @ q.T
        if contrast_positives:
            cosines["positive_positive"] = p @ p.T
    return cosines


def _settle_diagonals(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """In place: the own positive stays, a text with itself goes."""
    for name, mask in masks.items():
        if name != "query_negative":
            mask.fill_diagonal_(name != "query_positive")
    return masks


def _check_shapes(prefix: str, query: Tensor, positive: Tensor, negatives: Tensor | None) -> None:
    for name, value in (("query", query), ("positive", positive), ("negatives", negatives)):
        if value is not None and not value.is_floating_point():
            raise ValueError(f"{prefix}{name} must be floating point, got {value.dtype}")
    if query.ndim != 2:
        raise ValueError(f"{prefix}query must have shape (B, d), got {_shape(query)}")
    if positive.shape != query.shape:
        raise ValueError(f"{prefix}positive must have shape {_shape(query)} like {prefix}query, got {_shape(positive)}")
    rows, width = query.shape
    if negatives is not None and not (negatives.ndim == 3 and negatives.shape[::2] == query.shape and negatives.shape[1]):
        raise ValueError(f"{prefix}negatives must have shape ({rows}, K, {width}) with K at least 1, got {_shape(negatives)}")


def _check_mask(removed: Mapping[str, Tensor], cosines: Mapping[str, Tensor]) -> None:
    if removed.keys() != cosines.keys():
        raise ValueError(f"removed must have the blocks {', '.join(cosines)}, got {', '.join(removed) or 'none'}")
    for name, cosine in cosines.items():
        if removed[name].shape != cosine.shape:
            raise ValueError(f"removed[{name!r}] must have shape {_shape(cosine)}, got {_shape(removed[name])}")


def _shape(value: Tensor | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value.shape)


class GISTLoss(nn.Module):
    """`gist_loss` as a sentence-transformers loss whose guide has been asked beforehand.

    The data set holds text columns (query, positive, any number of hard negatives) and the column `label` that
    `add_guide_embeddings` makes. So the guide sees no text twice, is not in memory while training, and may have any tokenizer.

    Args:
        model: the `SentenceTransformer` to train.
        temperature: see `gist_loss`, as for all that follow.
        negative_mode: `"all"` or `"hard"`.
        margin: lowers the guide's threshold.
        margin_strategy: `"absolute"` or `"relative"`.
        contrast_queries: contrast queries with queries.
        contrast_positives: contrast positives with positives.
        gather_across_devices: contrast with the batches of all processes, which must be of equal size. Queries are gathered
            too, so that each process contrasts each row with each.

    Raises:
        ValueError: in `forward`, if there are no labels, or not one embedding for each text.
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float = 0.01,
        *,
        negative_mode: str = "all",
        margin: float = 0.0,
        margin_strategy: str = "absolute",
        contrast_queries: bool = True,
        contrast_positives: bool = True,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.gather_across_devices = gather_across_devices
        self.options: dict[str, Any] = {
            "temperature": temperature,
            "negative_mode": negative_mode,
            "margin": margin,
            "margin_strategy": margin_strategy,
            "contrast_queries": contrast_queries,
            "contrast_positives": contrast_positives,
        }

    def forward(self, sentence_features: Iterable[Any], labels: Tensor | None) -> Float[Tensor, ""]:
        try:
            from sentence_transformers.base.losses.merged_forward import embed_columns
        except ImportError as error:
            message = "GISTLoss needs sentence-transformers 6.2 or later: pip install 'firsthand[embed]'"
            raise ImportError(message) from error

        texts = torch.stack(embed_columns(self.model, list(sentence_features)), dim=1)
        rows, columns, _ = texts.shape
        if columns < 2:
            raise ValueError(f"GISTLoss needs at least 2 text columns, query and positive, got {columns}")
        if labels is None or labels.ndim != 3 or labels.shape[:2] != (rows, columns):
            raise ValueError(
                f"labels must hold the guide's embeddings, shape ({rows}, {columns}, width), got {_shape(labels)}; "
                "make them with firsthand.embed.add_guide_embeddings"
            )
        guide = labels.to(texts.device)
        if self.gather_across_devices:
            texts, guide = _gather(texts), _gather(guide)
        if len(texts) < 2 and columns == 2:
            return 0 * texts.sum()  # the last batch of an epoch may be a single pair: nothing to learn, no reason to stop
        return gist_loss(
            texts[:, 0],
            texts[:, 1],
            guide_query=guide[:, 0],
            guide_positive=guide[:, 1],
            negatives=texts[:, 2:] if columns > 2 else None,
            guide_negatives=guide[:, 2:] if columns > 2 else None,
            **self.options,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card records."""
        return {**self.options, "gather_across_devices": self.gather_across_devices}


def _gather(rows: Tensor) -> Tensor:
    """The rows of all processes, with gradients to where they came from."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(rows))  # type: ignore[no-untyped-call]


def add_guide_embeddings(
    dataset: "datasets.Dataset",
    guide: Any,
    columns: Sequence[str] | None = None,
    batch_size: int = 64,
    dtype: str = "float16",
) -> "datasets.Dataset":
    """A data set with the guide's embeddings of its texts in the column `label`, for `GISTLoss`.

    Each distinct text is encoded once. Embeddings are stored at unit length, (columns, width) a row, and read as float32 tensors.

    Args:
        dataset: one with text columns in the order query, positive, hard negatives.
        guide: a `SentenceTransformer`, or anything with `encode(texts, batch_size=...)` that returns an array (texts, width).
        columns: the text columns, in order; by default all columns of strings.
        batch_size: texts that the guide encodes at a time.
        dtype: how they are stored, `"float16"` or `"float32"`. Half precision moves a cosine by about 1e-4.

    Raises:
        ValueError: there is a label column already, fewer than 2 text columns, a column that is not there, an unknown `dtype`, or
            the guide returns something else than one finite vector a text.
    """
    import numpy as np
    import pyarrow as pa
    from datasets import List, Value

    if taken := {"label", "labels", "score", "scores"}.intersection(dataset.column_names):
        raise ValueError(f"dataset must have no label column yet, got {', '.join(sorted(taken))}")
    if columns is None:
        columns = [
            name for name, feature in dataset.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
        ]
    if missing := set(columns) - set(dataset.column_names):
        raise ValueError(f"columns must be columns of the data set, got {', '.join(sorted(missing))}")
    if len(columns) < 2:
        raise ValueError(f"columns must name at least 2 text columns, query and positive, got {list(columns)}")
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype must be 'float16' or 'float32', got {dtype!r}")

    texts = [dataset[name][:] for name in columns]
    row_of = {text: row for row, text in enumerate(dict.fromkeys(text for column in texts for text in column))}
    embeddings = np.asarray(guide.encode(list(row_of), batch_size=batch_size), dtype=np.float32)
    if embeddings.ndim != 2 or len(embeddings) != len(row_of) or not np.isfinite(embeddings).all():
        raise ValueError(f"guide must return a finite vector for each of {len(row_of)} texts, got shape {embeddings.shape}")
    embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    rows = np.array([[row_of[text] for text in column] for column in texts]).T
    count, width = len(columns), embeddings.shape[1]
    flat = pa.array(embeddings.astype(dtype)[rows].reshape(-1))
    labels = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, width), count)
    feature = List(List(Value(dtype), length=width), length=count)
    return dataset.add_column("label", labels, feature=feature).with_format("torch", columns=["label"], output_all_columns=True)
