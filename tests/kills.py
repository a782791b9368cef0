"""``python -m tests.kills``: kill a run again and again, and compare with an undisturbed one.

A run that saves after every step is killed with SIGKILL at random moments, then once inside every
operation that makes a checkpoint durable (each write, sync, rename and removal), and is made to run
out of disk. It must always resume, lose no more than the steps since the last save, and end with
the same bits. So must what a power cut at a random moment leaves on its disk (where an image can be
mounted), and a run that is started twice at once. One whose checkpoints were purged must not begin
again. Children are forked from a process that has imported everything, so that one kill costs about
a second.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
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
from tests.disk import after_a_power_cut, disk, lacking, stopped
from training.engine import lease
from training.errors import Failure
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
            except Failure as error:
                code = error.exit_code
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
    newest = final(run)
    return newest["progress"]["step"] if newest else 0


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


class Story:
    """What happens to the runs of one data set, and what went wrong.

    Args:
        folder: to work in.
        rng: of the moments.
    """

    def __init__(self, folder: Path, rng: random.Random):
        write(folder / "scenes", train=96, val=30, scenes=12)
        self.folder, self.rng, self.problems = folder, rng, []
        self.data, self.logs = folder / "scenes" / "train", folder / "logs"
        start = time.monotonic()
        if wait(child(command(self.data, self.logs, "whole"))) != 0:
            sys.exit("the undisturbed run failed")
        self.duration = time.monotonic() - start
        self.whole = final(self.logs / "whole")

    def some_time(self) -> None:
        """Let a random part of a run's time pass."""
        time.sleep(self.rng.uniform(0.1, 0.9) * self.duration)

    def expect(self, holds: bool, what: str) -> None:
        """Note what went wrong, unless it holds."""
        if not holds:
            self.problems.append(what)

    def ends_well(self, logs: Path, name: str) -> None:
        """The run goes on to its end, with the same bits."""
        code = wait(child(command(self.data, logs, name)))
        self.expect(code == 0, f"{name}: ended with code {code}")
        self.expect(same_bits(final(logs / name), self.whole), f"{name}: other final weights")

    def power_cuts(self, count: int) -> int:
        """Cut the power of runs at random moments, and when they have just ended."""
        cuts = 0
        while cuts < count and not self.problems:
            with disk(self.folder / "disk") as root:
                name, ended = f"cut{cuts}", False
                pid = child(command(self.data, root, name))
                while not ended:
                    self.some_time()
                    os.kill(pid, signal.SIGSTOP)
                    stopped(pid)
                    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                    latest = root / name / "checkpoints" / "latest.json"
                    saved = json.loads(latest.read_text())["step"] if latest.exists() else 0
                    with after_a_power_cut(self.folder / "disk", self.folder / "copy") as left:
                        after = saved_step(left / name)
                        self.expect(after >= saved, f"{name}: step {saved} was saved, not {after}")
                        there = left / name / "finished.json"
                        self.expect(there.exists() or not ended, f"{name}: the end was forgotten")
                        self.ends_well(left, name)
                    cuts += 1
                    os.kill(pid, signal.SIGCONT)
                wait(pid)
            shutil.rmtree(self.folder / "disk")
        return cuts

    def pairs(self, count: int) -> int:
        """Start runs twice at once."""
        for number in range(count):
            name = f"pair{number}"
            first = child(command(self.data, self.logs, name))
            time.sleep(self.rng.choice((0, self.rng.uniform(0, self.duration))))
            codes = sorted(map(wait, (first, child(command(self.data, self.logs, name)))))
            self.expect(codes in ([0, 2], [0, 0]), f"{name}: ended with codes {codes}")
            run = self.logs / name
            for manifest in run.glob(MANIFESTS):
                problem = checkpoint._problem(manifest.with_suffix(".pt"), manifest)
                self.expect(problem is None, f"{name}: {problem}")
            self.expect(same_bits(final(run), self.whole), f"{name}: other final weights")
        return count

    def purges(self, count: int) -> int:
        """Take a run's checkpoints away, or some of their files, and bring them back."""
        patterns = ("*", "step_*.json", "*.pt")
        for number in range(count):
            run, pattern = self.logs / f"purged{number}", patterns[number % len(patterns)]
            while not saved_step(run):
                pid = child(command(self.data, self.logs, run.name))
                self.some_time()
                os.kill(pid, signal.SIGKILL)
                wait(pid)
            copy, metrics = self.folder / "kept", (run / "metrics.jsonl").read_bytes()
            (run / "finished.json").unlink(missing_ok=True)
            shutil.copytree(run / "checkpoints", copy)
            for path in (run / "checkpoints").glob(pattern):
                path.unlink()
            code = wait(child(command(self.data, self.logs, run.name)))
            self.expect(code == 1, f"{run.name}, without {pattern}: ended with code {code}")
            self.expect((run / "metrics.jsonl").read_bytes() == metrics, f"{run.name}: lost lines")
            shutil.rmtree(run / "checkpoints")
            copy.rename(run / "checkpoints")
            self.ends_well(self.logs, run.name)
        return count


def final(run: Path) -> dict | None:
    """The content of its newest checkpoint."""
    newest = checkpoint.Checkpoints(run / "checkpoints").newest()
    return newest and newest[1]


def main() -> int:
    """Run the story; 0 when every kill was survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="at least so many")
    parser.add_argument("--others", type=int, default=20, help="power cuts, pairs and purges each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Nobody waits a minute here for one that was stopped.
    lease.BEAT, lease.DEAD, lease.LOOK = 0.1, 1.0, 0.02
    kills, disasters = {"random": 0, "writing": 0}, []
    with tempfile.TemporaryDirectory() as temporary:
        story = Story(Path(temporary), random.Random(args.seed))
        data, logs, problems = story.data, story.logs, story.problems
        last_step = saved_step(logs / "whole")
        others = {
            "power_cuts": 0 if lacking() else story.power_cuts(args.others),
            "pairs": story.pairs(args.others),
            "purges": story.purges(args.others),
        }

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
                    story.some_time()
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
                story.expect(same_bits(final(run), story.whole), f"{name}: other final weights")
    counts = {"kills": kills, "runs": number, "full_disks": len(disasters), **others}
    print(json.dumps({**counts, "seed": args.seed, "problems": problems}))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
