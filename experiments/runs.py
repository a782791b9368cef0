"""Studies: runs that need each other, made side by side, and what is kept of them.

A run is one command of this project with a directory of its own under ``--logs``, where
``finished.json`` marks its end. Stopped, a study goes on where it was. A run with a kept result is
made again only when another run needs what it left in ``--logs``.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.engine.control import SIGNALS, STOPPED_EXIT
from training.errors import Failure, UsageError

#: The environment of a run on one core. glibc keeps what a step frees for the next one, in place of
#: giving it back and getting fresh pages: a teacher of CIFAR-100 trains some 6 % faster.
ONE_CORE = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
}


@dataclass(frozen=True)
class Run:
    """One command.

    Attributes:
        name: its directory and its result's file.
        module: what runs.
        flags: its settings. In them and in `where`, ``{NAME}`` is the directory of a run that it
            needs, ``{here}`` its own, ``{name}`` its name, ``{data}`` and ``{logs}`` the study's.
        needs: the runs whose files it reads.
        results: the files of results it leaves, ``resultX.json``; kept as ``NAMEX.json``.
        cost: about how long it takes.
        where: flags that change nothing about the result.
        settings: what its result depends on, if that is more than its flags.
        about: what it is a run of, for who reads its result.
    """

    name: str
    module: str
    flags: tuple[str, ...]
    needs: tuple[str, ...] = ()
    results: tuple[str, ...] = ()
    cost: float = 1.0
    where: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)

    def command(self, data: Path, logs: Path) -> list[str]:
        """The command line after ``python``."""
        places = {need: logs / need for need in self.needs}
        places |= {"here": logs / self.name, "name": self.name, "data": data, "logs": logs}
        return ["-m", self.module, *(_filled(flag, places) for flag in (*self.where, *self.flags))]

    def kept(self, results: Path) -> dict[str, Path]:
        """Its result files by the name they are kept under."""
        return {file: results / "runs" / f"{self.name}{file[6:]}" for file in self.results}

    @property
    def depends(self) -> list[str]:
        """What its result is refused without: `settings`, or its flags."""
        return list(self.settings or self.flags)


def _filled(flag: str, places: dict[str, Any]) -> str:
    for name, place in places.items():
        flag = flag.replace(f"{{{name}}}", str(place))
    return flag


def is_finished(run: Run, logs: Path) -> bool:
    """Whether its directory holds all it was for."""
    return (logs / run.name / "finished.json").is_file()


def outstanding(runs: list[Run], logs: Path, results: Path) -> list[Run]:
    """The runs to make: those without a result, and those whose files they need."""
    by_name = {run.name: run for run in runs}
    todo: dict[str, Run] = {}

    def want(run: Run) -> None:
        if run.name not in todo and not is_finished(run, logs):
            todo[run.name] = run
            for name in run.needs:
                want(by_name[name])

    for run in runs:
        if run.results and not all(path.is_file() for path in run.kept(results).values()):
            want(run)
    return [run for run in runs if run.name in todo]


def all_there(runs: list[Run], results: Path) -> str | None:
    """If every result is kept already, a sentence that says so.

    A study with nothing to do would otherwise look like one that has made its table just now.
    """
    kept = [path for run in runs for path in run.kept(results).values()]
    if not all(path.is_file() for path in kept):
        return None
    return (
        f"all {len(kept)} results are in {results} already; to make them again, give another "
        "--results, and another --logs if it has their runs"
    )


def check_settings(runs: list[Run], results: Path) -> None:
    """Refuse results that were made with other settings than these.

    Raises:
        UsageError: naming them.
    """
    stale = [
        path
        for run in runs
        for path in run.kept(results).values()
        if path.is_file() and json.loads(path.read_text())["flags"] != run.depends
    ]
    if stale:
        raise UsageError(
            f"{', '.join(map(str, stale[:3]))}{' ...' * (len(stale) > 3)} ({len(stale)} results) "
            "were made with other settings than this study has now: move them away, "
            "and their runs in --logs, to make them again"
        )


def write_json(path: Path, content: Any) -> None:
    """Write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    temporary.rename(path)


def curve(directory: Path, keys: tuple[str, ...]) -> dict[str, list]:
    """Some columns of a run's training log; those it does not have are left out."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    found = {key: [line.get(key) for line in train] for key in keys}
    return {key: values for key, values in found.items() if any(values)}


def priorities(runs: list[Run]) -> dict[str, float]:
    """How long what waits for a run takes, itself included: those with most come first."""
    longest: dict[str, float] = {}
    for run in reversed(runs):
        after = [longest[r.name] for r in runs if run.name in r.needs]
        longest[run.name] = run.cost + max(after, default=0)
    return longest


class Queue:
    """Runs as processes of one thread each, some at a time, in the order they depend on.

    Args:
        runs: what to make.
        data, logs: directories.
        jobs: how many at a time; 0: one after the other in this process.
        keep: called with each run that is finished.
    """

    def __init__(
        self, runs: list[Run], data: Path, logs: Path, jobs: int, keep: Callable[[Run], None]
    ):
        first = priorities(runs)
        self.waiting = sorted(runs, key=lambda run: -first[run.name])
        self.data, self.logs, self.jobs, self.keep = data, logs, jobs, keep
        self.active: dict[subprocess.Popen, tuple[Run, float]] = {}
        self.stopped = False

    def run(self) -> bool:
        """Make them all.

        Returns:
            Whether all are finished; False after a signal.

        Raises:
            Failure: one failed; the others under way were stopped with a checkpoint.
        """
        return self._run_processes() if self.jobs else self._run_here()

    def _run_here(self) -> bool:
        while self.waiting:
            run, start = self.waiting[0], time.monotonic()
            _, module, *flags = run.command(self.data, self.logs)
            code = importlib.import_module(module).main(flags) or 0
            if code == STOPPED_EXIT:
                return False
            if code:
                raise Failure(f"{run.name} failed; its message is above")
            self._finished(self.waiting.pop(0), start)
        return True

    def _run_processes(self) -> bool:
        previous = {s: signal.signal(s, self._stop) for s in (*SIGNALS, signal.SIGINT)}
        try:
            while (self.waiting and not self.stopped) or self.active:
                self._start_ready()
                time.sleep(0.5)
                for process in [p for p in self.active if p.poll() is not None]:
                    self._ended(process, *self.active.pop(process))
        except Failure:
            self._stop()
            for process in self.active:
                process.wait()
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return not self.waiting

    def _stop(self, *_) -> None:
        self.stopped = True
        for process in self.active:
            process.terminate()

    def _start_ready(self) -> None:
        undone = {run.name for run in [*self.waiting, *(run for run, _ in self.active.values())]}
        for run in [r for r in self.waiting if undone.isdisjoint(r.needs)]:
            if self.stopped or len(self.active) >= self.jobs:
                return
            self.waiting.remove(run)
            command = [sys.executable, *run.command(self.data, self.logs)]
            environment = {**os.environ, **ONE_CORE}
            self.logs.mkdir(parents=True, exist_ok=True)
            with open(self.logs / f"{run.name}.err", "w") as errors:
                # A group of its own: Ctrl-C reaches it through us, once.
                process = subprocess.Popen(
                    command, stdout=errors, stderr=errors, env=environment, process_group=0
                )
            self.active[process] = run, time.monotonic()

    def _ended(self, process: subprocess.Popen, run: Run, start: float) -> None:
        if process.returncode == STOPPED_EXIT or (process.returncode and self.stopped):
            self.waiting.append(run)
            self.stopped = True
            return
        if process.returncode:
            said = (self.logs / f"{run.name}.err").read_text().splitlines()
            raise Failure(f"{run.name} failed: {said[-1] if said else process.returncode}")
        self._finished(run, start)

    def _finished(self, run: Run, start: float) -> None:
        """Mark the end of a command that leaves no mark of its own, and keep its result."""
        if not is_finished(run, self.logs):
            seconds = time.monotonic() - start
            write_json(self.logs / run.name / "finished.json", {"seconds": seconds})
        self.keep(run)
        left = len(self.waiting) + len(self.active)
        print(f"{time.strftime('%H:%M')} {run.name} is finished; {left} to go", flush=True)
