import tracemalloc

import numpy as np
import pytest

from firsthand.match import blocking
from firsthand.match.blocking import block


def vectors(count, seed):
    return np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)


@pytest.fixture
def encoder():
    """Texts are row numbers of one side."""
    tables = {"l": vectors(30, 0), "r": vectors(40, 1)}
    return lambda texts: np.stack([tables[text[0]][int(text[1:])] for text in texts])


LEFT, RIGHT = [f"l{i}" for i in range(30)], [f"r{i}" for i in range(40)]


def cosines():
    left, right = vectors(30, 0), vectors(40, 1)
    return (left / np.linalg.norm(left, axis=1, keepdims=True)) @ (right / np.linalg.norm(right, axis=1, keepdims=True)).T


def test_all_pairs_are_the_cosine_matrix(encoder):
    found = block(LEFT, RIGHT, encoder, k=40)
    assert len(found) == 30 * 40
    whole = np.zeros((30, 40))
    for i, j, cosine in found:
        whole[i, j] = cosine
    np.testing.assert_allclose(whole, cosines(), atol=1e-6)


@pytest.mark.parametrize("cells", [40, 130, 10**6])
def test_nearest_are_those_of_faiss_whatever_the_size_of_a_block(encoder, monkeypatch, cells):
    faiss = pytest.importorskip("faiss")
    monkeypatch.setattr(blocking, "_CELLS", cells)
    left, right = (table / np.linalg.norm(table, axis=1, keepdims=True) for table in (vectors(30, 0), vectors(40, 1)))
    index = faiss.IndexFlatIP(8)
    index.add(right)
    _, expected = index.search(left, 5)
    found = np.array([j for _, j, _ in block(LEFT, RIGHT, encoder, k=5, progress=False)]).reshape(30, 5)
    np.testing.assert_array_equal(found, expected)


def test_threshold_alone_and_with_k(encoder):
    found = {(i, j) for i, j, _ in block(LEFT, RIGHT, encoder, threshold=0.4)}
    assert found == set(zip(*map(np.ndarray.tolist, np.nonzero(cosines() >= 0.4)), strict=True))
    both = block(LEFT, RIGHT, encoder, k=2, threshold=0.4)
    assert {(i, j) for i, j, _ in both} == found & {(i, j) for i, j, _ in block(LEFT, RIGHT, encoder, k=2)}


def test_ties_go_to_the_first():
    found = block(["a"], ["x", "y", "z"], lambda texts: np.ones((len(texts), 2)), k=2)
    assert [(i, j) for i, j, _ in found] == [(0, 0), (0, 1)]


def test_an_object_that_encodes_and_the_default_that_needs_no_model(encoder):
    class Model:
        encode = staticmethod(encoder)

    assert block(LEFT, RIGHT, Model(), k=1) == block(LEFT, RIGHT, encoder, k=1)
    left = ["COL name VAL jonathan smith", "COL name VAL mary miller"]
    right = ["COL who VAL mary millar COL year VAL 1999", "COL who VAL jonathon smith", "COL who VAL"]
    found = block(left, right, k=1)
    assert [(i, j) for i, j, _ in found] == [(0, 1), (1, 0)]
    assert all(0.3 < cosine < 1 for *_, cosine in found)


def test_ten_thousand_by_ten_thousand_stay_small():
    left = np.random.default_rng(0).normal(size=(10_000, 16)).astype(np.float32)
    right = left[::-1] + 0.1
    tables = {"l": left, "r": right}
    texts = {side: [f"{side}{row}" for row in range(10_000)] for side in tables}
    tracemalloc.start()
    found = block(texts["l"], texts["r"], lambda wanted: tables[wanted[0][0]], k=3, progress=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 30_000
    assert peak < 100e6  # the matrix of all cosines alone would be 400 MB
    assert np.mean([i + j == 9999 for i, j, _ in found[::3]]) > 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 41}, r"k must be in 1\.\.40, the number of right texts, got 41"),
        ({"k": 0}, "k must be in"),
        ({"k": None}, "one of k and threshold must be given"),
        ({"threshold": 1.5}, r"threshold must be in \[-1, 1\]"),
        ({"left_texts": []}, "texts on both sides, got 0 left"),
        ({"encoder": lambda texts: np.full((len(texts), 2), np.nan)}, "encoder must return a finite vector"),
        ({"encoder": lambda texts: np.zeros(3)}, "encoder must return a finite vector"),
    ],
)
def test_bad_input(change, message):
    arguments = {"left_texts": LEFT, "right_texts": RIGHT, "k": 3} | change
    with pytest.raises(ValueError, match=message):
        block(**arguments)
