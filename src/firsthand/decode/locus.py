"""The locus of observed classes: every label that Loki can predict from them, and which class to observe next to enlarge it."""

from collections.abc import Iterable
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linprog
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, dijkstra, shortest_path
from torch import Tensor

Labels = Iterable[int] | Int[Tensor, " _"] | Int[np.ndarray, " _"]

TOLERANCE = 1e-9  # of the largest squared distance: a label that ties with the best up to this can be predicted


def locus(distances: Float[Tensor, "labels labels"], observed: Labels, *, pairwise: bool = False) -> set[int]:
    r"""All labels that are a Fréchet mean of the observed classes for some probabilities, ties included.

    $$ \Pi(\Lambda) = \Bigl\{y : \exists\, w \ge 0,\ \textstyle\sum_i w_i = 1,\
       y \in \arg\min_{y'} \sum_i w_i\, d(y', \lambda_i)^2 \Bigr\} $$

    One linear program for each label that is not observed, with a constraint for each other label: for a few hundred labels. On a
    tree take `tree_locus`.

    Args:
        distances: d, not squared.
        observed: Λ, at least one label.
        pairwise: probabilities of two observed classes at a time only. Then no program is solved: time is pairs × labels². On a
            tree it is the same set; elsewhere it may be smaller.

    Raises:
        ValueError: `distances` is no finite, non-negative square matrix with a zero diagonal, or `observed` is empty, out of
            range or has duplicates.

    Source:
        Roberts et al., "Geometry-Aware Adaptation for Pretrained Models", NeurIPS 2023, arXiv 2307.12226, definition of the locus
        and of pairwise decomposable spaces. The linear program is our choice.
    """
    squared = _squared(distances)
    chosen = check_observed(observed, len(squared)).numpy()
    if pairwise:
        return set(chosen.tolist()).union(*(_between(squared[i], squared[j]) for i, j in combinations(chosen, 2)))
    inside = set(chosen.tolist())
    to_observed = squared[:, chosen]  # (labels, observed)
    for label in sorted(set(range(len(squared))) - inside):
        excess = np.delete(to_observed[label] - to_observed, label, axis=0)
        program = linprog(
            np.zeros(len(chosen)),
            A_ub=excess,
            b_ub=np.full(len(excess), TOLERANCE),
            A_eq=np.ones((1, len(chosen))),
            b_eq=np.ones(1),
        )
        if program.status == 0:
            inside.add(label)
    return inside


def tree_locus(edges: Int[Tensor, "edges 2"], observed: Labels) -> set[int]:
    """The locus on a tree: all nodes on paths between observed ones. Lengths of edges do not matter.

    Args:
        edges: pairs of nodes; n - 1 of them connect the nodes 0 to n - 1.
        observed: at least one node.

    Raises:
        ValueError: `edges` are no tree, or `observed` is empty, out of range or has duplicates.

    Source:
        arXiv 2307.12226, the theorem that a tree's leaves are its only minimal locus cover.
    """
    return set(spanned_tree(edges, observed).nodes.tolist())


def minimum_locus_cover_tree(edges: Int[Tensor, "edges 2"]) -> set[int]:
    """The fewest classes of a tree that, when observed, let Loki predict every node: its leaves.

    Args:
        edges: as in `tree_locus`.

    Raises:
        ValueError: `edges` are no tree.

    Source:
        arXiv 2307.12226. On other spaces there is no such rule: a complete graph needs all its labels, a line its two ends.
    """
    degree = np.bincount(_graph(edges, None).indices, minlength=len(edges) + 1)
    return set(np.flatnonzero(degree <= 1).tolist())


def next_class(
    observed: Labels,
    *,
    edges: Int[Tensor, "edges 2"] | None = None,
    distances: Float[Tensor, "labels labels"] | None = None,
    candidates: Labels | None = None,
    pairwise: bool = True,
) -> int:
    r"""The class that enlarges the locus most: which one to label next.

    $$ v^* = \arg\max_v |\Pi(\Lambda \cup \{v\})| $$

    On a tree this is the node with the longest way, in edges, to the locus. Among equals, the lowest.

    Args:
        observed: Λ, at least one label.
        edges: the label space as a tree, see `tree_locus`.
        distances: or as a matrix, see `locus`, which is tried with each candidate.
        candidates: labels that can be had; all that are not observed, if `None`.
        pairwise: with `distances`, take the pairwise locus, which needs no linear programs.

    Raises:
        ValueError: not exactly one of `edges` and `distances`, nothing left to choose from, or an argument out of range.

    Source:
        arXiv 2307.12226, active selection of the next class.
    """
    if (edges is None) == (distances is None):
        raise ValueError("next_class needs either edges or distances, got " + ("neither" if edges is None else "both"))
    total = len(edges) + 1 if edges is not None else len(distances)
    chosen = check_observed(observed, total).tolist()
    wanted = set(range(total)) if candidates is None else {int(each) for each in candidates}
    if not wanted <= set(range(total)):
        raise ValueError(f"candidates must be in 0..{total - 1}, got {sorted(wanted - set(range(total)))}")
    left = sorted(wanted.difference(chosen))
    if not left:
        raise ValueError("candidates must have a label that is not observed, there is none")
    if edges is not None:
        inside = sorted(tree_locus(edges, chosen))
        away = dijkstra(_graph(edges, None), directed=False, indices=inside, unweighted=True, min_only=True)
        return left[int(np.argmax(away[left]))]
    if not pairwise:
        return left[int(np.argmax([len(locus(distances, [*chosen, label])) for label in left]))]
    squared = _squared(distances)
    inside = locus(distances, chosen, pairwise=True)
    grown = [len(inside.union({label}, *(_between(squared[label], squared[i]) for i in chosen))) for label in left]
    return left[int(np.argmax(grown))]


def graph_distances(
    edges: Int[Tensor, "edges 2"],
    nodes: int,
    *,
    lengths: Float[Tensor, " edges"] | None = None,
    sources: Labels | None = None,
) -> Float[Tensor, "sources nodes"]:
    """Lengths of shortest paths in an undirected graph, the label metric of hierarchies and taxonomies.

    Args:
        edges: pairs of nodes, in `[0, nodes)`. Of parallel edges the shortest counts.
        nodes: how many nodes there are.
        lengths: of the edges, positive; 1 each, if `None`.
        sources: rows to compute, in this order: with the observed classes alone, memory is observed × nodes. All, if `None`.

    Returns:
        float32 distances, on the CPU.

    Raises:
        ValueError: the graph is not connected, or an argument is out of range.

    Source:
        arXiv 2307.12226 takes shortest paths for its trees; scipy computes them.
    """
    pairs, weights = _check_edges(edges, nodes, lengths)
    low, high = pairs.min(axis=1), pairs.max(axis=1)
    order = np.lexsort((weights, high, low))
    low, high, weights = low[order], high[order], weights[order]
    first = np.ones(len(low), dtype=bool)
    first[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])  # scipy would add parallel edges up
    graph = csr_array((weights[first], (low[first], high[first])), shape=(nodes, nodes))
    rows = None if sources is None else check_observed(sources, nodes, "sources").numpy()
    found = shortest_path(graph, directed=False, indices=rows, unweighted=lengths is None)
    if np.isinf(found).any():
        raise ValueError("edges must connect all nodes, some have no path between them")
    return torch.from_numpy(found).float()


class RootedTree(NamedTuple):
    """Nodes in the order of a breadth-first walk, so that each level is one stretch, and parents come before children."""

    nodes: Int[Tensor, " nodes"]  # the numbers they had
    parents: Int[Tensor, " nodes"]  # places in this order; the root's is -1
    lengths: Float[Tensor, " nodes"]  # of the edge to the parent; the root's is 0
    levels: list[tuple[int, int]]  # of the root, of its children, ...: first place, and one past the last


def rooted_tree(edges: Int[Tensor, "edges 2"], root: int = 0, lengths: Float[Tensor, " edges"] | None = None) -> RootedTree:
    """The tree seen from one of its nodes.

    Raises:
        ValueError: `edges` are no tree, or a length is not positive and finite.
    """
    graph = _graph(edges, lengths)
    order, predecessors = breadth_first_order(graph, root, directed=False)
    if len(order) != graph.shape[0]:
        raise ValueError(f"edges must form a tree: {len(edges)} edges leave some of {graph.shape[0]} nodes unconnected")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    parents = np.full(len(order), -1, dtype=np.int64)
    parents[1:] = place[predecessors[order[1:]]]
    ends = place[edges.cpu().numpy()].max(axis=1)  # of each edge, the end that is the child
    to_parent = np.zeros(len(order))
    to_parent[ends] = 1.0 if lengths is None else lengths.double().cpu().numpy()
    return RootedTree(*map(torch.from_numpy, (order.astype(np.int64), parents, to_parent)), _levels(parents))


def spanned_tree(edges: Int[Tensor, "edges 2"], observed: Labels, lengths: Float[Tensor, " edges"] | None = None) -> RootedTree:
    """The smallest part of a tree that connects the observed nodes, rooted at the first of them.

    Raises:
        ValueError: as `rooted_tree`; or `observed` is empty, out of range or has duplicates.
    """
    chosen = check_observed(observed, len(edges) + 1)
    tree = rooted_tree(edges, int(chosen[0]), lengths)
    kept = torch.isin(tree.nodes, chosen)
    for start, end in reversed(tree.levels[1:]):  # what has an observed node below it is on a path from that to the root
        kept[tree.parents[start:end][kept[start:end]]] = True
    parents = (kept.cumsum(0) - 1)[tree.parents[kept]]
    parents[0] = -1
    return RootedTree(tree.nodes[kept], parents, tree.lengths[kept], _levels(parents.numpy()))


def _levels(parents: np.ndarray) -> list[tuple[int, int]]:
    """Parents never decrease in a breadth-first order: a level ends where theirs are no longer in the level before."""
    bounds = [0, 1]
    while bounds[-1] < len(parents):
        bounds.append(int(np.searchsorted(parents, bounds[-1])))
    return list(pairwise(bounds))


def check_observed(observed: Labels, total: int, name: str = "observed") -> Int[Tensor, " observed"]:
    """Labels as a tensor on the CPU.

    Raises:
        ValueError: there are none, or some are out of range or duplicates.
    """
    labels = np.asarray(observed if isinstance(observed, Tensor) else list(observed)).tolist()
    if not labels:
        raise ValueError(f"{name} must have at least one label, got none")
    if min(labels) < 0 or max(labels) >= total:
        raise ValueError(f"{name} must be in 0..{total - 1}, got {min(labels)} to {max(labels)}")
    if len(set(labels)) < len(labels):
        raise ValueError(f"{name} must not have duplicates, got {len(labels) - len(set(labels))}")
    return torch.tensor(labels)


def _check_edges(edges: Tensor, nodes: int, lengths: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    if edges.ndim != 2 or edges.shape[1] != 2 or edges.is_floating_point():
        raise ValueError(f"edges must be pairs of nodes, shape (edges, 2), got {tuple(edges.shape)} of {edges.dtype}")
    pairs = edges.cpu().numpy().astype(np.int64)
    if pairs.size and (pairs.min() < 0 or pairs.max() >= nodes):
        raise ValueError(f"edges must join nodes in 0..{nodes - 1}, got {pairs.min()} to {pairs.max()}")
    weights = np.ones(len(pairs)) if lengths is None else lengths.double().cpu().numpy()
    if weights.shape != (len(pairs),):
        raise ValueError(f"lengths must be one number an edge, {len(pairs)}, got shape {weights.shape}")
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        raise ValueError("lengths must be positive and finite")
    return pairs, weights


def _graph(edges: Tensor, lengths: Tensor | None) -> csr_array:
    """A tree as a symmetric sparse matrix. That it is connected is seen when it is walked."""
    nodes = len(edges) + 1
    pairs, weights = _check_edges(edges, nodes, lengths)
    ends = np.concatenate([pairs, pairs[:, ::-1]])
    return csr_array((np.tile(weights, 2), (ends[:, 0], ends[:, 1])), shape=(nodes, nodes))


def _squared(distances: Tensor) -> np.ndarray:
    """Squares, the largest 1, so that tolerances mean something."""
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1]:
        raise ValueError(f"distances must be a square matrix, got shape {tuple(distances.shape)}")
    d = distances.double().cpu().numpy()
    if not (np.isfinite(d).all() and (d >= 0).all() and (d.diagonal() == 0).all()):
        raise ValueError("distances must be finite and not negative, with zeros on the diagonal")
    return np.square(d / max(d.max(), np.finfo(float).tiny))


def _between(first: np.ndarray, second: np.ndarray) -> set[int]:
    """Labels that are best for some w in [0, 1], where the cost of one is w·first + (1 - w)·second."""
    # Label y is no worse than y' where w·slope <= level: an interval of w for each pair, and all must meet.
    slope = (first - second)[:, None] - (first - second)
    level = second - second[:, None] + TOLERANCE
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = level / slope
    upper = np.where(slope > 0, bound, np.where((slope == 0) & (level < 0), -np.inf, np.inf)).min(axis=1)
    lower = np.where(slope < 0, bound, -np.inf).max(axis=1)
    return set(np.flatnonzero(np.maximum(lower, 0.0) <= np.minimum(upper, 1.0)).tolist())
