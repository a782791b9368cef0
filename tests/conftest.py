"""Every test process uses one thread: the tests' tensors are too small to share."""

import torch

torch.set_num_threads(1)
