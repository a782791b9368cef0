"""The queue of a study: Optuna's journal, from which several processes claim runs.

Every run is a trial of Optuna: those of a row's weights in a study of the row's name, those of its
new seeds in another. Each study wants a run of every number; whoever claims one first queues those
that are neither queued nor under way nor finished. So a run that was stopped, or whose process has
died, is queued again under its number and goes on from its checkpoint.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cifd_clip.files import BadFile
from training.children import end_orphan, started
from training.tuning.plan import Plan, Row

SILENT = 60.0  # seconds after which another worker without a heartbeat counts as dead


class Studies(NamedTuple):
    """Of a row, as `optuna.study.Study`."""

    trials: Any
    final: Any
    """The best weights under new seeds."""


class Claim(NamedTuple):
    """A run that this process has taken."""

    row: Row
    study: Any
    trial: Any
    final: bool
    """Whether its weights are the best, and its seed new."""

    @property
    def number(self) -> int:
        """Which of its study's runs it is, from 0, however often it was queued."""
        return self.trial.user_attrs["number"]


class Queue:
    """The runs of a study.

    Args:
        plan: the study; its folder is there.
        optuna: the package, which takes a second to import.

    Attributes:
        studies: by row.
    """

    def __init__(self, plan: Plan, optuna: Any):
        self.plan, self.optuna = plan, optuna
        self.states = optuna.trial.TrialState
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{started(os.getpid())}"
        self._seen: dict[str, tuple[float, float]] = {}  # others' heartbeats, and since when
        self._workers = plan.folder / "workers"
        self._workers.mkdir(exist_ok=True)
        self.beat()
        path, journal = plan.folder / "journal.log", optuna.storages.journal
        lock = journal.JournalFileSymlinkLock(str(path))
        _forget_half_a_line(path, lock)
        try:
            backend = journal.JournalFileBackend(str(path), lock)
            self.storage = optuna.storages.JournalStorage(backend)
        except (ValueError, KeyError, TypeError, AssertionError) as error:  # of Optuna
            raise BadFile(
                f"{path} is damaged ({error}): remove it; runs that have ended are not run again"
            ) from error
        (plan.folder / "queue").touch()
        self._lock = journal.JournalFileSymlinkLock(str(plan.folder / "queue"))
        with self._alone():
            self.studies = {row.name: self._open(row) for row in plan.rows}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _open(self, row: Row) -> Studies:
        pruners = self.optuna.pruners
        pruner = pruners.SuccessiveHalvingPruner() if self.plan.prune else pruners.NopPruner()
        options = {"storage": self.storage, "load_if_exists": True, "direction": "maximize"}
        trials, final = (
            self.optuna.create_study(study_name=name, pruner=pruner, **options)
            for name in (row.name, f"{row.name}, new seeds")
        )
        return Studies(trials, final)

    def claim(self) -> Claim | None:
        """Take the next run, in the order of the rows; None while there is none to take."""
        for _, trial in self._abandoned():  # some need a while, in which others may claim
            if self._is_here(trial):
                end_orphan(*trial.user_attrs.get("process", (0, None)))
        with self._alone():
            for study, trial in self._abandoned():
                self.give_back(study, trial)
            for row in self.plan.rows:
                trials, final = self.studies[row.name]
                tried = row.trials(self.plan.trials, self.plan.seed)
                self._fill(trials, tried)
                if len(self._finished(trials)) == len(tried):
                    self._fill(final, [{}] * self.plan.seeds)
                for study in (trials, final):
                    if study.get_trials(deepcopy=False, states=(self.states.WAITING,)):
                        return self._take(row, study, study is final)
        return None

    def _fill(self, study: Any, values: list[dict[str, float]]) -> None:
        """Queue the runs that are neither queued nor under way nor finished, by their number."""
        under_way = (self.states.WAITING, self.states.RUNNING)
        there = self._finished(study) | _numbers(study, under_way)
        for number, own in enumerate(values):
            if number not in there:
                study.enqueue_trial(own, user_attrs={"number": number})

    def _finished(self, study: Any) -> set[int]:
        return _numbers(study, (self.states.COMPLETE, self.states.PRUNED))

    def _take(self, row: Row, study: Any, final: bool) -> Claim:
        spans = self.optuna.distributions.FloatDistribution
        weights = () if final else row.weights
        trial = study.ask({w.name: spans(w.low, w.high, log=True) for w in weights})
        trial.set_user_attr("worker", self.worker)
        return Claim(row, study, trial, final)

    def give_back(self, study: Any, trial: Any) -> None:
        """Let a run be queued again, unless another worker has done so."""
        study.tell(trial.number, state=self.states.FAIL, skip_if_finished=True)

    def left(self) -> int:
        """How many runs have no score yet."""
        wanted = sum(len(row.trials(self.plan.trials, self.plan.seed)) for row in self.plan.rows)
        wanted += self.plan.seeds * len(self.plan.rows)
        every = (study for both in self.studies.values() for study in both)
        return wanted - sum(len(self._finished(study)) for study in every)

    # -- who lives -------------------------------------------------------------------------------

    def beat(self) -> None:
        """Show other workers that this one lives."""
        (self._workers / self.worker).touch()

    def leave(self) -> None:
        """Say that this worker has ended."""
        (self._workers / self.worker).unlink(missing_ok=True)

    def _abandoned(self) -> list[tuple[Any, Any]]:
        """The studies and runs of workers that are gone."""
        running = (self.states.RUNNING,)
        return [
            (study, trial)
            for both in self.studies.values()
            for study in both
            for trial in study.get_trials(deepcopy=False, states=running)
            if self._dead(trial.user_attrs.get("worker", ""))
        ]

    def _is_here(self, trial: Any) -> bool:
        return trial.user_attrs.get("worker", "").startswith(f"{socket.gethostname()}-")

    def _dead(self, worker: str) -> bool:
        """Whether a worker is gone: at once where its host shows it, else after a silence."""
        place, _, begin = worker.rpartition("-")
        host, _, pid = place.rpartition("-")
        path, now = self._workers / worker, time.monotonic()
        if worker == self.worker:
            return False
        known = host == socket.gethostname() and os.path.exists("/proc/self")
        if not path.is_file() or (known and started(int(pid)) != begin):
            return True
        beat = path.stat().st_mtime
        if self._seen.get(worker, (None, 0.0))[0] != beat:
            self._seen[worker] = beat, now
        return now - self._seen[worker][1] > SILENT


def _forget_half_a_line(journal: Path, lock: Any) -> None:
    """What a process was writing when it died: the next one would go on in its line."""
    lock.acquire()
    try:
        with open(journal, "ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
    finally:
        lock.release()


def _numbers(study: Any, states: tuple[Any, ...]) -> set[int]:
    trials = study.get_trials(deepcopy=False, states=states)
    return {trial.user_attrs["number"] for trial in trials}
