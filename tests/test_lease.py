"""Two writers at one place: the one that holds the lease goes on, the other waits or ends."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cifd_clip import World
from runs import ROOT
from training.engine import lease
from training.engine.checkpoint import Checkpoints
from training.engine.control import STOPPED_EXIT
from training.engine.lease import Lease, held
from training.errors import Failure, UsageError


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """A second stands for a minute."""
    for name, seconds in (("BEAT", 0.1), ("DEAD", 1.0), ("LOOK", 0.02)):
        monkeypatch.setattr(lease, name, seconds)


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return tmp_path / "run" / "lease.json"


class Elsewhere:
    """A holder on another machine, which lives until it is stopped."""

    def __init__(self, path: Path, job: str | None = None):
        holder = {"host": "node7", "pid": 12, "started": "1", "system": "other", "job": job}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**holder, "beat": "0"}))
        self.path, self.holder, self.stopped = path, holder, threading.Event()
        self.thread = threading.Thread(target=self._live)
        self.thread.start()

    def _live(self) -> None:
        beat = 0
        while not self.stopped.wait(0.1):
            beat += 1
            self.path.write_text(json.dumps({**self.holder, "beat": str(beat)}))

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()


def test_a_second_writer_ends_in_a_sentence_that_names_host_process_and_job(path):
    there = Elsewhere(path, job="4711")
    try:
        with pytest.raises(UsageError, match=r"run is .* process 12 on node7 \(job 4711\): wait"):
            Lease(path)
    finally:
        there.stop()


def test_a_holder_elsewhere_is_dead_after_a_while_without_a_sign_of_life(path):
    Elsewhere(path).stop()
    start = time.monotonic()
    Lease(path).release()
    assert lease.DEAD < time.monotonic() - start < 3 * lease.DEAD
    assert not path.parent.exists(), "nothing is left of it"


def test_a_holder_that_ended_on_this_machine_is_dead_at_once(path):
    """Killed and not yet waited for, or long gone."""
    script = "import os, sys, pathlib; from training.engine.lease import Lease; "
    script += "Lease(pathlib.Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    child = subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=ROOT)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    for end in (lambda: None, child.wait):
        before = path.read_bytes()
        end()
        start = time.monotonic()
        Lease(path).release()
        assert time.monotonic() - start < lease.DEAD / 2
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(before)


def test_a_requeued_task_waits_for_the_process_of_its_earlier_start(path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    earlier = Elsewhere(path, job="4711")
    stop = threading.Timer(2 * lease.DEAD, earlier.stop)
    stop.start()
    start = time.monotonic()
    Lease(path).release()
    assert time.monotonic() - start > 2.5 * lease.DEAD, "it lived, then was silent for a while"
    stop.join()


def test_who_shares_a_folder_waits_for_the_other_to_be_done(path):
    there = Elsewhere(path)

    def done() -> None:
        there.stop()
        path.unlink()

    threading.Timer(2 * lease.DEAD, done).start()
    start = time.monotonic()
    Lease(path, wait=True).release()
    assert 2 * lease.DEAD < time.monotonic() - start < 2.5 * lease.DEAD


def test_who_was_taken_for_dead_saves_nothing_more(path):
    mine = Lease(path)
    saved = Checkpoints(path.parent / "checkpoints", lease=mine)
    saved.save(1, {"weights": 1})
    saved.wait()
    path.unlink()  # as one does that saw no sign of life
    there = Elsewhere(path)
    try:
        with pytest.raises(Failure, match=r"run is now written by process 12 on node7"):
            saved.save(2, {"weights": 2})
        time.sleep(3 * lease.BEAT)
        assert json.loads(path.read_text())["host"] == "node7", "its signs of life reach nobody"
        mine.release()
        assert path.exists(), "it does not end another's lease"
    finally:
        there.stop()
    assert saved.newest()[1] == {"weights": 1}


def test_of_many_that_find_a_dead_holder_one_takes_over(path):
    Elsewhere(path).stop()
    won, lost, gaps, over = [], [], [], threading.Event()

    def start() -> None:
        try:
            won.append(Lease(path))
        except UsageError as error:
            lost.append(error)

    def watch() -> None:
        while not over.is_set():
            if not path.exists():
                gaps.append(time.monotonic())

    watcher, *starts = [threading.Thread(target=f) for f in (watch, *[start] * 16)]
    watcher.start()
    for thread in starts:
        thread.start()
    for thread in starts:
        thread.join()
    over.set()
    watcher.join()
    assert len(won) == 1 and len(lost) == 15
    assert not gaps, "a moment without a lease lets another in"
    won[0].check()


def test_who_died_while_taking_over_is_taken_over_too(path):
    Elsewhere(path).stop()
    claim = path.with_name("lease.json.claim")
    claim.touch()
    start = time.monotonic()
    Lease(path).release()
    assert time.monotonic() - start > 2 * lease.DEAD, "the holder's silence, then the claim's"
    assert not path.parent.exists(), "nothing is left of it"


def test_whose_claim_was_taken_for_dead_looks_again(path, monkeypatch):
    Elsewhere(path).stop()
    claim, write, lost = path.with_name("lease.json.claim"), lease._write, []

    def stand_still(file, holder, beat):
        write(file, holder, beat)
        if claim.exists() and not lost:
            lost.append(claim.unlink())  # as another does after a minute

    monkeypatch.setattr(lease, "_write", stand_still)
    taken = Lease(path)
    assert lost, "the claim was not made"
    taken.check()
    taken.release()
    assert not path.parent.exists(), "nothing is left of it"


def test_a_lease_ends_with_its_block_and_with_an_error_in_it(path):
    with pytest.raises(ZeroDivisionError), held(path, World()):
        assert path.exists()
        raise ZeroDivisionError
    assert not path.exists()
    with held(path, World()) as mine:
        mine.check()


def test_the_second_of_two_starts_of_one_run_is_refused_and_the_first_goes_on(flags, tmp_path):
    command = [
        *flags,
        "--epochs",
        "9999",
        "--save-frequency",
        "0",
        "--logs",
        str(tmp_path),
        "--name",
        "run",
    ]
    command = [sys.executable, "-m", "training.main", *command, "--resume", "latest"]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "run" / "lease.json").exists():
            assert first.poll() is None
            time.sleep(0.1)
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert second.returncode == UsageError.exit_code
        assert f"run is being written by process {first.pid} on" in second.stderr.splitlines()[-1]
    finally:
        first.terminate()
    assert first.wait(timeout=60) == STOPPED_EXIT
    assert not list((tmp_path / "run").glob("*lease*"))
