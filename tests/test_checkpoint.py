"""Checkpoints: a failed write is never taken for a checkpoint."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cifd_clip import World
from cifd_clip.files import file_hash, read_json, write_json
from training.engine.checkpoint import Checkpoints
from training.errors import Failure, UsageError


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


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("keep", [1, 2])
def test_what_is_written_after_damaged_ones_of_later_steps_stays(keep, tmp_path):
    made = Checkpoints(tmp_path, keep)
    for step in (5, 6, 9)[-1 - keep :]:
        made.save(step, {"step": step})
    made.wait()
    for path in sorted(tmp_path.glob("step_*.pt"))[-keep:]:
        damage(path)
    made.save(3, {"step": 3})
    made.wait()
    assert made.newest() == (tmp_path / "step_00000003.pt", {"step": 3})


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(tmp_path):
    made = Checkpoints(tmp_path)
    assert made.newest() is None
    for step in (1, 2):
        made.save(step, {"step": step})
    made.wait()
    for path in tmp_path.glob("step_*.pt"):
        damage(path)
    with pytest.raises(Failure, match=r"all of the 2 checkpoints in .* are damaged"):
        made.newest()


@pytest.mark.parametrize("left", [["latest.json", "step_00000002.pt"], ["step_0*.pt"], []])
def test_a_run_whose_checkpoints_were_purged_does_not_begin_again(left, tmp_path):
    made = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        made.save(step, {"step": step})
    made.wait()
    kept = {path for pattern in left for path in made.directory.glob(pattern)}
    for path in set(made.directory.iterdir()) - kept:
        path.unlink()
    if kept:
        made.record.unlink()
    with pytest.raises(Failure, match=r"checkpoints holds no checkpoint, and .* shows that"):
        made.newest()


def test_a_first_save_that_was_cut_short_begins_again(tmp_path):
    made = Checkpoints(tmp_path / "checkpoints")
    made.save(1, {"step": 1})
    made.wait()
    for path in (made.record, made.directory / "latest.json", *made.directory.glob("step_*.json")):
        path.unlink()
    assert made.newest() is None


def test_a_payload_that_does_not_load_is_passed_over(tmp_path, caplog):
    made = Checkpoints(tmp_path)
    for step in (1, 2):
        made.save(step, {"step": step})
    made.wait()
    manifest, path = tmp_path / "step_00000002.json", tmp_path / "step_00000002.pt"
    path.write_bytes(b"whole, and no checkpoint")
    write_json(manifest, {**read_json(manifest, 1), "sha256": file_hash(path)}, 1)
    assert made.newest() == (tmp_path / "step_00000001.pt", {"step": 1})
    assert "step_00000002.pt is passed over: it can't be loaded" in caplog.text


def test_going_back_to_a_checkpoint_keeps_the_later_ones_aside(tmp_path):
    made = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        made.save(step, {"step": step})
    made.wait()
    first = made.directory / "step_00000001.pt"
    assert made.agreed(World(), str(first)) == (first, {"step": 1})
    aside = {path.name for path in (made.directory / "superseded").iterdir()}
    assert aside == {f"step_0000000{n}.{kind}" for n in (2, 3) for kind in ("pt", "json")}
    assert read_json(made.directory / "latest.json", 1)["file"] == first.name
    assert made.newest() == (first, {"step": 1}), "later on, latest is that one too"
    for other in (tmp_path / "step_00000001.pt", made.directory / "lastest"):
        other.parent.mkdir(exist_ok=True)
        with pytest.raises(UsageError, match="expected latest or a checkpoint of this run"):
            made.agreed(World(), str(other))
    damage(first)
    with pytest.raises(Failure, match=r"step_00000001\.pt': its .* bytes are not those"):
        made.agreed(World(), str(first))
