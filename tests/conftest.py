import sys

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# A busy machine is no failure, and a test that fails must fail again.
settings.register_profile("firsthand", deadline=None, derandomize=True)
settings.load_profile("firsthand")


@pytest.fixture(autouse=True)
def compiled_afresh():
    """The wrappers that check shapes are one code object for all functions, and torch compiles one only so many times."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
