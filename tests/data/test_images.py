import dataclasses
import gzip
import struct

import numpy as np

from firsthand.data import SOURCES, load


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    digits, theirs = load("digits"), load_digits()
    assert digits["images"].dtype == np.float32
    assert digits["labels"].dtype == np.int64
    np.testing.assert_array_equal(digits["images"] * 16, theirs.images)
    np.testing.assert_array_equal(digits["labels"], theirs.target)
    assert digits["images"].min() == 0
    assert digits["images"].max() == 1


def test_fashion_mnist_from_files_in_its_format(tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "fashion-mnist", dataclasses.replace(SOURCES["fashion-mnist"], folder=str(tmp_path)))
    rng = np.random.default_rng(0)
    written = {}
    for split, file, rows in (("train", "train", 5), ("test", "t10k", 3)):
        images, labels = rng.integers(256, size=(rows, 28, 28)), rng.integers(10, size=rows)
        written |= {f"{split}_images": images, f"{split}_labels": labels}
        head = struct.pack(">4B3I", 0, 0, 8, 3, rows, 28, 28)
        (tmp_path / f"{file}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + bytes(images.ravel().tolist())))
        head = struct.pack(">4BI", 0, 0, 8, 1, rows)
        (tmp_path / f"{file}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head + bytes(labels.tolist())))
    read = load("fashion-mnist")
    assert read.keys() == written.keys()
    for key, values in written.items():
        np.testing.assert_array_equal(read[key], values)
    assert read["train_images"].dtype == np.uint8
    assert read["train_labels"].dtype == np.int64
    read["train_images"] += 1  # a user may write to it
