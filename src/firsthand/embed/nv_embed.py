"""NV-Embed: pooling through latents, instructions for queries, and labelled data as hard negatives.

With `firsthand.embed.make_bidirectional` for the model and `firsthand.embed.HardNegativeInfoNCELoss` for its two stages.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from firsthand.embed.cross_attention import add_cross_attention, attend_and_gate

try:
    from sentence_transformers.base.modules.module import Module
except ImportError:  # the functions below do without
    Module = None

if TYPE_CHECKING:
    from datasets import Dataset

PACK_BELOW = 0.7
"""Share of tokens to pool below which the others are left out of the computation: gathering costs something too."""


class LatentAttentionPooling(nn.Module if Module is None else Module):
    r"""Pool token states after each has looked into a dictionary of learnt latents: a sentence-transformers module.

    $$ e = \frac{1}{|T|} \sum_{t \in T} \mathrm{Block}(h_t, \Lambda) $$

    with the block of `firsthand.embed.cross_attention`: tokens are the queries, the r latents Λ keys and values, so padding needs
    no mask inside; T are the tokens that are neither padding nor, where it is not to be included, prompt. It stands where
    `Pooling` stands: `SentenceTransformer(modules=[transformer, LatentAttentionPooling(4096)])`. A saved model is loaded with
    `trust_remote_code=True`, which sentence-transformers asks for where a module is not its own.

    Args:
        embedding_dimension: d, width of the token states and of the embedding.
        num_latents: r.
        num_heads: h.
        head_dim: dh; by default d / h.
        normalize: whether embeddings get unit length.
        include_prompt: whether the tokens of a prompt are pooled too. They are attended to by the model either way.
        init: `"default"`, or `"identity"`: it begins as a mean over tokens.

    Attributes:
        latents: (r, d), drawn from a standard normal.

    Raises:
        ImportError: sentence-transformers is missing.
        ValueError: a size below 1, or what `add_cross_attention` refuses. In use: token states of another width, or a text
            without a token to pool (not checked inside `torch.compile`, where its embedding is 0 before the last bias).

    Source:
        Lee et al., "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models", 2024, arXiv 2405.17428, as
        released with its weights. The release has heads as wide as the model; d / h is our choice, as is `"identity"`. It masks
        as many positions as the instruction has tokens, beginning with the one before it, so that the first token is lost and the
        last of the instruction pooled; here exactly the prompt is left out. The last linear map is applied to the mean and not
        to each token, which is the same.
    """

    config_keys = ["embedding_dimension", "num_latents", "num_heads", "head_dim", "normalize", "include_prompt"]  # noqa: RUF012

    def __init__(
        self,
        embedding_dimension: int,
        num_latents: int = 512,
        num_heads: int = 8,
        head_dim: int | None = None,
        normalize: bool = True,
        include_prompt: bool = True,
        init: str = "default",
    ) -> None:
        if Module is None:
            raise ImportError("LatentAttentionPooling needs sentence-transformers 6.2 or later: pip install 'firsthand[embed]'")
        super().__init__()
        for name, value in (("embedding_dimension", embedding_dimension), ("num_latents", num_latents)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.embedding_dimension = embedding_dimension
        self.num_latents = num_latents
        self.normalize = normalize
        self.include_prompt = include_prompt
        self.latents = nn.Parameter(torch.randn(num_latents, embedding_dimension))
        add_cross_attention(self, embedding_dimension, num_heads, head_dim, init)

    def forward(self, features: MutableMapping[str, Any], **kwargs: Any) -> MutableMapping[str, Any]:
        """Read `token_embeddings`, `attention_mask` and `prompt_length`, write `sentence_embedding` (batch, d)."""
        states = features["token_embeddings"]
        if states.ndim != 3 or states.shape[-1] != self.embedding_dimension:
            expected = f"(batch, tokens, {self.embedding_dimension})"
            raise ValueError(
                f"token_embeddings must have shape {expected}, as embedding_dimension says, got {tuple(states.shape)}"
            )
        prompt = 0 if self.include_prompt else _prompt_length(features)
        if "cu_seq_lens_q" in features:  # texts one after the other, without padding, as flash attention likes them
            ends = features["cu_seq_lens_q"].long()
            lengths = ends[1:] - ends[:-1]
            rows = torch.repeat_interleave(torch.arange(len(lengths), device=states.device), lengths)
            kept = torch.arange(len(rows), device=states.device) - ends[:-1][rows] >= prompt
            embedding = self._pool_packed(states[0][kept], rows[kept], len(lengths))
        else:
            mask = features.get("attention_mask")
            # As in the host's own Pooling: a mask that does not go with the states (of an image, say) is none.
            fits = mask is not None and mask.shape[-1] == states.shape[1]
            mask = mask.bool() if fits else torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
            embedding = self._pool(states, _without_prompt(mask, prompt))
        features["sentence_embedding"] = embedding.to(states.dtype)
        return features

    def _pool(self, states: Float[Tensor, "batch tokens dim"], kept: Bool[Tensor, "batch tokens"]) -> Float[Tensor, "batch dim"]:
        if not torch.compiler.is_compiling() and kept.float().mean() < PACK_BELOW:
            return self._pool_packed(states[kept], kept.nonzero()[:, 0], len(kept))
        weights = kept.to(states.dtype)[..., None]
        count = weights.sum(dim=1, dtype=self._wide(states))
        # What is not pooled must be finite, lest 0 · NaN be NaN.
        parts = attend_and_gate(self, states.masked_fill(~kept[..., None], 0.0).to(self.latents.dtype), self.latents)
        return self._finish([(part * weights).sum(dim=1, dtype=count.dtype) for part in parts], count)

    def _pool_packed(self, tokens: Float[Tensor, "kept dim"], rows: Tensor, batch: int) -> Float[Tensor, "batch dim"]:
        """Only the tokens to pool, with the row that each belongs to."""
        wide = self._wide(tokens)
        count = torch.bincount(rows, minlength=batch)[:, None].to(wide)
        parts = attend_and_gate(self, tokens.to(self.latents.dtype), self.latents)
        sums = [
            torch.zeros(batch, part.shape[-1], dtype=wide, device=part.device).index_add(0, rows, part.to(wide)) for part in parts
        ]
        return self._finish(sums, count)

    def _finish(self, sums: list[Tensor], count: Float[Tensor, "batch 1"]) -> Float[Tensor, "batch dim"]:
        if not torch.compiler.is_compiling() and not count.all():
            empty = (count[:, 0] == 0).nonzero()[:, 0].tolist()
            raise ValueError(f"attention_mask must leave a token to pool in each text, behind the prompt; none in rows {empty}")
        hidden, gated = (part / count.clamp(min=1) for part in sums)
        pooled = hidden + self.ff_out(gated.to(self.latents.dtype))
        return F.normalize(pooled, dim=-1) if self.normalize else pooled

    def _wide(self, states: Tensor) -> torch.dtype:
        return torch.promote_types(torch.promote_types(states.dtype, self.latents.dtype), torch.float32)

    def get_embedding_dimension(self) -> int:
        """Width of the embeddings."""
        return self.embedding_dimension

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write configuration and weights to a folder, as the host asks of its modules."""
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> "LatentAttentionPooling":
        """Read what `save` wrote, from a folder or the hub."""
        hub = {
            key: kwargs[key] for key in ("subfolder", "token", "cache_folder", "revision", "local_files_only") if key in kwargs
        }
        model = cls(**cls.load_config(model_name_or_path=model_name_or_path, **hub))
        return cls.load_torch_weights(model_name_or_path=model_name_or_path, model=model, **hub)


def _prompt_length(features: Mapping[str, Any]) -> int:
    """It comes as a number when encoding, and as a tensor of equal numbers when training."""
    length = features.get("prompt_length", 0)
    return int(length.flatten()[0]) if isinstance(length, Tensor) else int(length)


def _without_prompt(mask: Bool[Tensor, "batch tokens"], prompt: int) -> Bool[Tensor, "batch tokens"]:
    """The first tokens of each text taken away, wherever its padding is."""
    return mask & (mask.cumsum(dim=1) > prompt) if prompt else mask


def format_query(task: str, text: str) -> str:
    """A query with the instruction that says what to find; documents get none.

    As a prompt of sentence-transformers: `SentenceTransformer(..., prompts={"query": format_query(task, "")})`, then
    `encode_query`.

    Args:
        task: one sentence, such as `"Given a question, retrieve passages that answer it"`.
        text: the query.

    Raises:
        ValueError: `task` is empty.

    Source:
        arXiv 2405.17428, the template of its instructions. The end-of-text token is left to the tokenizer.
    """
    if not task.strip():
        raise ValueError(f"task must say what to find, got {task!r}")
    return f"Instruct: {task}\nQuery: {text}"


def classification_to_triplets(
    texts: Sequence[str],
    labels: Sequence[Any],
    label_names: Mapping[Any, str] | Sequence[str] | None = None,
    *,
    mode: str = "label",
    num_negatives: int = 7,
    seed: int,
) -> "Dataset":
    """Labelled texts, of classes or clusters, as queries with a positive and negatives.

    Train on it without in-batch negatives: most batches hold several rows of one class.

    Args:
        texts: the texts; each is a query.
        labels: the class of each.
        label_names: the text of each label, by label or by index. Where labels are texts, there is no need for it.
        mode: `"label"`: the positive is the text of the label, the negatives are the texts of other labels. `"example"`: the
            positive is another text of the class, negatives are texts that no member of the class has; texts that are alone in
            their class are no queries.
        num_negatives: K at most. It is less where there are not as many other labels, or other texts for some class.
        seed: decides what is drawn. Nothing is drawn twice for a row.

    Returns:
        A data set with the columns `query`, `positive`, `negative_1` ... `negative_K`, in the order of `texts`.

    Raises:
        ValueError: texts and labels of different number, a single class, a label without a name, an unknown `mode`,
            `num_negatives` below 1, in `"example"` mode no class with two texts, or no text that only other classes have.

    Source:
        arXiv 2405.17428: labels as positives in the first version of the model, examples in the second. That examples are drawn
        uniformly, and what is done with lonely texts, is our choice.
    """
    if len(texts) != len(labels):
        raise ValueError(f"labels must be as many as texts, {len(texts)}, got {len(labels)}")
    if mode not in ("label", "example"):
        raise ValueError(f"mode must be 'label' or 'example', got {mode!r}")
    if num_negatives < 1:
        raise ValueError(f"num_negatives must be at least 1, got {num_negatives}")
    members: dict[Any, list[int]] = {}
    for row, label in enumerate(labels):
        members.setdefault(label, []).append(row)
    if len(members) < 2:
        raise ValueError(f"labels must name at least 2 classes, got {len(members)}")
    if mode == "label":
        positives = {label: [_name(label, label_names)] for label in members}
        everything = list(dict.fromkeys(name for (name,) in positives.values()))
    else:
        # Distinct texts: a copy of the query is no other text of the class.
        positives = {label: list(dict.fromkeys(texts[row] for row in rows)) for label, rows in members.items()}
        positives = {label: own for label, own in positives.items() if len(own) > 1}
        everything = list(dict.fromkeys(texts))
    if not positives:
        raise ValueError("labels must name a class with at least 2 different texts in mode 'example', got none")
    count = min(num_negatives, *(len(everything) - len(own) for own in positives.values()))
    if count < 1:
        raise ValueError(f"labels must leave each class a text of another one for a negative in mode {mode!r}, got none for one")
    draw = np.random.default_rng(seed)
    rows: dict[int, list[str]] = {}
    for label, own in positives.items():
        theirs = set(own)
        others = [text for text in everything if text not in theirs]
        for row in members[label]:
            candidates = own if mode == "label" else [text for text in own if text != texts[row]]
            negatives = (others[index] for index in draw.choice(len(others), count, replace=False))
            rows[row] = [texts[row], candidates[draw.integers(len(candidates))], *negatives]
    return _dataset([rows[row] for row in sorted(rows)])


def sts_to_triplets(
    sent1: Sequence[str],
    sent2: Sequence[str],
    scores: Sequence[float],
    *,
    pos_min: float = 4.0,
    neg_max: float = 2.5,
    num_negatives: int = 7,
) -> "Dataset":
    """Pairs with a score of similarity as queries with a positive and hard negatives.

    Pairs that score high are positives in both directions. The negatives of a query are the sentences that BM25 ranks highest for
    it among all others of the data, without the first and without those that are known to be similar to it.

    Args:
        sent1: one sentence of each pair.
        sent2: the other.
        scores: how similar they are, usually 0 to 5.
        pos_min: least score of a positive.
        neg_max: a sentence whose score with the query is known and at least this is no negative of it.
        num_negatives: K at most. It is less where some query has not as many.

    Returns:
        A data set with the columns `query`, `positive`, `negative_1` ... `negative_K`.

    Raises:
        ValueError: columns of different length, a score that is not finite, `pos_min` below `neg_max`, `num_negatives` below 1,
            no pair that scores high enough, or a query for which no negative is left.

    Source:
        arXiv 2405.17428: thresholds 4 and 2.5, ranks from 2 on. The scores of most pairs are not known; to count these as
        dissimilar is our reading. BM25 with k₁ = 1.2, b = 0.75, over words in lower case.
    """
    if not len(sent1) == len(sent2) == len(scores):
        raise ValueError(f"sent1, sent2 and scores must be of one length, got {len(sent1)}, {len(sent2)} and {len(scores)}")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    if pos_min < neg_max:
        raise ValueError(f"pos_min must be at least neg_max={neg_max}, got {pos_min}")
    if num_negatives < 1:
        raise ValueError(f"num_negatives must be at least 1, got {num_negatives}")
    pool = list(dict.fromkeys([*sent1, *sent2]))
    row_of = {sentence: row for row, sentence in enumerate(pool)}
    similar: dict[str, set[int]] = {sentence: {row_of[sentence]} for sentence in pool}
    positives = []
    for one, other, score in zip(sent1, sent2, scores, strict=True):
        if score >= neg_max:
            similar[one].add(row_of[other])
            similar[other].add(row_of[one])
        if score >= pos_min and one != other:
            positives += [(one, other), (other, one)]
    positives = list(dict.fromkeys(positives))
    if not positives:
        raise ValueError(f"scores must have a pair of different sentences with at least pos_min={pos_min}, got none")
    queries = list(dict.fromkeys(query for query, _ in positives))
    negatives = {}
    for query, ranking in zip(queries, _bm25_rankings(queries, pool), strict=True):
        others = [row for row in ranking if row != row_of[query]]
        negatives[query] = [pool[row] for row in others[1:] if row not in similar[query]][:num_negatives]
    count = min(map(len, negatives.values()))
    if count < 1:
        poor = next(query for query, found in negatives.items() if not found)
        raise ValueError(f"sent1 and sent2 must hold a negative for each query, got none for {poor!r}")
    return _dataset([[query, positive, *negatives[query][:count]] for query, positive in positives])


def _name(label: Any, names: Mapping[Any, str] | Sequence[str] | None) -> str:
    if names is None:
        if isinstance(label, str):
            return label
        raise ValueError(f"label_names must be given where labels are no texts, got the label {label!r}")
    try:
        return names[label]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"label_names must have a name for each label, got none for {label!r}") from error


def _bm25_rankings(queries: Sequence[str], pool: Sequence[str], k1: float = 1.2, b: float = 0.75) -> list[np.ndarray]:
    """For each query all rows of the pool, best first; ties in the order of the pool."""
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(token_pattern=r"(?u)\b\w+\b", dtype=np.float64)
    counts = vectorizer.fit_transform(pool).tocoo()
    length = np.asarray(counts.sum(axis=1)).ravel()
    frequency = np.bincount(counts.col, minlength=counts.shape[1])
    rarity = np.log1p((len(pool) - frequency + 0.5) / (frequency + 0.5))
    saturation = k1 * (1 - b + b * length / length.mean())
    counts.data = rarity[counts.col] * counts.data * (k1 + 1) / (counts.data + saturation[counts.row])
    scores = vectorizer.transform(queries) @ counts.tocsr().T
    return [np.argsort(-scores[row].toarray().ravel(), kind="stable") for row in range(len(queries))]


def _dataset(rows: Sequence[Sequence[str]]) -> "Dataset":
    from datasets import Dataset

    names = ["query", "positive", *(f"negative_{k + 1}" for k in range(len(rows[0]) - 2))]
    return Dataset.from_dict(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
