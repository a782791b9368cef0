"""Commands of this project as child processes, which get their signals through their parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
#: glibc keeps what a step frees for the next one, in place of giving it back and getting fresh
#: pages: EfficientNet-Lite2 on 256 images at once, whose activations are large, sees five times as
#: many a second.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
#: What makes a process one of several: a child of one of them is alone.
PLACE = ("RANK", "WORLD_SIZE", "SLURM_PROCID")


def start(command: list[str], threads: int, log: Path | None = None) -> subprocess.Popen:
    """A command of this project as a process.

    Args:
        command: what follows ``python``.
        threads: of it.
        log: the file for what it writes; None: the terminal.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in PLACE}
    environment = {**inherited, **KEEP_MEMORY, "OMP_NUM_THREADS": str(threads)}
    # A session of its own: ctrl-C reaches it through us, once.
    options = {"env": environment, "start_new_session": True}
    if log is None:
        return subprocess.Popen([sys.executable, *command], **options)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as out:
        return subprocess.Popen([sys.executable, *command], stdout=out, stderr=out, **options)


def end_orphan(pid: int, command: list[str], patience: float = 20.0) -> None:
    """End a process of this host whose parent has died, letting it save itself.

    Args:
        pid: its number, which another process may have by now.
        command: what follows ``python`` in its command line.
        patience: seconds that it has before it is killed.
    """
    line, begin = Path(f"/proc/{pid}/cmdline"), time.monotonic()
    with suppress(FileNotFoundError, ProcessLookupError):
        while line.read_bytes().split(b"\0")[1:-1] == [word.encode() for word in command]:
            late = time.monotonic() - begin > patience
            os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
            time.sleep(0.5)


@contextmanager
def signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call ``stop`` at each signal that asks this process to end."""
    previous = {number: signal.signal(number, lambda *_: stop()) for number in SIGNALS}
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
