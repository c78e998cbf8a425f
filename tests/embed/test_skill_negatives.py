import math
import re

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from torchmetrics.functional.retrieval import retrieval_r_precision

from firsthand.embed.skill_negatives import (
    DistantLabelRanker,
    RPrecisionAtK,
    literal_match,
    r_precision_at_k,
    related_labels,
    sample_label_negatives,
    to_triplets,
)

SENTENCES = [
    "We ask for machine learning and Python.",
    "Learning to cook is a plus; C++ is not.",
    "Deep machine-learning knowledge.",
    "PYTHON, python!",
    "Nothing of the kind, pythonic or not.",
]
NAMES = {"ml": ["machine learning", "ML"], "learning": ["learning"], "python": ["Python"], "c++": ["C++"], "java": ["Java"]}


# --- matching ---------------------------------------------------------------------------------------------------------------


def test_names_are_found_as_whole_words():
    found = literal_match(SENTENCES, NAMES)
    assert found == {"ml": [0], "learning": [0, 1, 2], "python": [0, 3], "c++": [1], "java": []}


def test_case_and_substrings():
    assert literal_match(SENTENCES, {"python": ["Python"]}, casefold=False) == {"python": [0]}
    assert literal_match(SENTENCES, {"python": ["Python"]}, whole_word=False) == {"python": [0, 3, 4]}


def test_one_pass_finds_what_a_regular_expression_a_label_finds():
    rng = np.random.default_rng(0)
    words = [f"w{number}" for number in range(12)]
    sentences = [" ".join(rng.choice(words, size=8)) for _ in range(200)]
    labels = {number: [" ".join(rng.choice(words, size=rng.integers(1, 4)))] for number in range(40)}
    expected = {
        label: [row for row, sentence in enumerate(sentences) if re.search(rf"\b{re.escape(name)}\b", sentence)]
        for label, (name,) in labels.items()
    }
    assert literal_match(sentences, labels) == expected


@pytest.mark.parametrize("names", [[], [" "], ["a", ""]])
def test_names_that_are_none(names):
    with pytest.raises(ValueError, match="labels must have"):
        literal_match(SENTENCES, {"x": names})


# --- related labels ---------------------------------------------------------------------------------------------------------


def edits(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, last = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
    return row[-1]


def test_levenshtein_is_the_least_number_of_edits():
    rng = np.random.default_rng(0)
    names = ["".join(rng.choice(list("abc"), size=rng.integers(1, 7))) for _ in range(30)]
    found = related_labels({number: [name.upper(), "other"] for number, name in enumerate(names)}, strategy="levenshtein", k=5)
    for number, near in found.items():
        order = sorted((edits(names[number], names[other]), other) for other in range(30) if other != number)
        assert near == [other for _, other in order[:5]]


def test_siblings_share_a_parent():
    parents = {"a": ["x"], "b": ["x", "y"], "c": ["y"], "d": ["z"]}
    found = related_labels({label: ["name"] for label in "abcde"}, strategy="siblings", parents=parents)
    assert found == {"a": ["b"], "b": ["a", "c"], "c": ["b"], "d": [], "e": []}
    assert all(label in found[other] for label, others in found.items() for other in others)


def test_embedding_is_scikit_learns_nearest_neighbours(monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(1500, 6))  # more than a block
    found = related_labels({number: ["name"] for number in range(1500)}, strategy="embedding", embeddings=vectors, k=4)
    _, order = NearestNeighbors(n_neighbors=5, metric="cosine").fit(vectors).kneighbors(vectors)
    assert sum(set(order[number, 1:].tolist()) == set(near) for number, near in found.items()) >= 1499  # but for rounding


def test_fewer_labels_than_k():
    assert related_labels({0: ["a"], 1: ["b"]}, strategy="levenshtein") == {0: [1], 1: [0]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "luck"}, "strategy must be one of"),
        ({"strategy": "siblings"}, "parents must be given"),
        ({"strategy": "embedding"}, "embeddings must be given"),
        ({"strategy": "embedding", "embeddings": np.zeros((3, 2))}, r"of shape \(5, dim\)"),
        ({"strategy": "embedding", "embeddings": np.full((5, 2), np.nan)}, "must be finite"),
        ({"strategy": "levenshtein", "k": 0}, "k must be at least 1"),
    ],
)
def test_related_labels_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        related_labels(NAMES, **options)


# --- negatives --------------------------------------------------------------------------------------------------------------

POSITIVES = {"a": [0, 1, 2], "b": [2, 3], "c": [4, 5, 6, 7], "d": [8]}
RELATED = {"s": {"a": ["b", "c"], "b": ["a"], "c": ["d"], "d": ["c"]}, "t": {"a": ["d"], "b": ["d"], "c": ["a"], "d": ["a"]}}


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_counts_are_exact_and_no_positive_is_a_negative(fraction):
    found = sample_label_negatives(POSITIVES, RELATED, fraction=fraction, ratio=10, num_sentences=30, seed=0)
    for label, rows in found.items():
        assert len(rows) == 10 * len(POSITIVES[label])
        assert not set(rows) & set(POSITIVES[label])
        strategic = round(fraction * len(rows))
        allowed = {row for related in RELATED.values() for other in related[label] for row in POSITIVES[other]}
        assert set(rows[:strategic]) <= allowed
    assert found == sample_label_negatives(POSITIVES, RELATED, fraction=fraction, ratio=10, num_sentences=30, seed=0)
    assert found != sample_label_negatives(POSITIVES, RELATED, fraction=fraction, ratio=10, num_sentences=30, seed=1)


def test_random_negatives_are_uniform():
    found = sample_label_negatives({"a": [3, 5, 6]}, {}, fraction=0.0, ratio=5000, num_sentences=12, seed=0)["a"]
    counts = np.bincount(found, minlength=12)
    assert counts[[3, 5, 6]].sum() == 0
    assert chisquare(np.delete(counts, [3, 5, 6])).pvalue > 1e-3


def test_strategic_negatives_are_uniform_over_labels_then_sentences():
    positives = {"a": [0], "b": [1], "c": [2, 3, 4, 0]}
    found = sample_label_negatives(
        positives, {"s": {"a": ["b", "c"], "b": ["a"], "c": ["b"]}}, fraction=1.0, ratio=6000, num_sentences=5, seed=0
    )["a"]
    assert chisquare(np.bincount(found, minlength=5)[1:], 6000 * np.array([1 / 2, 1 / 6, 1 / 6, 1 / 6])).pvalue > 1e-3


@pytest.mark.filterwarnings("ignore:2 of 3 labels have no sentence of a related label by 't'")
def test_mix_splits_the_strategic_part():
    related = {"s": {"a": ["b"]}, "t": {"a": ["c"]}}
    positives = {"a": [0], "b": [1], "c": [2]}
    with pytest.warns(UserWarning, match="2 of 3 labels have no sentence of a related label by 's'"):
        found = sample_label_negatives(
            positives, related, fraction=1.0, mix={"s": 3.0, "t": 1.0}, ratio=10, num_sentences=3, seed=0
        )["a"]
    assert found.count(1) == 8  # 7.5, rounded up once
    assert found.count(2) == 2


def test_labels_without_positives_and_without_relatives_are_reported():
    with pytest.warns(UserWarning, match="labels have no") as caught:
        found = sample_label_negatives({"a": [0], "b": [], "c": [0]}, {"s": {"a": ["b", "c"]}}, num_sentences=4, seed=0)
    messages = [str(warning.message) for warning in caught]
    assert "1 of 3 labels have no positives" in messages[0]
    assert "2 of 2 labels have no sentence of a related label by 's'" in messages[1]  # c holds nothing that a does not
    assert found.keys() == {"a", "c"}
    assert len(found["a"]) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1.5}, r"fraction must be in \[0, 1\], got 1.5"),
        ({"ratio": 0}, "ratio must be at least 1"),
        ({"related": {}}, "related must have a strategy"),
        ({"mix": {"s": 1.0}}, "mix must have a share"),
        ({"mix": {"s": 0.0, "t": 0.0}}, "mix must have a share above 0"),
        ({"mix": {"s": -1.0, "t": 2.0}}, "mix must have a share of at least 0"),
        ({"num_sentences": 8}, "positives must be rows in 0..7"),
        ({"positives": {"a": [0, 1]}, "num_sentences": 2}, "positives must leave a sentence"),
    ],
)
def test_negatives_that_cannot_be(options, message):
    arguments = {"positives": POSITIVES, "related": RELATED, "num_sentences": 30, "seed": 0} | options
    with pytest.raises(ValueError, match=message):
        sample_label_negatives(arguments.pop("positives"), arguments.pop("related"), **arguments)


# --- ranker -----------------------------------------------------------------------------------------------------------------


def problem(labels: int = 7, dim: int = 12):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, dim))
    positives = {label: rng.choice(200, size=rng.integers(1, 9), replace=False).tolist() for label in range(labels)}
    negatives = {label: rng.choice(200, size=10 * len(rows)).tolist() for label, rows in positives.items()}
    return x, positives, negatives


@pytest.mark.parametrize("n_jobs", [None, 2])
def test_ranker_is_a_logistic_regression_a_label(n_jobs):
    x, positives, negatives = problem()
    ranker = DistantLabelRanker(C=3.0, n_jobs=n_jobs, progress=False).fit(x, positives, negatives)
    for place, label in enumerate(positives):
        rows = [*positives[label], *negatives[label]]
        truth = np.arange(len(rows)) < len(positives[label])
        peer = LogisticRegression(C=3.0, max_iter=10000, tol=1e-8).fit(x[rows], truth)
        np.testing.assert_allclose(ranker.coef_[place], peer.coef_[0], rtol=0.02, atol=0.02)
        np.testing.assert_allclose(ranker.decision_function(x)[:, place], peer.decision_function(x), rtol=0.05, atol=0.05)


def test_ranks_are_the_best_scores():
    x, positives, negatives = problem()
    ranker = clone(DistantLabelRanker(C=2.0, progress=False)).fit(x, positives, negatives)
    scores = ranker.decision_function(x[:3])
    assert scores.shape == (3, 7)
    for row, ranked in zip(scores, ranker.rank(x[:3], k=2), strict=True):
        assert ranked == sorted(range(7), key=lambda label: -row[label])[:2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, p, n: (x[0], p, n), "X must be finite, of shape"),
        (lambda x, p, n: (x * np.nan, p, n), "X must be finite"),
        (lambda x, p, n: (x, p, {**n, 99: [0]}), r"same labels, they differ in \['99'\]"),
        (lambda x, p, n: (x, {}, {}), "positives must have at least one label"),
        (lambda x, p, n: (x, {**p, 0: []}, n), "each label must have positives and negatives, 0 lacks"),
        (lambda x, p, n: (x, {**p, 0: [500]}, n), r"rows must be in 0\.\.199"),
    ],
)
def test_training_data_that_is_none(change, message):
    with pytest.raises(ValueError, match=message):
        DistantLabelRanker(progress=False).fit(*change(*problem()))


def test_wrong_use_of_a_ranker():
    x, positives, negatives = problem()
    with pytest.raises(ValueError, match="C must be positive"):
        DistantLabelRanker(C=0.0).fit(x, positives, negatives)
    ranker = DistantLabelRanker(progress=False).fit(x, positives, negatives)
    with pytest.raises(ValueError, match=r"X must have shape \(sentences, 12\)"):
        ranker.decision_function(x[:, :5])
    with pytest.raises(ValueError, match="k must be at least 1"):
        ranker.rank(x, k=0)


# --- metric -----------------------------------------------------------------------------------------------------------------


def test_r_precision():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert r_precision_at_k(scores, [{0, 1}], k=2) == 1.0
    assert r_precision_at_k(scores, [{0, 1}], k=5) == 1.0
    assert r_precision_at_k(scores, [{3}], k=3) == 0.0
    assert r_precision_at_k(scores, [{3}], k=4) == 1.0  # k as large as the number of labels
    assert r_precision_at_k(scores, [{0, 3}], k=3) == 0.5
    assert r_precision_at_k(scores.repeat(2, 1), [{0}, set()], k=1) == 1.0  # without gold labels, an item is skipped


def test_r_precision_is_torchmetrics_where_k_is_the_number_of_gold_labels():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(20, 30, generator=generator)
    gold = torch.zeros(20, 30, dtype=torch.bool)
    for row in gold:
        row[torch.randperm(30, generator=generator)[:5]] = True
    expected = torch.stack([retrieval_r_precision(*row) for row in zip(scores, gold, strict=True)]).mean()
    assert r_precision_at_k(scores, gold, k=5) == pytest.approx(expected.item())
    metric = RPrecisionAtK(5)
    for rows in (slice(0, 7), slice(7, 20)):
        metric.update(scores[rows], gold[rows])
    assert metric.compute().item() == pytest.approx(expected.item())


def test_bfloat16_scores():
    scores = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.bfloat16)
    assert math.isclose(r_precision_at_k(scores, [{1}], k=2), 1.0)


@pytest.mark.parametrize(
    ("scores", "gold", "message"),
    [
        (torch.rand(2, 3), [{0}], "gold must have 2 sets"),
        (torch.rand(1, 3), [{3}], r"columns in 0\.\.2, got 3"),
        (torch.full((1, 3), torch.nan), [{0}], "scores must be finite"),
        (torch.rand(1, 3), [set()], "at least one item"),
    ],
)
def test_scores_that_are_none(scores, gold, message):
    with pytest.raises(ValueError, match=message):
        r_precision_at_k(scores, gold)
    with pytest.raises(ValueError, match="k must be at least 1"):
        RPrecisionAtK(0)


# --- triplets ---------------------------------------------------------------------------------------------------------------


def test_triplets_hold_one_label_and_not_the_other():
    pytest.importorskip("datasets")
    sentences = [f"sentence {row}" for row in range(30)]
    labels = {label: [f"name {label}", "alias"] for label in POSITIVES}
    negatives = sample_label_negatives(POSITIVES, RELATED, fraction=0.5, num_sentences=30, seed=0)
    triplets = to_triplets(sentences, labels, POSITIVES, negatives, seed=0)
    assert triplets.column_names == ["anchor", "positive", "negative"]
    for triplet in triplets:
        row = sentences.index(triplet["anchor"])
        assert row in POSITIVES[triplet["positive"].removeprefix("name ")]
        assert row not in POSITIVES[triplet["negative"].removeprefix("name ")]
    with pytest.raises(ValueError, match="got random sentences only"):
        to_triplets(sentences, labels, POSITIVES, {"a": [29]}, seed=0)
