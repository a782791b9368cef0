"""A disk of its own, and what a power cut would leave on it."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOOLS = ("mkfs.ext4", "mount", "umount")


def lacking() -> str:
    """Why this machine can't mount a disk image; nothing if it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if os.geteuid() or missing or not Path("/dev/loop-control").exists():
        return f"needs root, a loop device and {', '.join(missing or TOOLS)}"
    return ""


@contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """A new ext4 file system; by itself it writes nothing to its image within the test."""
    folder.mkdir()
    with open(folder / "image", "wb") as file:
        file.truncate(96 << 20)
    subprocess.run(["mkfs.ext4", "-q", folder / "image"], check=True)
    with mounted(folder, "commit=300") as root:
        yield root


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """The image in a folder, mounted there."""
    root = folder / "root"
    root.mkdir()
    options = ",".join(("loop", *options))
    subprocess.run(["mount", "-o", options, folder / "image", root], check=True)
    try:
        yield root
    finally:
        subprocess.run(["umount", root], check=True)


@contextmanager
def after_a_power_cut(folder: Path, copy: Path) -> Iterator[Path]:
    """What would be on the disk if the power failed now: its image as it is, mounted elsewhere.

    No process may write meanwhile.
    """
    copy.mkdir()
    subprocess.run(["cp", "--sparse=always", folder / "image", copy / "image"], check=True)
    with mounted(copy) as root:
        yield root
    shutil.rmtree(copy)


def stopped(pid: int) -> None:
    """Wait until a process that was sent SIGSTOP, and its system calls, have stopped."""
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "TZ":
        time.sleep(0.001)
