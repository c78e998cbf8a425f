"""Pictures with labels."""

import gzip
from pathlib import Path

import numpy as np


def digits(folder: Path) -> dict[str, np.ndarray]:
    """Handwritten digits of 43 people, from the UCI repository as scikit-learn ships them.

    Returns:
        images: float32 `(1797, 8, 8)` in `[0, 1]`.
        labels: int64 `(1797,)` in `[0, 10)`.
    """
    rows = np.loadtxt(folder / "datasets/data/digits.csv.gz", delimiter=",", dtype=np.float32)
    return {"images": rows[:, :-1].reshape(-1, 8, 8) / 16, "labels": rows[:, -1].astype(np.int64)}


def fashion_mnist(folder: Path) -> dict[str, np.ndarray]:
    """Grey pictures of ten kinds of clothing (Zalando).

    Returns:
        train_images: uint8 `(60000, 28, 28)`; train_labels: int64 `(60000,)` in `[0, 10)`; test_images and test_labels: 10 000.
    """
    found = {}
    for split, file in (("train", "train"), ("test", "t10k")):
        found[f"{split}_images"] = _idx(folder / f"{file}-images-idx3-ubyte.gz")
        found[f"{split}_labels"] = _idx(folder / f"{file}-labels-idx1-ubyte.gz").astype(np.int64)
    return found


def _idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format: 0, 0, type 8, number of axes; each axis as four bytes, big-endian; the bytes."""
    with gzip.open(path, "rb") as file:
        content = file.read()
    axes = content[3]
    shape = np.frombuffer(content, ">u4", count=axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(tuple(int(n) for n in shape)).copy()
