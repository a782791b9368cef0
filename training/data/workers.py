"""Worker processes: started, waited for, and ended, whatever happens to them or to this process."""

import atexit
import multiprocessing
import os
import re
import resource
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing import forkserver
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from training.data.shard import OPEN_SHARDS
from training.errors import Failure, UsageError
from training.stopping import SIGNALS

SLICE = 2  # seconds of waiting for a batch, after which is looked whether to wait on
GRACE = 3  # seconds a worker has to end by itself
TENSORS = 8  # of a batch, each an open file while it travels
SHM = "/dev/shm"

_running = weakref.WeakKeyDictionary()  # iterators of loaders, and the boards of their workers
_place = np.full(1, -1)


def reads(place: int) -> None:
    """Note what this process reads now, a number of its data set, for the one that waits for it."""
    _place[0] = place


def data_loader(dataset, sampler, workers, start_method, pin_memory, prefetch, persistent):
    """torch's loader over a data set whose items are whole batches."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        collate_fn=_same,
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context=start_method if workers else None,
        pin_memory=pin_memory,
        timeout=SLICE if workers else 0,
        # without its own, the loader would draw its seed from torch's default generator
        generator=torch.Generator().manual_seed(0),
    )


def start_worker(board: Tensor, number: int) -> None:
    """What each worker process does first.

    A signal to the whole job (SLURM's, or ctrl-C) is the main process's business: a worker that
    died of it, or ran the handler it inherited, would end the run before it can save. Workers end
    when the loader closes or the main process is gone (`_watch`).
    """
    global _place
    for job_signal in SIGNALS:
        signal.signal(job_signal, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.filterwarnings("ignore", module="PIL")  # broken EXIF and the like: not worth a line
    _place = board.numpy()[1 + number :]
    os.setpgid(0, 0)
    threading.Thread(target=_watch, args=(board, os.getppid()), daemon=True).start()


def _watch(board: Tensor, parent: int) -> None:
    """End this worker and the commands it started, such as a stream's, when nobody waits for it."""
    master, patience = multiprocessing.parent_process(), GRACE
    # a forkserver, then the parent, outlives the process that the worker works for
    while os.getppid() == parent and master.is_alive() and patience > 0:
        time.sleep(1)
        patience -= int(board[0] == 0)
    os.killpg(0, signal.SIGKILL)


def _same(batch: Any) -> Any:
    return batch


def iterate(
    loader: DataLoader,
    stopping: Callable[[], bool] | None = None,
    timeout: float | None = None,
    name: Callable[[int], str] = str,
) -> "Batches":
    """Iterate over a loader whose workers end with this process, however it ends.

    Args:
        loader: of `data_loader`.
        stopping: asked every `SLICE` seconds of waiting; where it says so the batches end.
        timeout: seconds after which waiting for one batch is given up; None: never.
        name: of what a worker reads, from its number (see `reads`).

    Without workers, batches are made by this process, and nothing is asked meanwhile.

    Raises:
        Failure: a worker died, or the time was up.
    """
    return Batches(loader, stopping, timeout, name)


def end(batches: "Batches | None") -> None:
    """End the workers of an iteration, if there is one."""
    if batches is not None:
        batches.exhausted = True
        _end(batches._iterator)


class Batches:
    """What `iterate` returns."""

    def __init__(self, loader: DataLoader, stopping, timeout, name):
        self.stopping, self.timeout, self.name = stopping, timeout, name
        self.exhausted, self._begun = False, time.monotonic()
        self._loader, self._iterator = loader, _start(loader)
        if loader.num_workers:
            threading.Thread(target=_wake, args=(weakref.ref(self),), daemon=True).start()

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        self._begun = time.monotonic()
        while True:
            try:
                return next(self._iterator)
            except StopIteration:
                self.exhausted = True
                raise
            except (RuntimeError, OSError, EOFError) as error:
                if not isinstance(error, RuntimeError):
                    time.sleep(1)  # a worker's sockets close before it has ended
                if death := self._death():
                    raise death from error
                if not str(error).startswith("DataLoader timed out"):
                    raise
            if self._stopped():
                raise StopIteration
            if self._late():
                raise self._stall()

    def wake(self) -> None:
        """Let stopped workers go on when no one is to wait longer."""
        if self._stopped() or self._late():
            _continue(self._iterator)

    def _stopped(self) -> bool:
        return self.stopping is not None and self.stopping()

    def _late(self) -> bool:
        return self.timeout is not None and time.monotonic() - self._begun > self.timeout

    def _death(self) -> Failure | None:
        for worker in getattr(self._iterator, "_workers", ()):
            if code := worker.exitcode:
                how = f"was killed, {signal.strsignal(-code)}" if code < 0 else f"ended with {code}"
                return Failure(
                    f"data worker {worker.pid} {how}: is memory or {SHM} full? lower --workers or "
                    "--batch-size"
                )
        pinning = getattr(self._iterator, "_pin_memory_thread", None)
        if pinning is not None and not pinning.is_alive():
            return Failure(
                "the thread that pins batches died; raise the limit of open files (ulimit -n)"
            )
        return None

    def _stall(self) -> Failure:
        number = self._iterator._num_yielded % len(self._iterator._workers)
        worker, place = self._iterator._workers[number], int(self._loader.board[1 + number])
        what = "has not begun" if place < 0 else f"reads {self.name(place)}"
        return Failure(
            f"no batch for {self.timeout:.0f} seconds: data worker {worker.pid} {what}; does its "
            "file system or server answer? (--data-timeout)"
        )


def _wake(reference: weakref.ref[Batches]) -> None:
    """What a thread does: of a batch that a worker is handing over, no timeout of torch's looks."""
    while True:
        time.sleep(SLICE)
        batches = reference()
        if batches is None or batches.exhausted:
            return
        batches.wake()
        del batches  # whoever iterates may drop it


def _continue(iterator: Iterator) -> None:
    for worker in iterator._workers:
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGCONT)


def _start(loader: DataLoader) -> Iterator:
    """A loader's iterator, with workers that ignore SIGTERM, torch's and Python's way to end them.

    An error of theirs comes out of ``next``, not of a signal in the midst of something else.
    """
    if loader.num_workers == 0:
        return iter(loader)
    if (loader.multiprocessing_context or multiprocessing).get_start_method() == "forkserver":
        forkserver.ensure_running()  # before the mask, which it would keep
    if loader._iterator is None:  # else its workers live on
        # shared with the workers: whether they shall end, and what each reads
        loader.board = torch.full((1 + loader.num_workers,), -1).share_memory_()
        loader.worker_init_fn = partial(start_worker, loader.board)
    child = signal.getsignal(signal.SIGCHLD)
    # a signal that comes while workers start waits until they ignore it (`start_worker`)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if signal.getsignal(signal.SIGCHLD) is not child:
        signal.signal(signal.SIGCHLD, child or signal.SIG_DFL)
    _running[iterator] = loader.board
    weakref.finalize(iterator, loader.board.fill_, 0)  # ends those that torch's own way doesn't
    # last registered is first run: before torch waits for each worker in turn
    atexit.unregister(_end_all)
    atexit.register(_end_all)
    return iterator


def _end(iterator: Iterator) -> None:
    if iterator not in _running:
        return
    _running.pop(iterator)[0] = 0
    _continue(iterator)  # a stopped one can't end
    iterator._shutdown_workers()
    for worker in iterator._workers:
        if worker.is_alive():  # stuck where only this helps
            worker.kill()


def _end_all() -> None:
    for iterator in list(_running):
        _end(iterator)


def check_limits(item_bytes: int, workers: int, prefetch: int = 2) -> None:
    """Refuse now what would hang or kill data workers later; raise the soft limit of open files.

    Args:
        item_bytes: of what a worker makes at a time: a batch, or a chunk of one.
        workers, prefetch: of a loader.

    Raises:
        UsageError: the shared memory or the files that this process may open don't suffice.
    """
    items = workers * prefetch + 1
    needed = len(os.listdir("/dev/fd")) + OPEN_SHARDS + items * TENSORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise UsageError(
            f"this process may open {hard} files, and reading with {workers} workers takes up to "
            f"{needed}: raise the limit (ulimit -n {needed}) or lower --workers"
        )
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")  # such as 4(x2)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or re.match(r"\d+", tasks)[0])
    if not os.path.isdir(SHM):
        return
    memory, needed = os.statvfs(SHM), item_bytes * items * processes
    free = memory.f_bavail * memory.f_frsize
    if memory.f_blocks and needed > free:
        raise UsageError(
            f"{SHM} has {free / 2**20:.0f} MiB free, and the batches of --workers {workers} take "
            f"{needed / 2**20:.0f} MiB there: enlarge it (docker run --shm-size 8g, or --ipc host) "
            "or lower --workers or --batch-size"
        )
