import itertools

import networkx as nx
import numpy as np
import pytest
import torch

from firsthand.decode.locus import (
    graph_distances,
    locus,
    minimum_locus_cover_tree,
    next_class,
    rooted_tree,
    spanned_tree,
    tree_locus,
)
from firsthand.decode.loki import loki_predict


def edges_of(graph):
    return torch.tensor(list(graph.edges)).reshape(-1, 2)


def tree(nodes, seed):
    return nx.random_labeled_tree(nodes, seed=seed)


def distances_of(graph, **kwargs):
    return graph_distances(edges_of(graph), len(graph), **kwargs)


def paths(graph, observed):
    """All nodes on paths between observed ones, by networkx."""
    found = set(observed)
    for one, other in itertools.combinations(observed, 2):
        found |= set(nx.shortest_path(graph, one, other))
    return found


STAR, LINE = nx.star_graph(6), nx.path_graph(9)


@pytest.mark.parametrize("seed", range(6))
def test_on_a_tree_the_locus_is_what_lies_between(seed):
    graph = tree(18, seed)
    observed = np.random.default_rng(seed).permutation(18)[:4].tolist()
    expected = paths(graph, observed)
    assert tree_locus(edges_of(graph), observed) == expected
    assert locus(distances_of(graph), observed) == expected
    assert locus(distances_of(graph), observed, pairwise=True) == expected


def test_lengths_of_edges_do_not_change_the_locus_of_a_tree():
    graph, observed = tree(15, 3), [0, 4, 9]
    lengths = torch.rand(14, generator=torch.Generator().manual_seed(0)) + 0.1
    assert locus(distances_of(graph, lengths=lengths), observed) == tree_locus(edges_of(graph), observed)


@pytest.mark.parametrize("pairwise", [False, True])
def test_spaces_whose_locus_is_known(pairwise):
    everything = set(range(9))
    assert locus(distances_of(nx.complete_graph(6)), [1, 3, 4], pairwise=pairwise) == {1, 3, 4}
    assert locus(distances_of(LINE), [0, 8], pairwise=pairwise) == everything
    assert locus(distances_of(LINE), [2, 5], pairwise=pairwise) == {2, 3, 4, 5}
    grid = nx.convert_node_labels_to_integers(nx.grid_2d_graph(3, 3))
    assert locus(distances_of(grid), [0, 8], pairwise=pairwise) == everything, "opposite corners, with ties"
    assert locus(distances_of(grid), [0, 2], pairwise=pairwise) == {0, 1, 2}


def test_three_classes_reach_what_no_two_of_them_do():
    """The middle of a triangle is best only where all three corners have weight."""
    points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 1.8], [1.0, 0.6]])
    d = torch.cdist(points, points)
    assert locus(d, [0, 1, 2]) == {0, 1, 2, 3}
    corners = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 1.8], [1.0, 0.6], [1.0, 0.0], [0.5, 0.9], [1.5, 0.9]])
    d = torch.cdist(corners, corners)
    assert 3 in locus(d, [0, 1, 2])
    assert locus(d, [0, 1, 2], pairwise=True) == {0, 1, 2, 4, 5, 6}


def test_what_is_predicted_is_in_the_locus_and_all_of_it_can_be():
    graph, observed = tree(14, 5), [2, 7, 11]
    w = torch.distributions.Dirichlet(torch.full((3,), 0.5)).sample((4000,))
    predicted = loki_predict(w, distances_of(graph), observed)
    assert set(predicted.tolist()) == locus(distances_of(graph), observed)


@pytest.mark.parametrize("seed", range(3))
def test_leaves_are_the_least_that_reaches_all(seed):
    graph = tree(12, seed)
    leaves = minimum_locus_cover_tree(edges_of(graph))
    assert leaves == {node for node, degree in graph.degree if degree == 1}
    assert tree_locus(edges_of(graph), leaves) == set(range(12))
    for leaf in leaves:
        assert leaf not in tree_locus(edges_of(graph), leaves - {leaf})
    assert minimum_locus_cover_tree(torch.zeros(0, 2, dtype=torch.long)) == {0}


@pytest.mark.parametrize("of", ["edges", "distances"])
@pytest.mark.parametrize("pairwise", [True, False])
def test_next_class_enlarges_the_locus_most(of, pairwise):
    graph = tree(13, 8)
    space = {"edges": edges_of(graph)} if of == "edges" else {"distances": distances_of(graph)}
    observed = [3]
    sizes = []
    while len(observed) < 13:
        chosen = next_class(observed, **space, pairwise=pairwise)
        size = {v: len(paths(graph, [*observed, v])) for v in range(13) if v not in observed}
        assert chosen == max(size, key=lambda v: (size[v], -v))
        observed.append(chosen)
        sizes.append(size[chosen])
    assert sizes == sorted(sizes)
    assert sizes[-1] == 13
    with pytest.raises(ValueError, match="candidates must have a label that is not observed"):
        next_class(observed, **space)


def test_next_class_on_a_star_is_another_leaf_and_of_candidates_only():
    edges = edges_of(STAR)  # 0 in the middle
    assert next_class([1, 2], edges=edges) == 3
    assert next_class([1, 2], edges=edges, candidates=[0, 5, 2]) == 5
    assert next_class([1, 2], edges=edges, candidates=[0]) == 0


def test_long_edges_do_not_attract_the_next_class():
    """What counts is how many labels come in: two short edges bring two, a long one brings one."""
    edges, lengths = torch.tensor([[0, 1], [0, 2], [2, 3]]), torch.tensor([9.0, 1.0, 1.0])
    assert next_class([0], edges=edges) == 3
    assert next_class([0], distances=graph_distances(edges, 4, lengths=lengths)) == 3


@pytest.mark.parametrize("weighted", [False, True])
def test_graph_distances_are_those_of_networkx(weighted):
    graph = nx.connected_watts_strogatz_graph(20, 4, 0.3, seed=1)
    lengths = torch.rand(graph.number_of_edges(), generator=torch.Generator().manual_seed(0)) + 0.1
    for (u, v), length in zip(graph.edges, lengths.tolist(), strict=True):
        graph[u][v]["weight"] = length if weighted else 1.0
    found = distances_of(graph, lengths=lengths if weighted else None)
    expected = torch.tensor([[by[v] for v in range(20)] for _, by in sorted(nx.all_pairs_dijkstra_path_length(graph))])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(distances_of(graph, lengths=lengths if weighted else None, sources=[7, 2]), expected[[7, 2]])


def test_of_parallel_edges_the_shortest_counts():
    edges, lengths = torch.tensor([[0, 1], [1, 0], [1, 2]]), torch.tensor([3.0, 2.0, 1.0])
    assert graph_distances(edges, 3, lengths=lengths)[0].tolist() == [0, 2, 3]
    assert graph_distances(edges, 3)[0].tolist() == [0, 1, 2]


def test_rooted_tree_is_the_tree_from_another_side():
    graph = tree(30, 2)
    lengths = torch.rand(29, generator=torch.Generator().manual_seed(0)) + 0.1
    rooted = rooted_tree(edges_of(graph), 7, lengths)
    assert rooted.nodes[0] == 7
    for place in range(1, 30):
        parent, child = rooted.nodes[rooted.parents[place]].item(), rooted.nodes[place].item()
        edge = next(k for k, pair in enumerate(edges_of(graph).tolist()) if set(pair) == {parent, child})
        assert rooted.lengths[place] == lengths[edge]
    steps = nx.single_source_shortest_path_length(graph, 7)
    for level, (start, end) in enumerate(rooted.levels):
        assert {steps[node] for node in rooted.nodes[start:end].tolist()} == {level}
    assert spanned_tree(edges_of(graph), [4]).nodes.tolist() == [4]


TRIANGLE = torch.tensor([[0, 1], [1, 2], [2, 0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tree_locus(TRIANGLE, [0]), "edges must form a tree"),
        (lambda: tree_locus(torch.tensor([[0, 5]]), [0]), r"edges must join nodes in 0\.\.1, got 0 to 5"),
        (lambda: tree_locus(TRIANGLE[:2], []), "observed must have at least one label"),
        (lambda: tree_locus(TRIANGLE[:2], [3]), r"observed must be in 0\.\.2, got 3 to 3"),
        (lambda: tree_locus(TRIANGLE[:2], [1, 1]), "observed must not have duplicates"),
        (lambda: rooted_tree(TRIANGLE[:2], lengths=torch.tensor([1.0, 0.0])), "lengths must be positive"),
        (lambda: graph_distances(torch.tensor([[0, 1]]), 3), "edges must connect all nodes"),
        (lambda: locus(torch.tensor([[0.0, -1.0], [1.0, 0.0]]), [0]), "distances must be finite and not negative"),
        (lambda: locus(torch.ones(2, 2), [0]), "zeros on the diagonal"),
        (lambda: locus(torch.full((2, 2), torch.nan), [0]), "distances must be finite"),
        (lambda: next_class([0]), "either edges or distances, got neither"),
        (lambda: next_class([0], edges=TRIANGLE[:2], distances=torch.zeros(3, 3)), "got both"),
        (lambda: next_class([0], edges=TRIANGLE[:2], candidates=[7]), r"candidates must be in 0\.\.2, got \[7\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
