"""What the studies read is what it was: evidence knows data by name, so a loader that gives something else needs a new name."""

import hashlib

import numpy as np
import pytest

from firsthand import data


def digest(value):
    """SHA-256 of arrays, numbers, texts and containers of them."""
    sha = hashlib.sha256()

    def add(part):
        if isinstance(part, np.ndarray):
            sha.update(f"{part.dtype}{part.shape}".encode() + np.ascontiguousarray(part).tobytes())
        elif isinstance(part, dict):
            for key, inner in part.items():
                sha.update(str(key).encode() + b"=")
                add(inner)
        elif isinstance(part, list | tuple):
            for inner in part:
                add(inner)
                sha.update(b",")
        else:
            sha.update(str(part).encode())

    add(value)
    return sha.hexdigest()[:16]


@pytest.mark.parametrize(("name", "expected"), [("digits", "0b9b03ade0cf4426"), ("pos-pd98", "804d16dba491f016")])
def test_contents(name, expected):
    assert digest(data.load(name)) == expected


def test_weights_of_minilm():
    weights = (data.load("minilm") / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest()[:16] == "53aa51172d142c89"
