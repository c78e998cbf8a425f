"""Blocking: the few pairs of records that are worth a model's time, out of all there are."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

_CELLS = 4_000_000  # cosines in memory at a time


def block(
    left_texts: Sequence[str],
    right_texts: Sequence[str],
    encoder: Callable[[list[str]], Any] | Any | None = None,
    *,
    k: int | None = None,
    threshold: float | None = None,
    progress: bool = True,
) -> list[tuple[int, int, float]]:
    """Pairs whose texts have similar vectors: for each left text the k nearest right ones, or all above a cosine, or both.

    Every cosine is computed, a block of left texts at a time, so memory grows with the number of texts and of pairs found, not
    with left × right.

    Args:
        left_texts: records as `serialize` writes them, or any text.
        right_texts: those to search among.
        encoder: from texts to vectors (texts, dim), or anything with such an `encode`, for example a `SentenceTransformer`. By
            default TF-IDF of character trigrams of the values, which sees through misspellings and needs no model.
        k: how many right texts for each left one, at most as many as there are.
        threshold: the least cosine of a pair. At least one of `k` and `threshold` must be given.
        progress: whether a bar on stderr shows how far it is, once it has taken two seconds.

    Returns:
        (left row, right row, cosine), by left row, then nearest first, equals by right row.

    Raises:
        ValueError: no texts, neither `k` nor `threshold`, `k` not in 1..right, `threshold` not in [-1, 1], vectors misshapen
            or not finite.

    Source:
        Li et al., "Deep Entity Matching with Pre-Trained Language Models", 2020, arXiv 2004.00584: vectors of a sentence encoder,
        nearest neighbours by cosine. TF-IDF instead of an encoder is our addition.
    """
    if not left_texts or not right_texts:
        raise ValueError(f"there must be texts on both sides, got {len(left_texts)} left and {len(right_texts)} right")
    if k is None and threshold is None:
        raise ValueError("one of k and threshold must be given, got neither")
    if k is not None and not 1 <= k <= len(right_texts):
        raise ValueError(f"k must be in 1..{len(right_texts)}, the number of right texts, got {k}")
    if threshold is not None and not -1 <= threshold <= 1:
        raise ValueError(f"threshold must be in [-1, 1], got {threshold}")
    left, right = _trigrams(left_texts, right_texts) if encoder is None else _encode(left_texts, right_texts, encoder)
    rows = max(1, _CELLS // len(right_texts))
    found: list[tuple[int, int, float]] = []
    starts = range(0, len(left_texts), rows)
    across = right.T.tocsr() if encoder is None else right.T
    for start in _progress(starts, "comparing records", progress):
        cosines = left[start : start + rows] @ across
        cosines = cosines.toarray() if encoder is None else cosines
        for row, scores in enumerate(cosines):
            found += [(start + row, int(at), float(scores[at])) for at in _best(scores, k, threshold)]
    return found


def _best(scores: NDArray[np.float32], k: int | None, threshold: float | None) -> NDArray[np.int64]:
    """Columns of the chosen scores, highest first, equals in order of column."""
    lowest = -math.inf if threshold is None else threshold
    if k is not None and k < len(scores):
        lowest = max(lowest, float(np.partition(scores, -k)[-k]))
    chosen = np.flatnonzero(scores >= lowest)
    return chosen[np.argsort(-scores[chosen], kind="stable")][:k]


def _encode(left: Sequence[str], right: Sequence[str], encoder: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    encode = getattr(encoder, "encode", encoder)
    unit = []
    for texts in (left, right):
        vectors = np.asarray(encode(list(texts)), dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
            raise ValueError(f"encoder must return a finite vector for each of {len(texts)} texts, got shape {vectors.shape}")
        unit.append(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))
    return unit[0], unit[1]


def _trigrams(left: Sequence[str], right: Sequence[str]) -> tuple[Any, Any]:
    vectorizer = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(3, 3), sublinear_tf=True, dtype=np.float32, preprocessor=_values
    )
    vectors = vectorizer.fit_transform([*left, *right])
    vectors = normalize(vectors)
    return vectors[: len(left)], vectors[len(left) :]


def _values(text: str) -> str:
    """A record's text without the names of its attributes, which all records share."""
    return re.sub(r"(?:^|(?<= ))COL .*?(?<= )VAL(?: |$)", "", text).lower()


def _progress(items: range, label: str, shown: bool) -> Any:
    return track(items, label, console=Console(stderr=True), transient=True, disable=not shown or len(items) == 1)
