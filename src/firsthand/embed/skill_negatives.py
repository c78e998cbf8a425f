"""Extraction of labels from a huge taxonomy without annotations, with negatives that make a classifier learn what a label means.

A sentence that holds a label's name is a positive. Negatives are positives of related labels, so that the name alone is no clue.
"""

import math
import re
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from joblib import Parallel, delayed
from numpy.typing import ArrayLike, NDArray
from rich.console import Console
from rich.progress import track
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    from datasets import Dataset

Label = TypeVar("Label", bound=Hashable)
STRATEGIES = ("siblings", "levenshtein", "embedding")


def literal_match(
    sentences: Sequence[str], labels: Mapping[Label, Sequence[str]], *, whole_word: bool = True, casefold: bool = True
) -> dict[Label, list[int]]:
    """Which sentences hold one of a label's names.

    Every name is found, also inside a longer one, in one pass over the text with a look-up for each length of name.

    Args:
        sentences: the corpus.
        labels: label -> its names, preferred and alternative.
        whole_word: names are sequences of words and signs; else any substring is a match.
        casefold: whether case is ignored.

    Returns:
        Label -> rows of sentences, ascending; empty where there is none.

    Raises:
        ValueError: a label without names, or an empty name.

    Source:
        Decorte et al., "Design of Negative Sampling Strategies for Distantly Supervised Skill Extraction", 2022, arXiv
        2209.05987: literal matches as labels. Whole words without lemmas are our choice.
    """

    def pieces(text: str) -> tuple[str, ...] | str:
        text = text.casefold() if casefold else text
        return tuple(re.findall(r"\w+|[^\w\s]", text)) if whole_word else text

    owners: dict[Any, list[Label]] = {}
    for label, names in labels.items():
        if not names:
            raise ValueError(f"labels must have at least one name each, got none for {label!r}")
        for name in dict.fromkeys(map(pieces, names)):
            if not name:
                raise ValueError(f"labels must have names with a word or a sign in them, got an empty one for {label!r}")
            owners.setdefault(name, []).append(label)
    lengths = sorted({len(name) for name in owners})
    found: dict[Label, list[int]] = {label: [] for label in labels}
    for row, sentence in enumerate(sentences):
        text = pieces(sentence)
        here = {
            label
            for length in lengths
            for start in range(len(text) - length + 1)
            for label in owners.get(text[start : start + length], ())
        }
        for label in here:
            found[label].append(row)
    return found


def related_labels(
    labels: Mapping[Label, Sequence[str]],
    *,
    strategy: str = "siblings",
    parents: Mapping[Label, Iterable[Hashable]] | None = None,
    embeddings: ArrayLike | None = None,
    k: int = 20,
) -> dict[Label, list[Label]]:
    """Labels that are easily taken for each other: R(ℓ) for each ℓ, never with ℓ itself.

    Args:
        labels: label -> its names; the first is the one that is compared.
        strategy: `"siblings"`, all labels that share a parent; `"levenshtein"`, the k whose names are the fewest edits away, case
            ignored; `"embedding"`, the k with the largest cosine.
        parents: for siblings: label -> its parents in the taxonomy. Labels without an entry have none.
        embeddings: for embedding: of the labels' names, (labels, dim), in the order of `labels`.
        k: how many, at least 1. [our choice: 20]

    Returns:
        Label -> related labels: siblings in the order of `labels`, the others nearest first, equals in the order of `labels`.

    Raises:
        ValueError: an unknown strategy, its data missing, k below 1, `embeddings` of another shape or not finite.
        ImportError: rapidfuzz is not installed.

    Source:
        arXiv 2209.05987, the three strategies; from memory of the paper, the metric of names and that of embeddings.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if strategy == "siblings":
        if parents is None:
            raise ValueError("parents must be given for the strategy 'siblings'")
        return _siblings(list(labels), parents)
    if strategy == "embedding":
        if embeddings is None:
            raise ValueError("embeddings must be given for the strategy 'embedding'")
        vectors = np.asarray(embeddings, dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(labels) or not np.isfinite(vectors).all():
            raise ValueError(f"embeddings must be finite, of shape ({len(labels)}, dim), got shape {vectors.shape}")
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return _nearest(list(labels), lambda rows: -(unit[rows] @ unit.T), k)
    try:
        from rapidfuzz.distance import Levenshtein
        from rapidfuzz.process import cdist
    except ImportError as error:
        raise ImportError("the strategy 'levenshtein' needs rapidfuzz: pip install 'firsthand[embed]'") from error
    names = [label_names[0].casefold() for label_names in labels.values()]
    return _nearest(list(labels), lambda rows: cdist(names[rows], names, scorer=Levenshtein.distance), k)


def _siblings(labels: list[Label], parents: Mapping[Label, Iterable[Hashable]]) -> dict[Label, list[Label]]:
    children: dict[Hashable, list[int]] = {}
    of = [list(parents.get(label, ())) for label in labels]
    for number, own in enumerate(of):
        for parent in own:
            children.setdefault(parent, []).append(number)
    related = ({child for parent in own for child in children[parent]} - {number} for number, own in enumerate(of))
    return {label: [labels[row] for row in sorted(rows)] for label, rows in zip(labels, related, strict=True)}


def _nearest(labels: list[Label], distances: Any, k: int) -> dict[Label, list[Label]]:
    """The k labels of least distance, a block of rows at a time."""
    k = min(k, len(labels) - 1)
    found: dict[Label, list[Label]] = {}
    for start in range(0, len(labels), 1024):
        rows = slice(start, start + 1024)
        block = np.array(distances(rows), dtype=np.float64)
        own = np.arange(len(block))
        block[own, own + start] = np.inf
        order = np.argsort(block, axis=1, kind="stable")[:, :k]  # stable: equals in the order of the labels
        for label, near in zip(labels[rows], order.tolist(), strict=True):
            found[label] = [labels[row] for row in near]
    return found


def sample_label_negatives(
    positives: Mapping[Label, Sequence[int]],
    related: Mapping[str, Mapping[Label, Sequence[Label]]],
    *,
    fraction: float = 0.5,
    mix: Mapping[str, float] | None = None,
    ratio: int = 10,
    num_sentences: int,
    seed: int,
) -> dict[Label, list[int]]:
    r"""Negative sentences for each label, part of them positives of related labels.

    For ℓ with positives $P_\ell$ there are $\rho|P_\ell|$ negatives. A fraction of them is split among the strategies; for each
    of these a label is drawn from $R(\ell)$ and one of its sentences, both uniformly. The rest is drawn uniformly from all
    other sentences. No sentence of $P_\ell$ is ever drawn. All draws are with replacement.

    Args:
        positives: label -> rows of sentences, as `literal_match` returns them. Labels without any are left out.
        related: strategy -> label -> related labels, as `related_labels` returns them.
        fraction: p, in [0, 1]: how much is strategic.
        mix: strategy -> its share of that; equal shares, if `None`. [our choice]
        ratio: ρ, negatives for each positive, at least 1. [our choice: 10]
        num_sentences: how many sentences there are.
        seed: of the draws.

    Returns:
        Label -> rows of sentences, in the order strategies, random.

    Raises:
        ValueError: an argument out of range, `related` empty where `fraction` is above 0, all sentences positive for a label.

    Warns:
        UserWarning: labels without positives were left out; or had no related label with a sentence for a strategy, and got
            random ones in its place.

    Source:
        arXiv 2209.05987, strategies and their combination. Ratio, equal shares and drawing labels before sentences: our choice.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}")
    if ratio < 1:
        raise ValueError(f"ratio must be at least 1, got {ratio}")
    if fraction and not related:
        raise ValueError("related must have a strategy where fraction is above 0, got none")
    shares = dict.fromkeys(related, 1.0) if mix is None else dict(mix)
    if shares.keys() != related.keys() or not all(math.isfinite(share) and share >= 0 for share in shares.values()):
        raise ValueError(f"mix must have a share of at least 0 for each of {', '.join(related)}, got {shares}")
    if fraction and not sum(shares.values()):
        raise ValueError("mix must have a share above 0")
    rng = np.random.default_rng(seed)
    sets = {label: np.unique(np.asarray(rows, dtype=np.int64)) for label, rows in positives.items() if len(rows)}
    for label, rows in sets.items():
        if rows[0] < 0 or rows[-1] >= num_sentences:
            raise ValueError(f"positives must be rows in 0..{num_sentences - 1}, got {rows[0]} to {rows[-1]} for {label!r}")
        if len(rows) == num_sentences:
            raise ValueError(f"positives must leave a sentence to be a negative, got all {num_sentences} for {label!r}")
    negatives: dict[Label, list[int]] = {}
    alone: dict[str, int] = {}
    for label, own in sets.items():
        count = ratio * len(own)
        wanted = _parts(round(fraction * count), shares)
        drawn: list[NDArray[np.int64]] = []
        for strategy, number in wanted.items():
            if number:
                pools = [np.setdiff1d(sets[other], own) for other in related[strategy].get(label, ()) if other in sets]
                pools = [pool for pool in pools if len(pool)]
                if pools:
                    drawn.append(_from_pools(pools, number, rng))
                else:
                    alone[strategy] = alone.get(strategy, 0) + 1
        drawn.append(_outside(own, num_sentences, count - sum(map(len, drawn)), rng))
        negatives[label] = np.concatenate(drawn).tolist()
    if without := len(positives) - len(sets):
        warnings.warn(f"{without} of {len(positives)} labels have no positives and were left out", stacklevel=2)
    for strategy, number in alone.items():
        warnings.warn(
            f"{number} of {len(sets)} labels have no sentence of a related label by {strategy!r}: random ones instead",
            stacklevel=2,
        )
    return negatives


def _parts(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """A whole number split by shares, the largest remainders rounded up."""
    everything = sum(shares.values()) or 1.0
    exact = {name: total * share / everything for name, share in shares.items()}
    parts = {name: math.floor(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: parts[name] - exact[name])[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


def _from_pools(pools: list[NDArray[np.int64]], number: int, rng: np.random.Generator) -> NDArray[np.int64]:
    sizes = np.array(list(map(len, pools)))
    starts = np.concatenate([[0], sizes.cumsum()[:-1]])
    pool = rng.integers(len(pools), size=number)
    return np.concatenate(pools)[starts[pool] + (rng.random(number) * sizes[pool]).astype(np.int64)]


def _outside(own: NDArray[np.int64], total: int, number: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Uniform draws from what is not in the sorted `own`: the r-th such number is r plus how many of `own` come before it."""
    rank = rng.integers(total - len(own), size=number)
    return rank + np.searchsorted(own - np.arange(len(own)), rank, side="right")


class DistantLabelRanker(BaseEstimator):
    r"""A logistic regression for each label, on fixed features of sentences; ranks labels by their scores.

    $$ \min_{w, b} \tfrac12 \lVert w \rVert^2 + C \sum_i \log\bigl(1 + e^{-y_i (w \cdot x_i + b)}\bigr) $$

    Args:
        C: inverse strength of the penalty, positive.
        n_jobs: processes to spread the labels over, as in joblib; one, if `None`.
        progress: whether a bar on stderr shows the labels.

    Attributes:
        labels_: the labels, those of `positives` in their order.
        coef_: (labels, dim). intercept_: (labels).

    Source:
        arXiv 2209.05987: one binary classifier a label on frozen sentence embeddings (from memory of the paper); C is our choice.
        scikit-learn solves each: Newton's method for many labels at once was slower, 1 to 6 times.
    """

    def __init__(self, C: float = 1.0, *, n_jobs: int | None = None, progress: bool = True) -> None:
        self.C = C
        self.n_jobs = n_jobs
        self.progress = progress

    def fit(
        self, X: ArrayLike, positives: Mapping[Label, Sequence[int]], negatives: Mapping[Label, Sequence[int]]
    ) -> "DistantLabelRanker":
        """Learn from features of the corpus, (sentences, dim), and rows of it for each label.

        Raises:
            ValueError: `X` is no finite matrix, `C` not positive, labels of `negatives` without positives or the other way round,
                rows out of range.
        """
        x = np.asarray(X)
        if x.ndim != 2 or not np.isfinite(x).all():
            raise ValueError(f"X must be finite, of shape (sentences, dim), got shape {x.shape}")
        if not (math.isfinite(self.C) and self.C > 0):
            raise ValueError(f"C must be positive and finite, got {self.C}")
        if differing := set(positives).symmetric_difference(negatives):
            shown = sorted(map(str, differing))[:5]
            raise ValueError(f"positives and negatives must have the same labels, they differ in {shown}")
        if not positives:
            raise ValueError("positives must have at least one label, got none")
        rows = {}
        for label in positives:
            rows[label] = np.concatenate([np.asarray(part[label], dtype=np.int64) for part in (positives, negatives)])
            if not len(positives[label]) or not len(negatives[label]):
                raise ValueError(f"each label must have positives and negatives, {label!r} lacks one of them")
            if rows[label].min() < 0 or rows[label].max() >= len(x):
                low, high = rows[label].min(), rows[label].max()
                raise ValueError(f"rows must be in 0..{len(x) - 1}, got {low} to {high} for {label!r}")
        self.labels_ = list(positives)
        self.n_features_in_ = x.shape[1]
        tasks = (delayed(_solve)(x[rows[label]], len(positives[label]), self.C) for label in self.labels_)
        bar = track(
            Parallel(self.n_jobs, return_as="generator")(tasks),
            "labels",
            total=len(self.labels_),
            console=Console(stderr=True),
            transient=True,
            disable=not self.progress,
        )
        coefficients, intercepts = zip(*bar, strict=True)
        self.coef_, self.intercept_ = np.stack(coefficients), np.array(intercepts)
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """Scores, (sentences, labels): the log-odds of each label."""
        check_is_fitted(self)
        x = np.asarray(X, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != self.n_features_in_:
            raise ValueError(f"X must have shape (sentences, {self.n_features_in_}), got {x.shape}")
        return x @ self.coef_.T + self.intercept_

    def rank(self, X: ArrayLike, k: int = 5) -> list[list[Any]]:
        """The k labels with the highest scores for each sentence, best first."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        best = np.argsort(-self.decision_function(X), axis=1, kind="stable")[:, :k]
        return [[self.labels_[place] for place in row] for row in best]


def _solve(x: NDArray[np.floating], positives: int, C: float) -> tuple[NDArray[np.floating], float]:
    """Weights and intercept of a label; its positives are the first rows."""
    found = LogisticRegression(C=C, max_iter=1000).fit(x, np.arange(len(x)) < positives)
    return found.coef_[0], float(found.intercept_[0])


def r_precision_at_k(
    scores: Float[Tensor, "items labels"], gold: Bool[Tensor, "items labels"] | Sequence[Iterable[int]], k: int = 5
) -> float:
    r"""R-precision of the first k labels, mean over items that have a gold label.

    $$ \mathrm{RP@}k = \frac1N \sum_n \frac{1}{\min(k, |G_n|)} \sum_{j \le k} \mathbb{1}[\hat\ell_{nj} \in G_n] $$

    Args:
        scores: higher is better; finite.
        gold: which labels are right for each item, as a mask or as sets of columns.
        k: at least 1.

    Raises:
        ValueError: shapes that do not belong together, k below 1, scores that are not finite, no item with a gold label.

    Source:
        arXiv 2209.05987, the metric of its tables; items without a label in the taxonomy are skipped, as in its data.
    """
    metric = RPrecisionAtK(k)
    mask = gold if isinstance(gold, Tensor) else _mask(gold, scores)
    metric.update(scores, mask)
    return float(metric.compute())


def _mask(gold: Sequence[Iterable[int]], scores: Tensor) -> Bool[Tensor, "items labels"]:
    if len(gold) != len(scores):
        raise ValueError(f"gold must have {len(scores)} sets, one for each row of scores, got {len(gold)}")
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    for row, own in enumerate(gold):
        for column in own:
            if not 0 <= column < scores.shape[1]:
                raise ValueError(f"gold must be columns in 0..{scores.shape[1] - 1}, got {column} in row {row}")
            mask[row, column] = True
    return mask


class RPrecisionAtK(Metric):
    """`r_precision_at_k` over batches and processes.

    Args:
        k: at least 1.
        kwargs: options of `torchmetrics.Metric`.

    Raises:
        ValueError: k below 1; in `update`, what `r_precision_at_k` refuses; in `compute`, no item with a gold label yet.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, k: int = 5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k = k
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scores: Float[Tensor, "items labels"], gold: Bool[Tensor, "items labels"]) -> None:
        """Add items: their scores, and which labels are right."""
        if scores.ndim != 2 or gold.shape != scores.shape or gold.dtype != torch.bool:
            raise ValueError(
                f"gold must be boolean of shape {tuple(scores.shape)} like scores, got {gold.dtype} {tuple(gold.shape)}"
            )
        if not torch.isfinite(scores).all():
            raise ValueError("scores must be finite")
        having = gold.any(dim=1)
        scores, gold = scores[having], gold[having]
        first = scores.topk(min(self.k, scores.shape[1]), dim=1).indices
        hits = gold.gather(1, first).sum(dim=1)
        self.total = self.total + (hits.double() / gold.sum(dim=1).clamp(max=self.k)).sum()
        self.count = self.count + len(scores)

    def compute(self) -> Float[Tensor, ""]:
        """The mean over all items so far that have a gold label."""
        if self.count == 0:
            raise ValueError("gold must name a label for at least one item, got none")
        return (self.total / self.count).float()


def to_triplets(
    sentences: Sequence[str],
    labels: Mapping[Label, Sequence[str]],
    positives: Mapping[Label, Sequence[int]],
    negatives: Mapping[Label, Sequence[int]],
    *,
    seed: int,
) -> "Dataset":
    """The same negatives for a bi-encoder: rows of a sentence, the name of a label it holds, the name of one that it does not.

    A negative sentence of ℓ that is a positive of another label r becomes (sentence, name of r, name of ℓ). Sentences of no label
    say nothing here and are left out.

    Args:
        sentences: the corpus.
        labels: label -> its names; the first is taken.
        positives: label -> rows.
        negatives: label -> rows, as `sample_label_negatives` returns them.
        seed: which label, where a sentence has several.

    Returns:
        A data set with the columns `anchor`, `positive` and `negative`.

    Raises:
        ValueError: no negative sentence is a positive of another label.
        ImportError: datasets is not installed.
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise ImportError("to_triplets needs datasets: pip install 'firsthand[embed]'") from error
    rng = np.random.default_rng(seed)
    holds: dict[int, list[Label]] = {}
    for label, rows in positives.items():
        for row in rows:
            holds.setdefault(row, []).append(label)
    triplets = []
    for label, rows in negatives.items():
        for row in rows:
            if own := holds.get(row):
                triplets.append((sentences[row], labels[own[rng.integers(len(own))]][0], labels[label][0]))
    if not triplets:
        raise ValueError("negatives must hold a positive of another label, got random sentences only")
    columns = zip(*triplets, strict=True)
    return Dataset.from_dict(dict(zip(("anchor", "positive", "negative"), map(list, columns), strict=True)))
