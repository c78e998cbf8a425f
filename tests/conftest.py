import torch
from hypothesis import settings

torch.set_num_threads(1)
# A busy machine is no failure, and a test that fails must fail again.
settings.register_profile("firsthand", deadline=None, derandomize=True)
settings.load_profile("firsthand")
