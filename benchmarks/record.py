"""What every measurement is saved with, so that it can be judged and repeated."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "torchvision", "open_clip_torch", "webdataset", "pillow", "numpy")


def circumstances(seed: int) -> dict:
    """Hardware, versions, commit, command and seed."""
    return {
        "hardware": hardware(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "seed": seed,
    }


def hardware() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def commit() -> str:
    """The commit measured, with ``+`` when the tree differs from it."""
    here = Path(__file__).parent
    run = lambda *args: subprocess.run(args, capture_output=True, text=True, cwd=here).stdout  # noqa: E731
    changed = run("git", "status", "--porcelain", "--untracked-files=no").strip()
    return run("git", "rev-parse", "--short", "HEAD").strip() + ("+" if changed else "")


def save(path: str | os.PathLike, result: dict) -> None:
    """Write a result as JSON."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=2) + "\n")
