"""Commands of this project as child processes, which get their signals through their parent.

They are forked from a process that has imported what commands need, and so begin in a second where
each would spend ten on imports.
"""

import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import get_context, set_start_method
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

from training.stopping import SIGNALS, heeded

#: glibc keeps what a step frees for the next one, in place of giving it back and getting fresh
#: pages, which costs more than the step where activations are large.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
#: What makes a process one of several: a child of one of them is alone.
PLACE = ("RANK", "WORLD_SIZE", "SLURM_PROCID")
#: What is imported once for all commands. The first of them keeps signals from ending the server.
IMPORTED = ["training.unmoved", "training.clip.run", "training.classifier.run", "eval.embed"]


def start(command: list[str], threads: int, log: Path | None = None) -> BaseProcess:
    """A command of this project as a process.

    Args:
        command: what follows ``python``: ``-m``, a module, its arguments.
        threads: of it.
        log: the file for what it writes; None: the terminal.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in PLACE}
    own = {**KEEP_MEMORY, "OMP_NUM_THREADS": str(threads)}
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=_run, args=(command, threads, {**inherited, **own}, log))
    with _parent(own):
        process.start()
    return process


def _run(
    command: list[str], threads: int, environment: Mapping[str, str], log: Path | None
) -> None:
    """Be ``python`` with these arguments."""
    os.setsid()  # ctrl-C reaches it through its parent, once
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    set_start_method(None, force=True)  # a loader's workers are forked as ever, from this process
    os.environ.clear()
    os.environ.update(environment)
    if log is not None:
        with open(log, "w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
    import torch  # the server has imported it

    torch.set_num_threads(threads)
    _, module, *sys.argv[1:] = command
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@contextmanager
def _parent(variables: Mapping[str, str]) -> Iterator[None]:
    """What a server takes over: these variables, and not this process's main module."""
    before, main = {name: os.environ.get(name) for name in variables}, sys.modules["__main__"]
    os.environ.update(variables)
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in before.items():  # no others: threads of this process may read them
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def started(pid: int) -> str | None:
    """When a process began, in the kernel's clock; None if there is none, or it has ended.

    It tells a process from a later one of its number.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def end_orphan(pid: int, begin: str | None, patience: float = 20.0) -> None:
    """End a process of this host whose parent has died, letting it save itself.

    Args:
        pid: its number, which another process may have by now.
        begin: when it `started`; None: it had ended.
        patience: seconds that it has before it is killed.
    """
    since = time.monotonic()
    with suppress(ProcessLookupError):
        while begin and started(pid) == begin:
            late = time.monotonic() - since > patience
            os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
            time.sleep(0.5)


@contextmanager
def signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call ``stop`` at each signal that asks this process to end."""
    previous = {number: signal.signal(number, lambda *_: stop()) for number in heeded()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def last_line(text: str) -> str:
    """The last line that is not blank."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "without a word")


def duration(minutes: float) -> str:
    """``40 s``, ``3 min``, ``2 h 05 min``."""
    if minutes < 2:
        return f"{60 * minutes:.0f} s"
    hours, rest = divmod(round(minutes), 60)
    return f"{hours} h {rest:02} min" if hours else f"{rest} min"
