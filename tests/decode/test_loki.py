import inspect
import math

import networkx as nx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import check_estimator

from firsthand.decode.locus import graph_distances
from firsthand.decode.loki import (
    LokiClassifier,
    MeanSquaredDistance,
    loki_predict,
    loki_predict_embedding,
    loki_predict_tree,
    loki_straight_through,
    squared_distance,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def probabilities(rows, columns, seed=0, **kwargs):
    p = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)).pow(4)
    return (p / p.sum(dim=1, keepdim=True)).to(**kwargs)


def tree(nodes, seed, lengths=False):
    edges = torch.tensor(list(nx.random_labeled_tree(nodes, seed=seed).edges))
    generator = torch.Generator().manual_seed(seed)
    return edges, torch.rand(nodes - 1, generator=generator) + 0.1 if lengths else None


def by_hand(p, d, observed):
    """The definition, one label and one class at a time, in Python's own numbers."""
    best = []
    for row in p.tolist():
        cost = [sum(w * d[i][y].item() ** 2 for w, i in zip(row, observed, strict=True)) for y in range(len(d))]
        best.append(cost.index(min(cost)))
    return best


# The rule


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_is_the_definition(dtype, device):
    edges, lengths = tree(12, 1, lengths=True)
    d, observed = graph_distances(edges, 12, lengths=lengths), [5, 0, 9]
    p = probabilities(40, 3, dtype=dtype)
    found = loki_predict(p.to(device), d.to(device), observed)
    assert found.device.type == device
    assert found.tolist() == by_hand(p, d, observed)
    assert torch.equal(found, loki_predict(p.to(device), d.to(device)[observed]))
    assert torch.equal(found, loki_predict_tree(p.to(device), edges.to(device), observed, lengths=lengths.to(device)))


def test_where_all_errors_are_alike_it_is_argmax():
    p = probabilities(200, 6)
    observed = [8, 1, 4, 3, 9, 0]
    assert torch.equal(loki_predict(p, 1 - torch.eye(10), observed), torch.tensor(observed)[p.argmax(dim=1)])


def test_certainty_predicts_the_class_itself():
    edges, lengths = tree(30, 2, lengths=True)
    observed = [4, 17, 8, 22]
    d = graph_distances(edges, 30, lengths=lengths)
    points = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    for found, cost in (
        loki_predict(torch.eye(4), d, observed, return_cost=True),
        loki_predict_tree(torch.eye(4), edges, observed, lengths=lengths, return_cost=True),
        loki_predict_embedding(torch.eye(4), points[observed], points, return_cost=True),
    ):
        assert found.tolist() == observed
        torch.testing.assert_close(cost, torch.zeros(4), atol=1e-5, rtol=0)


def test_on_a_line_it_is_the_rounded_mean():
    edges = torch.stack([torch.arange(19), torch.arange(1, 20)], dim=1)
    observed = torch.tensor([0, 4, 9, 15, 19])
    p = probabilities(300, 5)
    mean = p @ observed.float()
    for found in (loki_predict_tree(p, edges, observed), loki_predict(p, graph_distances(edges, 20), observed)):
        assert torch.equal(found, mean.round().long())


def test_neither_scale_nor_what_is_far_away_matters():
    edges, _ = tree(20, 3)
    d, observed, p = graph_distances(edges, 20), [1, 5, 13], probabilities(100, 3)
    expected = loki_predict(p, d, observed)
    assert torch.equal(loki_predict(p, 7 * d, observed), expected)
    far = torch.full((25, 25), 100.0).fill_diagonal_(0.0)
    far[:20, :20] = d
    assert torch.equal(loki_predict(p, far, observed), expected)
    assert torch.equal(loki_predict(p.roll(1, dims=1), d, [13, 1, 5]), expected), "the order of classes"


def test_of_equals_the_lowest_label_is_taken():
    half = torch.tensor([[0.5, 0.5]])
    for numbers in ([0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0]):
        edges = torch.tensor([numbers[:2], numbers[1:3], numbers[2:]])
        ends = [numbers[0], numbers[3]]
        assert loki_predict_tree(half, edges, ends).item() == min(numbers[1:3])
        assert loki_predict(half, graph_distances(edges, 4), ends, block=1).item() == min(numbers[1:3])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_logits_with_a_temperature(temperature):
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    edges, _ = tree(15, 4)
    d, observed = graph_distances(edges, 15), [0, 3, 7, 11]
    points = torch.randn(15, 3, generator=torch.Generator().manual_seed(1))
    p = F.softmax(logits / temperature, dim=1)
    assert torch.equal(loki_predict(logits, d, observed, temperature=temperature), loki_predict(p, d, observed))
    assert torch.equal(loki_predict_tree(logits, edges, observed, temperature=temperature), loki_predict(p, d, observed))
    found = loki_predict_embedding(logits, points[observed], points, temperature=temperature)
    assert torch.equal(found, loki_predict_embedding(p, points[observed], points))


# The fast paths


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lengths", [False, True])
def test_tree_agrees_with_the_matrix_and_its_costs(seed, lengths):
    edges, lengths = tree(80, seed, lengths)
    observed = np.random.default_rng(seed).permutation(80)[: 3 + 12 * seed].tolist()
    p, d = probabilities(64, len(observed), seed).double(), graph_distances(edges, 80, lengths=lengths).double()
    expected, cost = loki_predict(p, d, observed, return_cost=True)
    for block in (1, 500, 2**21):
        found, least = loki_predict_tree(p, edges, observed, lengths=lengths, block=block, return_cost=True)
        assert torch.equal(found, expected)
        torch.testing.assert_close(least, cost, rtol=1e-5, atol=1e-5)
    labels = np.random.default_rng(seed).permutation(80)[:25]
    labels.sort()
    expected = torch.from_numpy(labels)[loki_predict(p, d[observed][:, labels])]
    assert torch.equal(loki_predict_tree(p, edges, observed, lengths=lengths, labels=labels.tolist()), expected)


def test_deep_and_large_trees():
    """A comb of 3 000 nodes, 1 500 levels deep, where costs reach a million; and 40 000 nodes, whose matrix would take 6 GB."""
    spine = torch.arange(1500)
    edges = torch.cat([torch.stack([spine[:-1], spine[1:]], dim=1), torch.stack([spine, spine + 1500], dim=1)])
    observed = [1500, 2000, 2999, 700]
    p = probabilities(20, 4)
    d = graph_distances(edges, 3000, sources=observed).double()
    found, cost = loki_predict_tree(p, edges, observed, return_cost=True)
    expected, least = loki_predict(p.double(), d, return_cost=True)
    torch.testing.assert_close(cost.double(), least, rtol=1e-5, atol=1e-3)
    assert ((found == expected) | ((p.double() @ d[:, found].square()).diagonal() - least < 1e-6)).all()

    child = torch.arange(1, 40_000)
    edges = torch.stack([(child - 1) // 7, child], dim=1)
    observed = torch.randperm(40_000, generator=torch.Generator().manual_seed(0))[:300]
    p = probabilities(30, 300)
    found = loki_predict_tree(p, edges, observed)
    assert torch.equal(found, loki_predict(p.double(), graph_distances(edges, 40_000, sources=observed).double()))


def test_one_node_is_a_tree():
    assert loki_predict_tree(torch.ones(3, 1), torch.zeros(0, 2, dtype=torch.long), [0]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_points_agree_with_the_matrix_and_with_the_nearest_to_the_mean(shift):
    points = torch.randn(70, 6, generator=torch.Generator().manual_seed(0)) + shift
    observed, p = list(range(0, 70, 4)), probabilities(90, 18)
    d = torch.cdist(points.double(), points.double())
    expected, cost = loki_predict(p.double(), d, observed, return_cost=True)
    for block in (7, 4096):
        found, least = loki_predict_embedding(p, points[observed], points, block=block, return_cost=True)
        assert torch.equal(found, expected)
        torch.testing.assert_close(least.double(), cost, rtol=1e-3, atol=1e-3)
    nearest = torch.cdist(p.double() @ points[observed].double(), points.double()).argmin(dim=1)
    assert torch.equal(expected, nearest)


def test_blocks_of_the_matrix_change_nothing():
    edges, _ = tree(33, 6)
    d, p = graph_distances(edges, 33), probabilities(21, 33)
    expected = loki_predict(p, d, return_cost=True)
    for block in (1, 5, 33):
        for one, other in zip(loki_predict(p, d, block=block, return_cost=True), expected, strict=True):
            torch.testing.assert_close(one, other)


# Distances of pairs, the metric, the gradient


def test_squared_distance_of_each_space():
    edges, lengths = tree(50, 7, lengths=True)
    first, second = torch.randint(50, (2, 200), generator=torch.Generator().manual_seed(0))
    d = graph_distances(edges, 50, lengths=lengths)
    by_matrix = squared_distance(first, second, distances=d)
    torch.testing.assert_close(by_matrix, d[first, second] ** 2)
    torch.testing.assert_close(squared_distance(first, second, edges=edges, lengths=lengths), by_matrix)
    points = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    expected = torch.cdist(points, points)[first, second] ** 2
    torch.testing.assert_close(squared_distance(first, second, embeddings=points), expected)


def test_metric_is_the_mean_over_batches_and_processes():
    edges, _ = tree(40, 9)
    first, second = torch.randint(40, (2, 100), generator=torch.Generator().manual_seed(0))
    expected = squared_distance(first, second, edges=edges).mean()
    metric, other = MeanSquaredDistance(edges=edges), MeanSquaredDistance(graph_distances(edges, 40))
    metric.update(first[:30], second[:30])
    other.update(first[30:], second[30:])
    metric.merge_state(other)
    torch.testing.assert_close(metric.compute(), expected)
    with pytest.raises(ValueError, match="has seen no labels"), pytest.warns(UserWarning, match="before the ``update``"):
        MeanSquaredDistance(edges=edges).compute()


def test_metric_stops_and_resumes():
    d = 1 - torch.eye(5)
    first = MeanSquaredDistance(d)
    first.persistent(True)
    first.update(torch.tensor([1, 2]), torch.tensor([1, 4]))
    second = MeanSquaredDistance(d)
    second.load_state_dict(first.state_dict())
    second.update(torch.tensor([3]), torch.tensor([3]))
    assert second.compute().item() == pytest.approx(1 / 3)


def test_straight_through_is_one_hot_and_lets_the_gradient_pass():
    edges, _ = tree(6, 0)
    d, p = graph_distances(edges, 6), probabilities(10, 6).requires_grad_()
    out, wanted = loki_straight_through(p, d), torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(out.detach(), F.one_hot(loki_predict(p, d), 6).float())
    (out * wanted).sum().backward()
    torch.testing.assert_close(p.grad, wanted)


# The classifier

LINE = [(k, k + 1) for k in range(9)]


def ordinal(seed=0, rows=300):
    """A number in ten bins, of which every third is seen in training."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, 4))
    y = np.clip(np.round(4.5 + 2 * X[:, 0] + X[:, 1] + 0.3 * rng.normal(size=rows)), 0, 9).astype(int)
    return X, y


def test_classifier_predicts_what_it_never_saw_and_comes_closer_for_it():
    X, y = ordinal()
    seen = y % 3 == 0
    plain = LogisticRegression().fit(X[seen], y[seen])
    loki = LokiClassifier(LogisticRegression(), edges=LINE).fit(X[seen], y[seen])
    assert loki.classes_.tolist() == list(range(10))
    assert set(loki.predict(X)) - set(y[seen])
    assert np.mean((loki.predict(X) - y) ** 2) < np.mean((plain.predict(X) - y) ** 2)
    np.testing.assert_allclose(loki.predict_proba(X)[:, ::3], plain.predict_proba(X), atol=1e-12)
    assert not loki.predict_proba(X)[:, 1::3].any()


@pytest.mark.parametrize("labels", [None, list("jihgfedcba")])
def test_the_three_ways_to_say_what_a_line_is(labels):
    X, y = ordinal()
    seen = y % 3 == 0
    names = np.arange(10) if labels is None else np.array(labels)
    places = np.arange(10.0)[:, None]
    spaces = [
        {"edges": [(names[a], names[b]) for a, b in LINE]},
        {"distances": np.abs(places - places.T), "labels": labels},
        {"embeddings": places, "labels": labels},
        {"edges": np.array([(names[a], names[b]) for a, b in LINE]), "lengths": [2.0] * 9},
    ]
    found = [LokiClassifier(LogisticRegression(), **space).fit(X[seen], names[y[seen]]).predict(X) for space in spaces]
    assert len(set(found[0])) == 10
    for other in found[1:]:
        assert np.array_equal(found[0], other)


def test_inner_nodes_need_not_be_classes():
    X, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])
    edges = [("iris", "setosa"), ("iris", "other"), ("other", "versicolor"), ("other", "virginica")]
    free = LokiClassifier(LogisticRegression(C=0.01), edges=edges).fit(X, names[y])
    assert set(free.classes_) == {*names, "iris", "other"}
    assert "other" in free.predict(X)
    leaves = LokiClassifier(LogisticRegression(C=0.01), edges=edges, labels=names).fit(X, names[y])
    assert list(leaves.classes_) == list(names)
    assert set(leaves.predict(X)) <= set(names)
    assert leaves.predict_proba(X).shape == (150, 3)
    np.testing.assert_allclose(leaves.predict_proba(X).sum(axis=1), 1)


def test_temperature_is_chosen_by_squared_distance():
    """An estimator that is far too sure of itself gets a temperature above 1, and errs less for it."""

    class Sure(LogisticRegression):
        def predict_proba(self, X):
            p = super().predict_proba(X) ** 12
            return p / p.sum(axis=1, keepdims=True)

    X, y = ordinal(rows=600)
    seen = y % 3 == 0
    tuned = LokiClassifier(Sure(), edges=LINE, temperature="auto").fit(X[seen], y[seen])
    assert tuned.temperature_ > 1
    plain = LokiClassifier(Sure(), edges=LINE).fit(X[seen], y[seen])
    assert np.mean((tuned.predict(X) - y) ** 2) < np.mean((plain.predict(X) - y) ** 2)


def test_in_pipelines_searches_and_cross_validation():
    X, y = ordinal()
    loki = LokiClassifier(make_pipeline(StandardScaler(), LogisticRegression()), edges=LINE)
    assert clone(loki).get_params()["estimator__logisticregression__C"] == 1.0
    scores = cross_val_score(make_pipeline(StandardScaler(), loki), X, y % 9, cv=3, scoring="neg_mean_squared_error")
    assert np.isfinite(scores).all()
    search = GridSearchCV(loki, {"estimator__logisticregression__C": [0.1, 1.0], "temperature": [1.0, 2.0]}, cv=3)
    assert search.fit(X, y % 9).best_params_["temperature"] in (1.0, 2.0)
    with pytest.raises(NotFittedError):
        loki.predict(X)


@pytest.mark.filterwarnings(
    "ignore:invalid value encountered in cast:RuntimeWarning"
)  # where scikit-learn passes infinite labels
def test_checks_of_scikit_learn(monkeypatch):
    """All but those that want the classes of the training data and no others, in a space that has the labels they use."""
    monkeypatch.setattr(LokiClassifier, "__init__", inspect.unwrap(LokiClassifier.__init__))  # they pass what types forbid
    kept = {
        "check_classifiers_classes": "its labels are words, which this space has not",
        "check_classifiers_train": "a column of probabilities for each class of the training data",
        "check_estimator_sparse_array": "so",
        "check_estimator_sparse_matrix": "so",
    }
    loki = LokiClassifier(LogisticRegression(), distances=1 - np.eye(12), labels=[-1, *range(11)])
    results = check_estimator(loki, expected_failed_checks=kept, on_fail=None, on_skip=None)
    assert [each["check_name"] for each in results if each["status"] == "failed"] == []
    assert sum(each["status"] == "passed" for each in results) > 40


# Bad input

P, D = torch.tensor([[0.25, 0.75]]), 1 - torch.eye(3)
TREE = torch.tensor([[0, 1], [1, 2]])
UNCHECKED = inspect.unwrap(loki_predict_embedding)  # without the shape checks of the tests
ROW = torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loki_predict(2 * P, D, [0, 1]), "probs must be at least 0 and sum to 1"),
        (lambda: loki_predict(torch.tensor([[-0.5, 1.5]]), D, [0, 1]), "probs must be at least 0"),
        (lambda: loki_predict(P * math.nan, D, [0, 1]), "probs must be finite"),
        (lambda: loki_predict(P, D), "distances must have 2 labels, one for each column of probs, got 3"),
        (lambda: loki_predict(P, D, [0, 3]), r"observed must be in 0\.\.2"),
        (lambda: loki_predict(P, D, [1, 1]), "observed must not have duplicates"),
        (lambda: loki_predict(P, D, [0, 1, 2]), "observed must have 2 labels"),
        (lambda: loki_predict(P, D[:2], [0, 1]), "distances must be square where observed is given"),
        (lambda: loki_predict(P, -D, [0, 1]), "distances must be finite and not negative"),
        (lambda: loki_predict(P, D / 0, [0, 1]), "distances must be finite"),
        (lambda: loki_predict(P, D + 1, [0, 1]), "distances must be 0 from a label to itself"),
        (lambda: loki_predict(P, D, [0, 1], temperature=0.0), "temperature must be positive"),
        (lambda: loki_predict(P, D, [0, 1], block=0), "block must be at least 1"),
        (lambda: loki_predict_tree(P, TREE, [0, 1], block=0), "block must be at least 1"),
        (lambda: loki_predict_tree(P, TREE, [0]), "observed must have 2 labels"),
        (lambda: loki_predict_tree(P, TREE, [0, 1], labels=[4]), r"labels must be in 0\.\.2"),
        (lambda: loki_predict_tree(P, torch.tensor([[0, 1], [0, 1]]), [0, 1]), "edges must form a tree"),
        (lambda: UNCHECKED(P, torch.ones(3, 2), torch.ones(4, 2)), "observed_embeddings must have 2 rows"),
        (lambda: UNCHECKED(P, torch.ones(2, 2), torch.ones(4, 3)), "must be of equal width, got 2 and 3"),
        (lambda: loki_predict_embedding(P, torch.ones(2, 2), torch.ones(4, 2) / 0), "label_embeddings must be a finite matrix"),
        (lambda: squared_distance(ROW, ROW), "exactly one of distances, edges and embeddings, got none"),
        (lambda: squared_distance(ROW, ROW, distances=D, edges=TREE), "got distances and edges"),
        (lambda: squared_distance(ROW, ROW, distances=D, lengths=torch.ones(2)), "lengths go with edges"),
        (lambda: squared_distance(ROW, ROW, distances=-D - 1), "distances must be finite and not negative"),
        (lambda: inspect.unwrap(squared_distance)(ROW, ROW, distances=D[:2]), "distances must be a matrix, square"),
        (lambda: squared_distance(ROW, ROW + 3, edges=TREE), r"second must be in 0\.\.2, got 3 to 3"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_distances_that_are_not_symmetric_are_said_to_be():
    with pytest.warns(UserWarning, match="distances are not symmetric"):
        loki_predict(P, torch.tensor([[0.0, 1.0], [3.0, 0.0]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give exactly one of distances"),
        ({"edges": LINE, "temperature": -1.0}, "temperature must be positive"),
        ({"edges": LINE, "temperature": "best"}, "temperature must be positive and finite, got 'best'"),
        ({"edges": LINE, "labels": [0, 77]}, r"labels must be nodes of the tree, got \[77\]"),
        ({"edges": LINE[:4]}, r"y must have known labels only, got \[5, 6, 7, 8, 9\]"),
        ({"edges": [(0, 1), (2, 3)]}, "edges must form a tree, which 2 edges with 4 labels cannot"),
        ({"edges": []}, "edges must form a tree"),
        ({"edges": [*LINE[:2], (2, 0), *LINE[3:]]}, "edges must form a tree"),
        ({"edges": LINE, "lengths": [0.0] * 9}, "lengths must be positive"),
        ({"distances": np.ones((3, 3))}, "distances must be 0 from a label to itself"),
        ({"distances": 1 - np.eye(3), "labels": [1, 2]}, "labels must be one a row of distances, 3, got 2"),
        ({"distances": 1 - np.eye(3), "labels": [1, 2, 2]}, "labels must not have duplicates"),
    ],
)
def test_bad_classifiers(arguments, message):
    X, y = ordinal()
    with pytest.raises(ValueError, match=message):
        LokiClassifier(LogisticRegression(), **arguments).fit(X, y)


def test_estimators_without_probabilities():
    X, y = ordinal()
    for estimator in (RidgeClassifier(), SVC()):
        with pytest.raises(ValueError, match=f"estimator must have predict_proba, {type(estimator).__name__} has none"):
            LokiClassifier(estimator, edges=LINE).fit(X, y)
    few = np.r_[y[:50] % 3, 9]
    with pytest.raises(ValueError, match="at least 2 samples of each class"):
        LokiClassifier(LogisticRegression(), edges=LINE, temperature="auto").fit(X[:51], few)
