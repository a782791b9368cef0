"""One writer at a place: who holds its lease writes there, another waits or ends.

A lease is a file that its holder changes every few seconds, which works where locks do not reach
(NFS). It is dead when a reader has seen no change for a minute of its own clock, or at once where
host and process number show it. A holder that was taken for dead and goes on finds the lease to be
another's before its next save, and ends.
"""

import contextlib
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cifd_clip import World
from cifd_clip.files import make_folder, sync_folder
from training.children import started
from training.engine.control import together
from training.errors import Failure, UsageError

log = logging.getLogger(__name__)

#: Seconds between a holder's signs of life, without one until it is dead, and between two looks.
BEAT, DEAD, LOOK = 5.0, 60.0, 0.5


@contextlib.contextmanager
def held(path: Path, world: World, wait: bool = False) -> Iterator["Lease | None"]:
    """Rank 0 holds a lease for all ranks (None on the others) until the block ends.

    Arguments as of `Lease`.

    Raises:
        UsageError: on all ranks, as `Lease`.
    """
    lease = together(world, lambda: Lease(path, wait), only=0)
    try:
        yield lease
    finally:
        if lease is not None:
            lease.release()


class Lease:
    """A lease that this process holds from now until `release`.

    A process of the same SLURM job, such as one that was requeued, waits until the holder is dead.

    Args:
        path: the file.
        wait: whether to wait for any holder.

    Raises:
        UsageError: another process holds it and lives.
    """

    def __init__(self, path: Path, wait: bool = False):
        self.path, self.holder = path, _this_process()
        self._file = self._claim(wait)
        self._released = threading.Event()
        self._life = threading.Thread(target=self._live, daemon=True)
        self._life.start()

    def check(self) -> None:
        """Raise `Failure` when the lease is no longer this process's."""
        holder = _holder(_read(self.path))
        if holder != self.holder:
            raise Failure(
                f"{self.path.parent} is now written by {_name(holder)}, which took this process "
                "for dead: it ends without saving more"
            )

    def release(self) -> None:
        """Let others have it; a folder that holds nothing else goes."""
        self._released.set()
        self._life.join(timeout=BEAT)  # a file system that does not answer may hold it
        if _holder(_read(self.path)) == self.holder:
            self.path.unlink()
            with contextlib.suppress(OSError):  # it holds something
                self.path.parent.rmdir()

    def _claim(self, wait: bool) -> int:
        while True:
            make_folder(self.path.parent)
            try:
                file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
            except FileNotFoundError:  # another one's that was released has just gone
                continue
            except FileExistsError:
                dead = self._wait(wait)
                if dead is None or (file := self._take_over(dead)) is None:
                    continue
            else:
                _write(file, self.holder, 0)
            sync_folder(self.path.parent)
            return file

    def _take_over(self, dead: bytes) -> int | None:
        """The file of this process's lease in a dead one's place; None if another was quicker.

        Who could make the claim, a file that one alone can make, puts it in the dead one's place in
        one step: there is no moment without a lease.
        """
        claim = self.path.with_name(f"{self.path.name}.claim")
        try:
            file = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        except FileNotFoundError:  # the folder has just gone
            return None
        except FileExistsError:
            _await_end(claim)
            return None
        if _read(self.path) != dead:
            os.close(file)
            claim.unlink(missing_ok=True)
            return None
        _write(file, self.holder, 0)
        try:
            claim.rename(self.path)
        except FileNotFoundError:  # it stood still for a minute, and was taken for dead
            os.close(file)
            return None
        return file

    def _live(self) -> None:
        # This file and no other: after a takeover these signs of life reach nobody.
        beat = 0
        while not self._released.wait(BEAT):
            beat += 1
            with contextlib.suppress(OSError):
                _write(self._file, self.holder, beat)
        os.close(self._file)

    def _wait(self, for_any: bool) -> bytes | None:
        """Until the lease was released, or its holder is dead: then what it holds.

        Raises:
            UsageError: the holder lives, and is of no earlier run of the same job.
        """
        seen, since, job = None, time.monotonic(), self.holder["job"]
        while (content := _read(self.path)) is not None:
            holder, now = _holder(content), time.monotonic()
            if _is_gone(holder) or (content == seen and now - since > DEAD):
                return content
            if seen is None:
                log.info("%s: %s may still write here", self.path.parent, _name(holder))
            elif content != seen and holder and not (for_any or (job and holder["job"] == job)):
                raise UsageError(
                    f"{self.path.parent} is being written by {_name(holder)}: wait for it or stop "
                    "it, or choose another --name"
                )
            if content != seen:
                seen, since = content, now
            time.sleep(LOOK)
        return None


def _await_end(claim: Path) -> None:
    """Until a claim was decided; one that is there for a minute was made by one that then died."""
    since = time.monotonic()
    while claim.exists():
        if time.monotonic() - since > DEAD:
            claim.unlink(missing_ok=True)
        time.sleep(LOOK)


def _this_process() -> dict[str, Any]:
    """What tells a process from others."""
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "system": _system(),
        "job": os.environ.get("SLURM_JOB_ID"),
    }


def _system() -> str | None:
    """Where process numbers are comparable: one boot of a machine, one container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether host and process number show that a holder has ended."""
    here = holder.get("system") is not None and holder["system"] == _system()
    return here and started(holder["pid"]) != holder["started"]


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    job = f" (job {holder['job']})" if holder["job"] else ""
    return f"process {holder['pid']} on {holder['host']}{job}"


def _write(file: int, holder: dict[str, Any], beat: int) -> None:
    os.pwrite(file, json.dumps({**holder, "beat": f"{beat:012}"}).encode(), 0)
    os.fdatasync(file)


def _read(path: Path) -> bytes | None:
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()  # opened anew: so NFS asks its server
    return None


def _holder(content: bytes | None) -> dict[str, Any]:
    """Whose a lease is; empty if it was just made, or is not there."""
    try:
        holder = json.loads(content or b"{}")
    except ValueError:
        return {}
    holder.pop("beat", None)
    return holder
