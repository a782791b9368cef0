"""Workers are waited for, told of, and end with their process, whatever happens to either."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shards import Letters, overwrite, sample, write_shards, write_tar
from training.data.index import index_shards
from training.data.loader import Loader, sequential
from training.data.order import Order
from training.data.views import ImageSpec, View, eval_view
from training.data.workers import GRACE
from training.errors import Failure, sentence

ROOT = Path(__file__).parents[1]
SPEC = ImageSpec(size=8)


def loader(sources, views=(), **options):
    options = {"seed": 0, "global_batch": 2, "workers": 2, "start_method": "fork"} | options
    return Loader(Order(sources, 0), sources, list(views), [Letters()], **options)


def stuck(image):
    """A transform that comes to no end in a worker."""
    if multiprocessing.parent_process():
        time.sleep(1000)
    return image


STUCK = View((stuck, *eval_view(SPEC).stages))


def until(true, seconds: float) -> bool:
    """Whether something comes true in this time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def gone(*pids: int) -> bool:
    return not any(re.search(r"State:\s+[^ZX]", status(pid)) for pid in pids)


def status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""


def run(code: str, *args, wrap=(), **options) -> subprocess.CompletedProcess:
    command = [*wrap, sys.executable, "-c", code, *map(str, args)]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120,
                          **options)  # fmt: skip


def test_waiting_for_a_batch_is_given_up_with_the_name_of_the_shard(tmp_path):
    sources = index_shards(write_shards(tmp_path, [4]))
    reading = loader(sources, [STUCK])
    with pytest.raises(Failure, match=r"no batch for 1 seconds: data worker \d+ reads .*00000.tar"):
        for _ in reading.batches(0, 2, timeout=1):
            pass
    pids = [worker.pid for worker in reading._loader._iterator._workers]
    start = time.monotonic()
    reading.close()
    assert time.monotonic() - start < 12, "all at once, not one after the other"
    assert gone(*pids)


def test_a_loader_that_was_closed_serves_on(tmp_path):
    reading = loader(index_shards(write_shards(tmp_path, [4])))
    next(reading.batches(0, 2))
    reading.close()
    batches = reading.batches(0, 4)
    next(batches)
    time.sleep(GRACE + 2)
    assert len(list(batches)) == 3, "its new workers are not told to end with the old ones"
    reading.close()


def test_a_stop_ends_the_wait_for_a_batch(tmp_path):
    sources = index_shards(write_shards(tmp_path, [4]))
    reading = loader(sources, [STUCK])
    start = time.monotonic()
    assert list(reading.batches(0, 2, stopping=lambda: time.monotonic() > start + 1)) == []
    assert list(sequential(
        sources, [STUCK], [], batch_size=2, workers=1, stopping=lambda: True
    )) == []  # fmt: skip
    assert time.monotonic() - start < 30
    reading.close()


def test_a_stopped_worker_does_not_keep_its_process(tmp_path):
    reading = loader(index_shards(write_shards(tmp_path, [4])), workers=1)
    next(reading.batches(0, 2))
    (worker,) = reading._loader._iterator._workers
    os.kill(worker.pid, signal.SIGSTOP)
    start = time.monotonic()
    reading.close()
    assert gone(worker.pid) and time.monotonic() - start < 12


@pytest.mark.parametrize("why", ["a stop", "the time limit"])
def test_a_batch_that_a_stopped_worker_hands_over_is_waited_for_no_longer_than_others(
    why, tmp_path
):
    reading = loader(index_shards(write_shards(tmp_path, [8])), workers=1)
    start = time.monotonic()
    stop = {"stopping": lambda: time.monotonic() > start + 3} if why == "a stop" else {"timeout": 3}
    batches = reading.batches(0, 4, **stop)
    next(batches)
    (worker,) = reading._loader._iterator._workers
    assert until(reading._loader._iterator._data_queue._reader.poll, 10), "one is on its way"
    os.kill(worker.pid, signal.SIGSTOP)
    waiting = threading.Thread(target=list, args=(batches,), daemon=True)
    waiting.start()
    waiting.join(12)
    os.kill(worker.pid, signal.SIGCONT)
    assert time.monotonic() - start < 12
    reading.close()


def test_a_worker_that_was_killed_is_told_in_a_sentence(tmp_path):
    reading = loader(index_shards(write_shards(tmp_path, [4])), [STUCK])
    previous = signal.getsignal(signal.SIGCHLD)
    batches = reading.batches(0, 2, stopping=lambda: os.kill(victim(), signal.SIGKILL))

    def victim():
        return reading._loader._iterator._workers[0].pid

    with pytest.raises(Failure, match=r"data worker \d+ was killed, Killed: is memory"):
        next(batches)
    assert signal.getsignal(signal.SIGCHLD) is previous, "nothing is thrown in between"
    reading.close()


ORPHANS = """
import sys, time
from shards import Letters
from training.data.index import index_shards
from training.data.loader import Loader
from training.data.order import Order
from training.data.stream import StreamLoader

if __name__ == "__main__":
    method, urls = sys.argv[1:]
    if urls.startswith("pipe:"):
        loader = StreamLoader(urls, [], [Letters()], seed=0, global_batch=2, start_method=method)
        next(loader.batches(0, 9, stopping=lambda: print(
            *(worker.pid for worker in loader._batches._iterator._workers), flush=True)))
    else:
        sources = index_shards(urls)
        loader = Loader(Order(sources, 0), sources, [], [Letters()], seed=0, global_batch=2,
                        workers=2, start_method=method)
        next(loader.batches(0, 9))
        print(*(worker.pid for worker in loader._loader._iterator._workers), flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.parametrize("kind", ["files", "a stalled stream"])
def test_workers_end_with_a_process_that_was_killed(tmp_path, method, kind):
    urls = write_shards(tmp_path, [20])
    if kind != "files":
        urls = "pipe:sleep 987654"
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    process = subprocess.Popen(
        [sys.executable, script, method, urls],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    pids = [int(pid) for pid in process.stdout.readline().split()]
    children = []

    def started() -> bool:
        children[:] = [
            int(child)
            for pid in pids
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
        return bool(children)

    assert pids and (kind == "files" or until(started, 60))
    process.kill()
    process.wait()
    assert until(lambda: gone(*pids, *children), 20), "with the commands of their streams"


def test_a_forkserver_keeps_no_signal_mask(tmp_path):
    code = """
import sys
from shards import Letters, write_shards
from training.data.index import index_shards
from training.data.loader import Loader
from training.data.order import Order
from multiprocessing import forkserver

if __name__ == "__main__":
    sources = index_shards(write_shards(__import__("pathlib").Path(sys.argv[1]), [4]))
    loader = Loader(Order(sources, 0), sources, [], [Letters()], seed=0, global_batch=2, workers=1,
                    start_method="forkserver")
    next(loader.batches(0, 2))
    pid = forkserver._forkserver._forkserver_pid
    print(open(f"/proc/{pid}/status").read())
    loader.close()
"""
    script = tmp_path / "mask.py"
    script.write_text(code)
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = run(code, tmp_path / "s")
    assert re.search(r"SigBlk:\s+0+\n", done.stdout), done.stdout + done.stderr


LIMITS = """
import resource, sys
from shards import Letters
from training.data.index import index_shards
from training.data.loader import Loader
from training.data.order import Order
from training.data.views import ImageSpec, eval_view
from training.errors import UsageError

sources = index_shards(sys.argv[1])

def first_batch(size):
    try:
        loader = Loader(Order(sources, 0), sources, [eval_view(ImageSpec(224))], [Letters()],
                        seed=0, global_batch=size, workers=2, start_method="fork")
        print("a batch of", len(next(loader.batches(0, 1))))
        loader.close()
    except UsageError as error:
        print(error)

"""


def test_a_small_limit_of_open_files_is_raised_or_refused_at_the_start(tmp_path):
    code = """
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096))
first_batch(8)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
first_batch(8)
"""
    done = run(LIMITS + code, write_shards(tmp_path, [40]))
    assert re.fullmatch(
        r"a batch of 8\nthis process may open 64 files, and .* takes up to \d+: raise .*\n",
        done.stdout,
    ), done


def test_a_small_shared_memory_is_refused_at_the_start(tmp_path):
    mount = 'mount -t tmpfs -o size=16m tmpfs /dev/shm && exec "$@"'
    small = ("unshare", "-m", "sh", "-c", mount, "sh")
    if os.geteuid() or subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("needs root, and a kernel that lets it mount")
    done = run(
        LIMITS + "first_batch(16); first_batch(32)", write_shards(tmp_path, [40]), wrap=small
    )
    assert re.match(
        r"a batch of 16\n/dev/shm has 16 MiB free, and the batches of --workers 2 take 23 MiB",
        done.stdout,
    ), done


def replaced(tar: Path) -> None:
    write_tar(tar.with_suffix(".new"), sample("x") | sample("y"))
    os.replace(tar.with_suffix(".new"), tar)


def written_in_place(tar: Path) -> None:
    overwrite(tar, b"caption 0 of", b"caption X of")
    os.utime(tar)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced, "was changed after it was indexed"),
        (written_in_place, "was changed after it was indexed"),
        (os.remove, "can't be read any more: No such file or directory"),
    ],
    ids=["replaced", "written in place", "deleted"],
)
def test_a_shard_that_is_not_what_was_indexed_ends_in_a_sentence(
    tmp_path, workers, change, message
):
    sources = index_shards(write_shards(tmp_path, [4]))
    change(tmp_path / "00000.tar")
    reading = loader(sources, workers=workers, start_method="fork" if workers else None)
    with pytest.raises(Failure) as caught:
        next(reading.batches(0, 1))
    assert sentence(caught.value).startswith(f"{tmp_path}/00000.tar {message}")
    reading.close()


def test_a_shard_that_is_written_to_under_its_reader_is_noticed(tmp_path):
    sources = index_shards(write_shards(tmp_path, [4]))
    batches = loader(sources, workers=0, start_method=None).batches(0, 100)
    next(batches)
    written_in_place(tmp_path / "00000.tar")
    with pytest.raises(Failure, match=r"00000.tar was changed after it was indexed"):
        list(batches)
