"""Every test process uses one thread: the tests' tensors are too small to share."""

import pytest
import torch

from classification.command import another, home, known, photos, run_cifar  # noqa: F401
from runs import bank, flags, scenes, teacher  # noqa: F401  (fixtures of several files)

torch.set_num_threads(1)

#: Files of the fast tier, ``make quick``: none of them trains a run of its own.
QUICK = (
    "test_assistants", "test_bank", "test_check_data", "test_checkpoint", "test_data_index",
    "test_data_order", "test_data_views", "test_entropy", "test_eval_metrics", "test_files",
    "test_layers", "test_losses", "test_methods", "test_models", "test_noise", "test_rdm",
    "test_registry", "test_rundir", "test_student", "test_study", "test_task",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the fast tier."""
    for item in items:
        if item.path.stem in QUICK:
            item.add_marker(pytest.mark.quick)
