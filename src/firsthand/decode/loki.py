"""Loki: predict the label with the least expected squared distance, so that labels nobody trained on can be predicted too."""

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.utils import Tags, get_tags
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torchmetrics import Metric

from firsthand.decode.locus import Labels, RootedTree, check_observed, rooted_tree, spanned_tree

TEMPERATURES = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0)  # what `temperature="auto"` tries


def loki_predict(
    probs: Float[Tensor, "batch observed"],
    distances: Float[Tensor, "rows labels"],
    observed: Labels | None = None,
    *,
    temperature: float | None = None,
    block: int = 4096,
    return_cost: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The Fréchet mean of the observed classes under the predicted probabilities, over all labels.

    $$ \hat y(x) = \arg\min_{y \in Y} \sum_{i=1}^{K} P(\lambda_i \mid x)\, d(\lambda_i, y)^2 $$

    Time batch × observed × labels, memory block² beside the arguments. Where labels are nodes of a tree or points,
    `loki_predict_tree` and `loki_predict_embedding` give the same without the matrix.

    Args:
        probs: of the observed classes; rows sum to 1.
        distances: d, not squared, at least 0: either (labels, labels) with `observed`, or the rows of the observed classes
            alone.
        observed: which labels the columns of `probs` are; without it they are the rows of `distances`.
        temperature: T. If given, `probs` are logits and P = softmax(logits / T).
        block: rows and columns of the cost matrix that are in memory at once.
        return_cost: return also the expected squared distance of each prediction.

    Returns:
        The index of a label for each row, the lowest of equals, and with `return_cost` its cost. Computed in float32 or wider.

    Raises:
        ValueError: shapes that do not belong together, distances that are negative or not finite or not 0 from a class to
            itself, rows of `probs` that are no probabilities, `observed` out of range or with duplicates, T not positive.

    Warns:
        UserWarning: distances between observed classes are not symmetric; the rows are used.

    Source:
        Roberts, Li, Adila, Cromp, Huang, Zhao, Sala, "Geometry-Aware Adaptation for Pretrained Models", NeurIPS 2023,
        arXiv 2307.12226, the prediction rule. Softmax with a temperature in it, and which of equals, are our choice.
    """
    p = _probabilities(probs, temperature)
    rows = _rows(distances, observed, p.shape[1]).to(p)

    def cost(samples: slice, labels: slice) -> Tensor:
        return p[samples] @ rows[:, labels].square()

    best, least = _blockwise(cost, len(p), rows.shape[1], block, p)
    return (best, least) if return_cost else best


def loki_predict_tree(
    probs: Float[Tensor, "batch observed"],
    edges: Int[Tensor, "edges 2"],
    observed: Labels,
    *,
    lengths: Float[Tensor, " edges"] | None = None,
    labels: Labels | None = None,
    temperature: float | None = None,
    block: int = 2**21,
    return_cost: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""`loki_predict` for labels that are nodes of a tree, in time batch × nodes.

    From a node u to its child v over an edge of length w, with the mass m and the first moment s (Σ P d(·, v)) of what lies below
    v, and A(u) = Σ P d(u, ·),

    $$ f(v) = f(u) + w\,\bigl(w + 2A(u) - 4(s + w m)\bigr), \qquad A(v) = A(u) + w\,(1 - 2m) $$

    so one walk up the tree and one down give the cost f of every node, and the matrix of distances is never made. Both go
    level by level, for many samples at once. A tree of thousands of levels is slow for that reason; a line, which is
    one, had better be given as points on an axis.

    Args:
        probs: see `loki_predict`, with `temperature` and `return_cost`.
        edges: pairs of nodes; n - 1 of them connect the nodes 0 to n - 1.
        observed: the nodes that the columns of `probs` are.
        lengths: of the edges, positive; 1 each, if `None`.
        labels: nodes that may be predicted, for trees where some nodes only connect others; all, if `None`. In that case only
            nodes on paths between observed ones can be best, and the others are left out from the start.
        temperature: T.
        block: nodes times samples whose costs are in memory at once, in each of about six arrays.
        return_cost: return also the costs.

    Returns:
        As `loki_predict`, with numbers of nodes. Costs are summed in float64 on the way.

    Raises:
        ValueError: `edges` are no tree, or an argument is out of range.

    Source:
        arXiv 2307.12226 for the rule. The two walks (rerooting) are our choice: the paper's code multiplies by the matrix.
    """
    p = _probabilities(probs, temperature)
    chosen = _check_columns(check_observed(observed, len(edges) + 1), p.shape[1])
    allowed = None if labels is None else check_observed(labels, len(edges) + 1, "labels")
    needed = chosen if allowed is None else torch.cat([chosen, allowed[~torch.isin(allowed, chosen)]])
    tree = spanned_tree(edges, needed, lengths)
    place = torch.empty(len(edges) + 1, dtype=torch.long)
    place[tree.nodes] = torch.arange(len(tree.nodes))
    places = place[chosen].to(p.device)
    forbidden = None if allowed is None else ~torch.isin(tree.nodes, allowed).to(p.device)
    tree = tree._replace(**{name: getattr(tree, name).to(p.device) for name in ("nodes", "parents", "lengths")})
    found = []
    for part in p.split(_at_least_one(block) // len(tree.nodes) or 1):
        cost = _tree_costs(tree, places, part.T.double())
        if forbidden is not None:
            cost[forbidden] = math.inf
        least = cost.min(dim=0).values
        # The first of equals in the order of labels, not in that of the walk.
        found.append((torch.where(cost == least, tree.nodes[:, None], len(edges) + 1).min(dim=0).values, least))
    best, least = (torch.cat(each) for each in zip(*found, strict=True))
    return (best, least.to(p.dtype)) if return_cost else best


def _tree_costs(tree: RootedTree, places: Tensor, probs: Tensor) -> Tensor:
    """Expected squared distance of each node, (nodes, samples), from (observed, samples). Samples lie side by side in memory."""
    depth = torch.zeros_like(tree.lengths)
    mass = probs.new_zeros(len(tree.nodes), probs.shape[1])
    mass[places] = probs
    moment = torch.zeros_like(mass)  # of what is below a node, about the node
    for start, end in reversed(tree.levels[1:]):
        up, w = tree.parents[start:end], tree.lengths[start:end, None]
        mass[:start].index_add_(0, up, mass[start:end])
        moment[start:end].addcmul_(w, mass[start:end])  # now about the parent
        moment[:start].index_add_(0, up, moment[start:end])
    away, total = moment, mass[0].clone()  # `away` becomes A, from the root down
    cost = torch.empty_like(mass)
    for start, end in tree.levels[1:]:
        depth[start:end] = depth[tree.parents[start:end]] + tree.lengths[start:end]
    cost[0] = (probs * depth[places, None].square()).sum(dim=0)
    for start, end in tree.levels[1:]:
        up, w = tree.parents[start:end], tree.lengths[start:end, None]
        above = away[up]
        step = torch.add(above, away[start:end], alpha=-2).mul_(2).addcmul_(w, total)
        torch.addcmul(cost[up], w, step, out=cost[start:end])
        torch.addcmul(above, w, torch.sub(total, mass[start:end], alpha=2), out=away[start:end])
    return cost


def loki_predict_embedding(
    probs: Float[Tensor, "batch observed"],
    observed_embeddings: Float[Tensor, "observed dim"],
    label_embeddings: Float[Tensor, "labels dim"],
    *,
    temperature: float | None = None,
    block: int = 4096,
    return_cost: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""`loki_predict` for labels that are points, with Euclidean distances: the label nearest to the mean point.

    $$ \sum_i P_i \lVert e_y - e_i \rVert^2 = \lVert e_y - \mu \rVert^2 + \mathrm{const}, \qquad \mu = \sum_i P_i e_i $$

    Time batch × (observed + labels) × dim instead of batch × observed × labels. For millions of labels, give μ to an index such
    as faiss.

    Args:
        probs: see `loki_predict`, as for all that follow.
        observed_embeddings: $e_i$, one a column of `probs`.
        label_embeddings: $e_y$ of all labels that may be predicted, such as a text model's embeddings of their names.
        temperature: T.
        block: rows and columns of the cost matrix that are in memory at once.
        return_cost: return also the costs.

    Raises:
        ValueError: shapes that do not belong together, embeddings that are not finite, or what `loki_predict` says of `probs`.

    Source:
        arXiv 2307.12226, label metrics derived from the model's own embeddings; the identity is our shortcut.
    """
    p = _probabilities(probs, temperature)
    for name, value in (("observed_embeddings", observed_embeddings), ("label_embeddings", label_embeddings)):
        if value.ndim != 2 or not value.is_floating_point() or not len(value) or not value.isfinite().all():
            raise ValueError(f"{name} must be a finite matrix (labels, dim), got {tuple(value.shape)} of {value.dtype}")
    if len(observed_embeddings) != p.shape[1]:
        raise ValueError(
            f"observed_embeddings must have {p.shape[1]} rows like probs has columns, got {len(observed_embeddings)}"
        )
    if observed_embeddings.shape[1] != label_embeddings.shape[1]:
        widths = observed_embeddings.shape[1], label_embeddings.shape[1]
        raise ValueError(f"observed_embeddings and label_embeddings must be of equal width, got {widths[0]} and {widths[1]}")
    centre = label_embeddings.to(p).mean(dim=0)  # so that the squares below are no larger than they must be
    known, points = observed_embeddings.to(p) - centre, label_embeddings.to(p) - centre
    mean, norms = p @ known, points.square().sum(dim=1)

    def cost(samples: slice, labels: slice) -> Tensor:
        return torch.addmm(norms[labels], mean[samples], points[labels].T, alpha=-2)

    best, least = _blockwise(cost, len(p), len(points), block, p)
    return (best, least + p @ known.square().sum(dim=1)) if return_cost else best


def loki_straight_through(
    probs: Float[Tensor, "batch labels"], distances: Float[Tensor, "labels labels"]
) -> Float[Tensor, "batch labels"]:
    """Loki's prediction as a one-hot vector whose gradient goes to `probs` unchanged, to train through the rule.

    Args:
        probs: of all labels; every label must be observed.
        distances: as in `loki_predict`.

    Raises:
        ValueError: `distances` is not square, or what `loki_predict` refuses.

    Source:
        From the authors' code; arXiv 2307.12226 does not rest on it. They smooth the result before the cross-entropy.
    """
    if distances.shape[0] != distances.shape[1]:
        raise ValueError(f"distances must be square, as many labels as columns of probs, got {tuple(distances.shape)}")
    best = loki_predict(probs.detach(), distances)
    one_hot = torch.zeros_like(probs).scatter_(1, best[:, None], 1.0)
    return one_hot + (probs - probs.detach())


def squared_distance(
    first: Int[Tensor, " batch"],
    second: Int[Tensor, " batch"],
    *,
    distances: Float[Tensor, "labels labels"] | None = None,
    edges: Int[Tensor, "edges 2"] | None = None,
    lengths: Float[Tensor, " edges"] | None = None,
    embeddings: Float[Tensor, "labels dim"] | None = None,
) -> Float[Tensor, " batch"]:
    """d² of pairs of labels, from a matrix, a tree or points; the last two never make a matrix.

    Args:
        first: labels.
        second: as many labels.
        distances: a matrix of unsquared distances.
        edges: or a tree, see `loki_predict_tree`.
        lengths: of its edges.
        embeddings: or one point a label.

    Raises:
        ValueError: not exactly one label space, or labels out of range.

    Source:
        arXiv 2307.12226, the loss that its experiments report.
    """
    kind, total = _label_space(distances, edges, lengths, embeddings)
    for name, value in (("first", first), ("second", second)):
        if value.shape != first.shape or value.ndim != 1:
            raise ValueError(f"{name} must be a vector of labels, as long as the other, got shape {tuple(value.shape)}")
        if value.numel() and (int(value.min()) < 0 or int(value.max()) >= total):
            raise ValueError(f"{name} must be in 0..{total - 1}, got {int(value.min())} to {int(value.max())}")
    if kind == "distances":
        between = distances.to(first.device)[first, second].to(_wide(distances))
        if not ((between >= 0) & between.isfinite()).all():
            raise ValueError("distances must be finite and not negative")
        return between.square()
    if kind == "embeddings":
        points = embeddings.to(first.device, _wide(embeddings))
        return (points[first] - points[second]).square().sum(dim=1)
    tree = rooted_tree(edges, lengths=lengths)
    place = torch.empty_like(tree.nodes)
    place[tree.nodes] = torch.arange(total)
    low, high = place[first.cpu()], place[second.cpu()]
    travelled = torch.zeros(len(first), dtype=torch.float64)
    while (apart := low != high).any():  # what comes later in the walk is not above the other, so it goes up
        low, high = torch.minimum(low, high), torch.maximum(low, high)
        travelled += torch.where(apart, tree.lengths[high], 0.0)
        high = torch.where(apart, tree.parents[high], high)
    return travelled.square().to(first.device, torch.float32)


class MeanSquaredDistance(Metric):
    """Mean of d(prediction, truth)², what Loki is made to lower, as a torchmetrics metric.

    Args:
        distances: as in `squared_distance`, as all that follow; give a matrix, a tree or points.
        edges: a tree.
        lengths: of its edges.
        embeddings: points.
        kwargs: options of `torchmetrics.Metric`.

    Raises:
        ValueError: not exactly one label space; at `update`, what `squared_distance` refuses; at `compute`, nothing seen.

    Source:
        arXiv 2307.12226; the relative change against argmax is what its tables give.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(
        self,
        distances: Float[Tensor, "labels labels"] | None = None,
        *,
        edges: Int[Tensor, "edges 2"] | None = None,
        lengths: Float[Tensor, " edges"] | None = None,
        embeddings: Float[Tensor, "labels dim"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        space = {"distances": distances, "edges": edges, "lengths": lengths, "embeddings": embeddings}
        _label_space(**space)
        for name, value in space.items():
            self.register_buffer(name, value, persistent=False)  # so that it is where the metric is
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Int[Tensor, " batch"], target: Int[Tensor, " batch"]) -> None:
        """Add predicted and true labels."""
        space = {"distances": self.distances, "edges": self.edges, "lengths": self.lengths, "embeddings": self.embeddings}
        self.total = self.total + squared_distance(preds, target, **space).double().sum()
        self.count = self.count + len(preds)

    def compute(self) -> Float[Tensor, ""]:
        """The mean over all pairs so far, of all processes."""
        if self.count == 0:
            raise ValueError("MeanSquaredDistance has seen no labels yet: call update first")
        return (self.total / self.count).float()


class LokiClassifier(ClassifierMixin, MetaEstimatorMixin, BaseEstimator):
    """A scikit-learn classifier that predicts by `loki_predict` from the probabilities of another one.

    `classes_` are all labels, so `predict` may return some that were not in the training data. `predict_proba` gives 0 to those:
    its argmax is what the other classifier predicts.

    Args:
        estimator: a classifier with `predict_proba`; a copy is fitted.
        distances: label space as a matrix (labels, labels), not squared.
        edges: or as a tree: pairs of labels, (parent, child) say, of any type.
        lengths: of the edges; 1 each, if `None`.
        embeddings: or as points, (labels, dim).
        labels: the label of each row of `distances` or `embeddings`, 0, 1, ... if `None`. With `edges`, the nodes that may be
            predicted; all, if `None`.
        temperature: predicted probabilities are raised to the power 1/T and rescaled. `"auto"` takes from `TEMPERATURES` what
            has the least mean squared distance in a cross-validation, which fits the estimator up to five more times.

    Attributes:
        classes_: all labels that may be predicted, sorted.
        estimator_: the fitted classifier.
        temperature_: T.

    Raises:
        ValueError: in `fit`: not exactly one label space, labels that do not belong to it, an estimator without probabilities, T
            out of range.

    Source:
        Roberts et al., NeurIPS 2023, arXiv 2307.12226. Tuning T is our choice.
    """

    def __init__(
        self,
        estimator: Any,
        *,
        distances: ArrayLike | None = None,
        edges: Sequence[Sequence[Hashable]] | NDArray | None = None,
        lengths: ArrayLike | None = None,
        embeddings: ArrayLike | None = None,
        labels: Sequence[Hashable] | NDArray | None = None,
        temperature: float | str = 1.0,
    ) -> None:
        self.estimator = estimator
        self.distances = distances
        self.edges = edges
        self.lengths = lengths
        self.embeddings = embeddings
        self.labels = labels
        self.temperature = temperature

    def fit(self, X: Any, y: Any, **fit_params: Any) -> "LokiClassifier":
        """Fit a copy of the estimator; `fit_params` go to it."""
        if not hasattr(self.estimator, "predict_proba"):
            raise ValueError(f"estimator must have predict_proba, {type(self.estimator).__name__} has none")
        if self.temperature != "auto":
            _check_temperature(self.temperature)
        check_classification_targets(y)
        self._read_labels()
        self.estimator_ = clone(self.estimator).fit(X, y, **fit_params)
        unknown = [each for each in self.estimator_.classes_.tolist() if each not in self._place]
        if unknown:
            raise ValueError(f"y must have known labels only, got {unknown[:5]} which are not in the label space")
        self._observed = [self._place[each] for each in self.estimator_.classes_.tolist()]
        self.temperature_ = self._tuned(X, y, fit_params) if self.temperature == "auto" else float(self.temperature)
        if hasattr(self.estimator_, "n_features_in_"):
            self.n_features_in_ = self.estimator_.n_features_in_
        if hasattr(self.estimator_, "feature_names_in_"):
            self.feature_names_in_ = self.estimator_.feature_names_in_
        return self

    def predict(self, X: Any) -> NDArray:
        """The label with the least expected squared distance, for each row."""
        check_is_fitted(self)
        best = self._best(self.estimator_.predict_proba(X), self.temperature_)
        return self.classes_[self._class[best.numpy()]]

    def predict_proba(self, X: Any) -> NDArray[np.floating]:
        """The estimator's probabilities, temperature and all, a column for each of `classes_`: 0 for what it never saw."""
        check_is_fitted(self)
        probs = _logits(self.estimator_.predict_proba(X)).div(self.temperature_).softmax(dim=1).numpy()
        spread = np.zeros((len(probs), len(self.classes_)))
        column = self._class[self._observed]
        spread[:, column[column >= 0]] = probs[:, column >= 0]
        return spread

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags = get_tags(self.estimator).input_tags
        return tags

    def _read_labels(self) -> None:
        """The label space in numbers: `_space` for `squared_distance`, `_place` of each label, `_class` of each place."""
        given = {"distances": self.distances, "embeddings": self.embeddings}
        self._space: dict[str, Tensor | None] = {
            name: None if value is None else torch.as_tensor(np.asarray(value, dtype=np.float64)) for name, value in given.items()
        }
        nodes = list(dict.fromkeys(node for edge in (() if self.edges is None else self.edges) for node in edge))
        number = {node: place for place, node in enumerate(nodes)}
        if self.edges is not None:
            if len(nodes) != len(self.edges) + 1:
                raise ValueError(f"edges must form a tree, which {len(self.edges)} edges with {len(nodes)} labels cannot")
            self._space["edges"] = torch.tensor([[number[node] for node in edge] for edge in self.edges])
        if self.lengths is not None:
            self._space["lengths"] = torch.as_tensor(np.asarray(self.lengths, dtype=np.float64))
        kind, total = _label_space(**self._space)
        if kind == "distances":
            _rows(self._space["distances"], None, total)
        if kind == "edges":
            rooted_tree(self._space["edges"], lengths=self._space.get("lengths"))
        labels = (nodes if kind == "edges" else range(total)) if self.labels is None else self.labels
        labels = np.asarray(labels).tolist()
        if len(set(labels)) < len(labels):
            raise ValueError("labels must not have duplicates")
        if kind == "edges":
            if not set(labels) <= set(nodes):
                raise ValueError(f"labels must be nodes of the tree, got {sorted(set(labels) - set(nodes), key=str)[:5]}")
            self._place = number
        else:
            if len(labels) != total:
                raise ValueError(f"labels must be one a row of {kind}, {total}, got {len(labels)}")
            self._place = {label: place for place, label in enumerate(labels)}
        self.classes_, order = np.unique(np.asarray(labels), return_index=True)
        self._class = np.full(total, -1)  # of a node that may not be predicted
        self._class[[self._place[labels[k]] for k in order]] = np.arange(len(order))

    def _best(self, probs: NDArray, temperature: float) -> Tensor:
        """Places of the best labels."""
        logits, space = _logits(probs), self._space
        if space.get("edges") is not None:
            allowed = np.flatnonzero(self._class >= 0).tolist() if (self._class < 0).any() else None
            return loki_predict_tree(
                logits, space["edges"], self._observed, lengths=space.get("lengths"), labels=allowed, temperature=temperature
            )
        if space["embeddings"] is not None:
            points = space["embeddings"]
            return loki_predict_embedding(logits, points[self._observed], points, temperature=temperature)
        return loki_predict(logits, space["distances"], self._observed, temperature=temperature)

    def _tuned(self, X: Any, y: Any, fit_params: dict[str, Any]) -> float:
        _, counts = np.unique(y, return_counts=True)
        if counts.min() < 2:
            raise ValueError("temperature='auto' needs at least 2 samples of each class to cross-validate")
        folds = StratifiedKFold(min(5, int(counts.min())), shuffle=True, random_state=0)
        probs = cross_val_predict(self.estimator, X, y, cv=folds, params=fit_params, method="predict_proba")
        truth = torch.tensor([self._place[each] for each in np.asarray(y).tolist()])
        losses = [squared_distance(self._best(probs, T), truth, **self._space).mean().item() for T in TEMPERATURES]
        return TEMPERATURES[int(np.argmin(losses))]


def _label_space(
    distances: Tensor | None = None, edges: Tensor | None = None, lengths: Tensor | None = None, embeddings: Tensor | None = None
) -> tuple[str, int]:
    """Which of the three is given, and how many labels it has."""
    given = {"distances": distances, "edges": edges, "embeddings": embeddings}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(f"give exactly one of distances, edges and embeddings, got {' and '.join(names) or 'none'}")
    if lengths is not None and edges is None:
        raise ValueError("lengths go with edges, which are not given")
    value = given[names[0]]
    if value.ndim != 2 or (names[0] == "distances" and value.shape[0] != value.shape[1]):
        raise ValueError(f"{names[0]} must be a matrix, square if of distances, got shape {tuple(value.shape)}")
    return names[0], len(value) + (names[0] == "edges")


def _blockwise(
    cost: Callable[[slice, slice], Tensor], samples: int, labels: int, block: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """For each sample the first label of least cost, and the cost, with a block of the cost matrix at a time."""
    _at_least_one(block)
    best = torch.zeros(samples, dtype=torch.long, device=like.device)
    least = like.new_full((samples,), math.inf)
    for start in range(0, labels, block):
        for first in range(0, samples, block):
            rows = slice(first, first + block)
            value, index = cost(rows, slice(start, start + block)).min(dim=1)
            better = value < least[rows]
            least[rows] = torch.where(better, value, least[rows])
            best[rows] = torch.where(better, index + start, best[rows])
    return best, least


def _probabilities(probs: Tensor, temperature: float | None) -> Tensor:
    if probs.ndim != 2 or not probs.is_floating_point() or not probs.shape[1]:
        raise ValueError(f"probs must be a floating-point matrix (batch, observed), got {tuple(probs.shape)} of {probs.dtype}")
    p = probs.detach().to(_wide(probs))
    if not p.isfinite().all():
        raise ValueError("probs must be finite")
    if temperature is not None:
        _check_temperature(temperature)
        return (p / temperature).softmax(dim=1)
    slack = 1e-3 if probs.dtype.itemsize > 2 else 1e-2  # 16-bit numbers do not sum any closer to 1
    if (p < 0).any() or ((p.sum(dim=1) - 1).abs() > slack).any():
        raise ValueError("probs must be at least 0 and sum to 1 in each row; for logits give temperature")
    return p


def _rows(distances: Tensor, observed: Labels | None, columns: int) -> Tensor:
    if distances.ndim != 2 or not distances.is_floating_point():
        raise ValueError(f"distances must be a floating-point matrix, got {tuple(distances.shape)} of {distances.dtype}")
    square = distances.shape[0] == distances.shape[1]
    if observed is None:
        rows, own = distances, torch.arange(len(distances))
        _check_columns(own, columns, "distances")
    else:
        if not square:
            raise ValueError(f"distances must be square where observed is given, got {tuple(distances.shape)}")
        own = _check_columns(check_observed(observed, len(distances)), columns)
        rows = distances[own.to(distances.device)]
    least, largest = rows.aminmax()
    if not (least >= 0 and largest < math.inf):  # false for NaN, too
        raise ValueError("distances must be finite and not negative")
    if square:
        among = rows[:, own.to(rows.device)]
        if among.diagonal().any():
            raise ValueError("distances must be 0 from a label to itself")
        if not torch.allclose(among, among.T, rtol=1e-3):
            warnings.warn("distances are not symmetric: those from the observed classes are used", UserWarning, stacklevel=3)
    return rows


def _check_columns(labels: Tensor, columns: int, name: str = "observed") -> Tensor:
    if len(labels) != columns:
        raise ValueError(f"{name} must have {columns} labels, one for each column of probs, got {len(labels)}")
    return labels


def _check_temperature(temperature: Any) -> None:
    if isinstance(temperature, str) or not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature!r}")


def _at_least_one(block: int) -> int:
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    return block


def _logits(probs: NDArray) -> Tensor:
    return torch.as_tensor(np.asarray(probs, dtype=np.float64)).clamp(min=torch.finfo(torch.float64).tiny).log()


def _wide(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)
