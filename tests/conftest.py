"""Every test process uses one thread: the tests' tensors are too small to share."""

import torch

from runs import bank, flags, scenes, teacher  # noqa: F401  (fixtures of several files)

torch.set_num_threads(1)
