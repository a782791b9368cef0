"""Every test process uses one thread: the tests' tensors are too small to share."""

import torch

from classification.command import another, home, known, photos, run_cifar  # noqa: F401
from runs import bank, flags, scenes, teacher  # noqa: F401  (fixtures of several files)

torch.set_num_threads(1)
