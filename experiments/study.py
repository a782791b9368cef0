"""Studies: runs that need each other, executed side by side, and the results kept of them.

A run is one command of this project with a directory of its own under the study's logs. There,
`study.json` says what it was started with and `finished.json` that it has ended: a study that was
stopped goes on where it was. A run whose result is kept is executed again only when another run
needs what it left in the logs.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from cifd_clip.files import read_json, write_json, write_text
from training.children import duration, last_line, signals, start
from training.engine.environment import origin
from training.engine.flags import CommandLine
from training.engine.run import read_metrics
from training.errors import Failure, Stopped, UsageError

FORMAT = 1  # of study.json
#: Exit code of a run, and of a study, that was asked to stop and can go on.
STOPPED = Stopped.exit_code


def command_line(module: str, doc: str) -> argparse.ArgumentParser:
    """The parser of a module's command, described by the module's docstring."""
    text = re.sub("^``.*``: ", "", doc)
    return CommandLine(module, text[0].upper() + text[1:])


@dataclass(frozen=True)
class Run:
    """One command.

    Attributes:
        flags: its settings, in which ``{NAME}`` is the directory of a run that it needs. In them
            and in `where`, ``{here}`` is its own directory, ``{name}`` its name, ``{data}`` and
            ``{logs}`` are the study's.
        where: flags that change nothing about the result.
        results: of each result that it leaves, what its file's name ends in: ``resultX.json`` in
            its directory is kept as ``NAMEX.json``.
        cost: about how many minutes of a core it takes.
    """

    name: str
    module: str
    flags: tuple[str, ...]
    where: tuple[str, ...] = ()
    results: tuple[str, ...] = ()
    cost: float = 1.0

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of the runs whose files it reads."""
        return tuple(dict.fromkeys(re.findall(r"\{([\w.-]+)\}", " ".join(self.flags))))


def priorities(runs: Iterable[Run]) -> dict[str, float]:
    """The cost of a run and of the longest chain of runs that waits for it, of runs in order."""
    longest: dict[str, float] = {}
    waiting: Counter = Counter()
    for run in reversed(list(runs)):
        longest[run.name] = run.cost + waiting[run.name]
        for need in run.needs:
            waiting[need] = max(waiting[need], longest[run.name])
    return longest


class Study:
    """Runs in their directories.

    Args:
        runs: each after those it needs.
        logs: the parent of the run directories.
        data: what ``{data}`` stands for.
        results: where results are kept, in `runs/`; without it every run is wanted for itself.
        keep: called with the study and a finished run, to keep its results.
    """

    def __init__(
        self,
        runs: Iterable[Run],
        logs: Path,
        data: Path = Path(),
        results: Path | None = None,
        keep: Callable[["Study", Run], None] = lambda study, run: None,
    ):
        self.runs = {run.name: run for run in runs}
        self.logs, self.data, self.results, self.keep = logs, data, results, keep

    def command(self, run: Run) -> list[str]:
        """The command line of a run, after ``python``."""
        places = {name: self.logs / name for name in run.needs} | {"here": self.logs / run.name}
        places |= {"name": run.name, "data": self.data, "logs": self.logs}
        words = ["-m", run.module, *run.where, *run.flags]
        for name, place in places.items():
            words = [word.replace(f"{{{name}}}", str(place)) for word in words]
        return words

    def spelled(self, run: Run) -> str:
        """The command of a run as a user types it."""
        return shlex.join(["python", *self.command(run)])

    def kept(self, run: Run) -> dict[str, Path]:
        """Where the results of a run are kept, by the names of their files in its directory."""
        folder = (self.results or Path()) / "runs"
        return {f"result{end}.json": folder / f"{run.name}{end}.json" for end in run.results}

    def has_results(self, run: Run) -> bool:
        """Whether its results are kept, in a study that keeps any."""
        return bool(self.results) and all(path.is_file() for path in self.kept(run).values())

    def finished(self, run: Run) -> bool:
        """Whether its directory holds all it was for."""
        return all((self.logs / run.name / f).is_file() for f in ("study.json", "finished.json"))

    def outstanding(self) -> list[Run]:
        """The runs to execute: those that are wanted, and those whose files they need."""
        todo: list[Run] = []
        needed: set[str] = set()
        for run in reversed(self.runs.values()):  # those that need it before it
            wanted = run.name in needed or not self.has_results(run)
            if wanted and not self.finished(run):
                todo.insert(0, run)
                needed.update(run.needs)
        return todo

    def check(self) -> None:
        """Refuse results and runs that were made with other settings than these.

        Raises:
            UsageError: naming them.
        """
        stale = []
        for run in self.runs.values():
            versions = {path: None for path in self.kept(run).values()}
            versions[self.logs / run.name / "study.json"] = FORMAT
            for path, version in versions.items():
                if path.is_file() and read_json(path, version)["flags"] != list(run.flags):
                    stale.append(str(path))
        if stale:
            raise UsageError(
                f"{', '.join(stale[:3])}{' ...' * (len(stale) > 3)} ({len(stale)} in all) were "
                "made with other settings than this study has now: move the results away, and "
                "their runs in --logs, to make them again"
            )

    def complete(self) -> str | None:
        """If every result is kept already, a sentence that says so.

        With nothing to do, a study would look like one that has just made its table.
        """
        if not all(map(self.has_results, self.runs.values())):
            return None
        count = sum(len(run.results) for run in self.runs.values())
        return (
            f"all {count} results are in {self.results} already; to make them again, give another "
            "--results, and another --logs if it has their runs"
        )

    def dry_run(self) -> None:
        """Print the commands that are left, and about how long they take."""
        self.check()
        if sentence := self.complete():
            print(f"# {sentence}")
            return
        todo, minutes = self.outstanding(), Counter()
        for run in todo:
            print(self.spelled(run))
            minutes[run.module] += run.cost
        parts = ", ".join(f"{module} {cost:.0f}" for module, cost in minutes.items())
        print(f"# {len(todo)} runs, about {minutes.total():.0f} core-minutes: {parts}")

    def execute(self, jobs: int, threads: int = 1, show: bool = False) -> bool:
        """Execute what is left, and keep the results of what is finished.

        Args:
            jobs: runs at a time.
            threads: of each run.
            show: let the runs write to the terminal, not to ``NAME.log`` in the logs.

        Returns:
            Whether all are finished; False after a signal.

        Raises:
            Failure: one failed; the others under way were stopped with a checkpoint.
            UsageError: see `check`.
        """
        self.check()
        for run in filter(self.finished, self.runs.values()):
            self.keep(self, run)
        return _Execution(self, max(1, jobs), threads, show).side_by_side()

    def begin(self, run: Run, commit: str | None) -> None:
        content = {"command": self.spelled(run), "commit": commit, "flags": list(run.flags)}
        write_json(self.logs / run.name / "study.json", content, FORMAT)

    def end(self, run: Run, seconds: float) -> None:
        """Mark the end of a run, where its command does not, and keep its results."""
        if not self.finished(run):
            write_json(self.logs / run.name / "finished.json", {"seconds": seconds})
        self.keep(self, run)


class _Execution:
    """The outstanding runs of a study, those with the longest chains behind them first."""

    def __init__(self, study: Study, jobs: int, threads: int, show: bool):
        self.study, self.jobs, self.threads, self.show = study, jobs, threads, show
        self.chain = priorities(study.runs.values())
        self.waiting = sorted(study.outstanding(), key=lambda run: -self.chain[run.name])
        self.total = len(self.waiting)
        self.active: dict[BaseProcess, tuple[Run, float]] = {}
        self.minutes = self.cost = 0.0  # spent on what is finished, and expected of it
        self.signals = self.passed = 0  # received, and passed on to the runs
        self.commit = origin()["commit"]
        if self.waiting and (self.commit or "").endswith("-dirty"):
            print("note: the checkout has changes that are not committed, and results will say so")

    def side_by_side(self) -> bool:
        with signals(self._count):
            try:
                while (self.waiting and not self.signals) or self.active:
                    self._start_ready()
                    time.sleep(0.2)  # in which one that has just begun learns to listen
                    self._pass_on()
                    for process in [p for p in self.active if p.exitcode is not None]:
                        self._ended(process, *self.active.pop(process))
            except BaseException:
                self._count()
                while any(process.is_alive() for process in self.active):
                    time.sleep(0.2)
                    self._pass_on()
                raise
        return not self.waiting

    def _count(self) -> None:
        self.signals += 1

    def _pass_on(self) -> None:
        """Let the runs save themselves; at a second signal, end them."""
        while self.passed < self.signals:
            self.passed += 1
            for process in self.active:
                process.terminate() if self.passed == 1 else process.kill()

    def _start_ready(self) -> None:
        undone = {run.name for run in [*self.waiting, *(run for run, _ in self.active.values())]}
        for run in [run for run in self.waiting if undone.isdisjoint(run.needs)]:
            if self.signals or len(self.active) >= self.jobs:
                return
            self.waiting.remove(run)
            self.study.begin(run, self.commit)
            if self.show:
                say(self.study.spelled(run))
            process = start(self.study.command(run), self.threads, self._log(run))
            self.active[process] = run, time.monotonic()

    def _log(self, run: Run) -> Path | None:
        return None if self.show else self.study.logs / f"{run.name}.log"

    def _ended(self, process: BaseProcess, run: Run, begin: float) -> None:
        if process.exitcode == STOPPED or (process.exitcode and self.signals):
            self.waiting.append(run)
            self.signals, self.passed = max(1, self.signals), max(1, self.passed)
        elif process.exitcode:
            log = self._log(run)
            why = f": {last_line(log.read_text())} ({log})" if log else "; its message is above"
            raise Failure(f"{run.name} failed{why}")
        else:
            self._finished(run, begin)

    def _finished(self, run: Run, begin: float) -> None:
        """Keep its results, and print the progress and the time left at the pace so far."""
        minutes = (time.monotonic() - begin) / 60
        self.study.end(run, 60 * minutes)
        self.minutes, self.cost = self.minutes + minutes, self.cost + run.cost
        left = [*self.waiting, *(run for run, _ in self.active.values())]
        text = f"{time.strftime('%H:%M')} {run.name} is finished after {duration(minutes)}"
        if left:
            shared = sum(run.cost for run in left) / self.jobs
            longest = max(self.chain[run.name] for run in left)
            rest = duration(max(shared, longest) * self.minutes / self.cost)
            text += f"; {len(left)} of {self.total} to go, about {rest}"
        print(text, flush=True)


def output(module: str, *arguments: str) -> str:
    """What a command writes to stdout.

    Raises:
        Failure: it failed; with its last line.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"python -m {module} failed: {last_line(done.stderr)}")
    return done.stdout


def say(text: str) -> None:
    """A line of the study's own among those of its runs."""
    print(f"\n\033[1m▸ {text}\033[0m" if sys.stdout.isatty() else f"\n> {text}", flush=True)


def read_results(results: Path) -> dict[str, dict[str, Any]]:
    """Every kept result by its name, in the order of the names."""
    return {path.stem: read_json(path) for path in sorted((results / "runs").glob("*.json"))}


def write_result(path: Path, content: Any) -> None:
    """Write a kept result, or what is made of them."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def curve(directory: Path, keys: Iterable[str]) -> dict[str, list]:
    """Some columns of a run's training log; those it does not have are left out."""
    lines = [line for line in read_metrics(directory) if line["kind"] == "train"]
    columns = {key: [line.get(key) for line in lines] for key in keys}
    return {key: values for key, values in columns.items() if any(values)}
