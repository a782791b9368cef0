"""Checkpoints: a failed write is never taken for a checkpoint."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from training.checkpoint import Checkpoints
from training.errors import Failure


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file of this process may grow beyond ``size`` bytes: a full disk.

    Only inside the block: a redirected report of the tests is a file too.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [1, 500, 5_000, 39_000, 41_000, 79_000])
def test_a_disk_that_is_full_after_any_byte_is_noticed(room, tmp_path):
    """torch.save may turn the system's error into one of its own."""
    made = Checkpoints(tmp_path)
    made.save(1, {"weights": torch.zeros(10)})
    made.wait()
    with files_end_at(room), pytest.raises(Failure, match="make room and run again"):
        made.save(2, {"a": torch.rand(10_000), "b": torch.rand(10_000)})
        made.wait()
    assert made.newest()[0].name == "step_00000001.pt"
    assert not list(tmp_path.glob("*.tmp"))
