"""The queue of a study: Optuna's journal, from which several processes claim runs.

Every run is a trial of Optuna: those of a row's weights in a study of the row's name, those of its
new seeds in another. A run that was stopped, or whose process has died, is queued again under its
number and goes on from its checkpoint.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cifd_clip.files import BadFile
from training.children import end_orphan
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
        self.worker = f"{socket.gethostname()}-{os.getpid()}"
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
        if not trials.get_trials(deepcopy=False):  # of a row without weights there are none
            for number, values in enumerate(row.trials(self.plan.trials, self.plan.seed)):
                _enqueue(trials, number, values)
        return Studies(trials, final)

    def claim(self) -> Claim | None:
        """Take the next run, in the order of the rows; None while there is none to take."""
        with self._alone():
            for row in self.plan.rows:
                trials, final = self.studies[row.name]
                if not _unfinished(trials) and not final.get_trials(deepcopy=False):
                    for number in range(self.plan.seeds):
                        _enqueue(final, number, {})
                for study in (trials, final):
                    self._requeue_dead(study)
                    if study.get_trials(deepcopy=False, states=(self.states.WAITING,)):
                        return self._take(row, study, study is final)
        return None

    def _take(self, row: Row, study: Any, final: bool) -> Claim:
        spans = self.optuna.distributions.FloatDistribution
        weights = () if final else row.weights
        trial = study.ask({w.name: spans(w.low, w.high, log=True) for w in weights})
        trial.set_user_attr("worker", self.worker)
        return Claim(row, study, trial, final)

    def give_back(self, study: Any, trial: Any) -> None:
        """Queue a run again under its number."""
        study.tell(trial.number, state=self.states.FAIL)
        # not `trial.params`: whoever took it may have died before all of them were written
        _enqueue(study, trial.user_attrs["number"], trial.user_attrs["values"])

    def left(self) -> int:
        """How many runs have no score yet."""
        seeds = self.plan.seeds
        return sum(
            len(_unfinished(trials)) + (len(_unfinished(final)) if final.trials else seeds)
            for trials, final in self.studies.values()
        )

    # -- who lives -------------------------------------------------------------------------------

    def beat(self) -> None:
        """Show other workers that this one lives."""
        (self._workers / self.worker).touch()

    def leave(self) -> None:
        """Say that this worker has ended."""
        (self._workers / self.worker).unlink(missing_ok=True)

    def _requeue_dead(self, study: Any) -> None:
        for trial in study.get_trials(deepcopy=False, states=(self.states.RUNNING,)):
            worker = trial.user_attrs.get("worker", "")
            if worker != self.worker and self._dead(worker):
                if worker.rpartition("-")[0] == socket.gethostname():
                    end_orphan(*trial.user_attrs.get("process", (0, None)))
                self.give_back(study, trial)

    def _dead(self, worker: str) -> bool:
        """Whether a worker is gone: at once where its host shows it, else after a silence."""
        host, _, pid = worker.rpartition("-")
        path, now = self._workers / worker, time.monotonic()
        if not path.is_file():
            return True
        if host == socket.gethostname() and not os.path.exists(f"/proc/{pid}"):
            return os.path.exists("/proc/self")
        beat = path.stat().st_mtime
        if self._seen.get(worker, (None, 0.0))[0] != beat:
            self._seen[worker] = beat, now
        return now - self._seen[worker][1] > SILENT


def _enqueue(study: Any, number: int, values: dict[str, float]) -> None:
    study.enqueue_trial(values, user_attrs={"number": number, "values": values})


def _forget_half_a_line(journal: Path, lock: Any) -> None:
    """What a process was writing when it died: the next one would go on in its line."""
    lock.acquire()
    try:
        with open(journal, "ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
    finally:
        lock.release()


def _unfinished(study: Any) -> list[Any]:
    return [t for t in study.get_trials(deepcopy=False) if not t.state.is_finished()]
