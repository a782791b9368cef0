"""``python -m tests.kills``: kill a run again and again, and compare with an undisturbed one.

A run that saves after every step is killed with SIGKILL at random moments, then once inside every
operation that makes a checkpoint durable (each write, sync, rename and removal), and is made to run
out of disk. It must always resume, lose no more than the steps since the last save, and end with
the same bits. Children are forked from a process that has imported everything, so that one kill
costs about a second.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

import training.clip.run  # noqa: F401  (imported before the fork, not by each child)
import training.engine.checkpoint as checkpoint
from demo.scenes import write
from training.main import main as train

ROOT = Path(__file__).parent.parent
MANIFESTS = "checkpoints/step_*.json"


def command(data: Path, logs: Path, name: str) -> list[str]:
    """Three short epochs of a tiny student, a checkpoint after every step, two kept."""
    return [
        *("--train-data", str(data), "--logs", str(logs), "--name", name, "--device", "cpu"),
        *("--model-config", str(ROOT / "tests/models/tiny-student.json")),
        *("--model", "tiny-student", "--batch-size", "24", "--epochs", "3", "--workers", "0"),
        *("--save-every-n-steps", "1", "--keep", "2", "--resume", "latest", "--precision", "fp32"),
    ]


def child(argv: list[str], sabotage=None) -> int:
    """Run training in a forked child; its wait status."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
        code = 99
        with contextlib.suppress(SystemExit):
            try:
                if sabotage:
                    sabotage()
                code = train(argv)
            except BaseException:
                code = 98
        os._exit(code)
    return pid


def wait(pid: int) -> int:
    """Exit code of a child, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(operation: int):
    """Kill this process just before the given operation that makes a checkpoint durable."""

    def arm() -> None:
        count = 0

        def counted(function):
            def wrapper(*args, **kwargs):
                nonlocal count
                if threading.current_thread() is threading.main_thread():
                    return function(*args, **kwargs)  # checkpoints are written by another
                if count == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return function(*args, **kwargs)

            return wrapper

        checkpoint._Hashing.write = counted(checkpoint._Hashing.write)
        os.fsync = counted(os.fsync)
        for name in ("rename", "unlink"):
            setattr(Path, name, counted(getattr(Path, name)))

    return arm


def small_disk() -> None:
    """No file of this process may grow beyond 100 kB: a checkpoint doesn't fit."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def saved_step(run: Path) -> int:
    """The newest step whose checkpoint is whole."""
    found = checkpoint.Checkpoints(run / "checkpoints").newest()
    return found[1]["progress"]["step"] if found else 0


def same_bits(a, b) -> bool:
    """Whether two checkpoints hold the same state, wall time aside."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            same_bits(a[k], b[k]) for k in a if k not in ("seconds", "cpu_seconds", "name")
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b


def main() -> int:
    """Run the story; 0 when every kill was survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="at least so many")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    kills, problems, disasters = {"random": 0, "writing": 0}, [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder / "scenes", train=96, val=30, scenes=12)
        data, logs = folder / "scenes" / "train", folder / "logs"
        start = time.monotonic()
        if wait(child(command(data, logs, "whole"))) != 0:
            print("the undisturbed run failed")
            return 1
        duration = time.monotonic() - start
        whole = torch.load(next(iter(sorted((logs / "whole").rglob("*.pt"))[::-1])))
        last_step = saved_step(logs / "whole")

        def check(name: str, before: int, what: str) -> None:
            after = saved_step(logs / name)
            if after < before:
                problems.append(f"{what}: went back from step {before} to {after}")

        def full_disk_and_truncation(name: str) -> None:
            before = saved_step(logs / name)
            if wait(child(command(data, logs, name), small_disk)) in (0, 75):
                problems.append(f"{name}: a full disk went unnoticed")
            check(name, before, f"{name}, a full disk")
            newest = sorted((logs / name).glob(MANIFESTS))[-1].with_suffix(".pt")
            newest.write_bytes(newest.read_bytes()[:5000])
            check(name, before - 1, f"{name}, a truncated file")
            disasters.append(name)

        number, operation = 0, 0
        while sum(kills.values()) < args.kills and not problems:
            name, number = f"run{number}", number + 1
            run, code = logs / name, None
            while code != 0 and not problems:
                before = saved_step(run)
                if kills["random"] <= kills["writing"]:
                    pid = child(command(data, logs, name))
                    time.sleep(rng.uniform(0.1, 0.9) * duration)
                    os.kill(pid, signal.SIGKILL)
                    code, kind = wait(pid), "random"
                else:
                    code, kind = (
                        wait(child(command(data, logs, name), kill_at(operation))),
                        "writing",
                    )
                    # Through every operation of the first save and on into the next ones.
                    operation = operation + 1 if code == -signal.SIGKILL else 0
                if code == -signal.SIGKILL:
                    kills[kind] += 1
                elif code != 0:
                    problems.append(f"{name}: ended with code {code}")
                check(name, before, f"{name}, a kill ({kind})")
                # Once its last step is saved, a run may have nothing large left to write; and where
                # its only checkpoint is damaged, it does not go on by itself.
                saved, due = len(list(run.glob(MANIFESTS))), name not in disasters and code != 0
                if due and saved > 1 and saved_step(run) < last_step:
                    full_disk_and_truncation(name)
            if not problems:
                final = checkpoint.Checkpoints(run / "checkpoints").newest()
                if not same_bits(final[1], whole):
                    problems.append(f"{name}: other final weights than the undisturbed run")
    story = {"kills": kills, "runs": number, "full_disks": len(disasters), "seed": args.seed}
    print(json.dumps({**story, "problems": problems}))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
