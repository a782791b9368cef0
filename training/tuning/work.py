"""The work on a study: claim a run, execute it, score it, until none is left."""

import json
import shutil
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import fmean

from cifd_clip.files import read_json, write_json
from training import children
from training.engine import result
from training.engine.flags import expand_files
from training.engine.run import read_metrics
from training.errors import Failure, NonFinite, Stopped, UsageError
from training.tuning.plan import Plan, row_flags
from training.tuning.queue import Claim, Queue
from training.tuning.table import figure_of, write_table

FORMAT = 1  # of settings.json
PAUSE, PATIENCE = 0.2, 2.0  # seconds between two looks: at the runs, and for one where none was


@dataclass
class Task:
    """A run that this process executes.

    Attributes:
        claim: what was claimed.
        run: its directory, beside its log.
        commands: what is left to execute, each what follows ``python``.
        process: the one under way.
        reported: how many held-out scores Optuna knows.
    """

    claim: Claim
    run: Path
    commands: list[list[str]]
    process: BaseProcess | None = None
    reported: int = 0
    begin: float = field(default_factory=time.monotonic)

    @property
    def log(self) -> Path:
        """The file for what it writes."""
        return self.run.with_name(f"{self.run.name}.log")


def work(plan: Plan) -> int:
    """Execute runs until the study is finished; write its table.

    Returns:
        0 when all is finished; 75 after a signal.

    Raises:
        UsageError: the study began with other settings, or Optuna is missing.
        Failure: a run failed.
    """
    try:
        import optuna
    except ImportError:
        raise UsageError(
            "tuning needs Optuna, which is not installed: pip install 'cifd_clip[tune]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check_settings(plan)
    queue = Queue(plan, optuna)
    worker = Worker(plan, queue)
    with children.signals(worker.stop):
        try:
            finished = worker.run()
        finally:
            worker.leave()
    if not finished:
        return Stopped.exit_code
    print(write_table(plan, queue.studies), flush=True)
    shutil.rmtree(plan.made, ignore_errors=True)
    return 0


def check_settings(plan: Plan) -> None:
    """Write down what the study is, or refuse to go on with another."""
    path, settings = plan.folder / "settings.json", json.loads(json.dumps(plan.settings))
    if not path.is_file():
        write_json(path, settings, FORMAT)
    before = read_json(path, FORMAT)
    for name in {**settings, **before}:
        if settings.get(name) != before.get(name):
            raise UsageError(
                f"--name {plan.folder.name}: the study began with other {name} "
                f"({before.get(name)}, now {settings.get(name)}): use those, or another --name"
            )


class Worker:
    """One process's part of the work."""

    def __init__(self, plan: Plan, queue: Queue):
        self.plan, self.queue = plan, queue
        self.active: list[Task] = []
        self.signals = 0

    def stop(self) -> None:
        """Take note of a signal, for `run` and `leave`."""
        self.signals += 1

    def leave(self) -> None:
        """Let what is under way save itself, at a second signal end it; give it back."""
        while alive := [task.process for task in self.active if task.process.is_alive()]:
            for process in alive:  # more than once: one that has just begun does not listen yet
                process.terminate() if self.signals < 2 else process.kill()
            time.sleep(PAUSE)
            self.queue.beat()
        for task in self.active:
            self.queue.give_back(task.claim.study, task.claim.trial)
        self.queue.leave()

    def run(self) -> bool:
        """Claim and execute until nothing is left; False after a signal."""
        idle_since = -PATIENCE
        while not self.signals:
            while len(self.active) < self.plan.jobs and time.monotonic() - idle_since > PATIENCE:
                if claim := self.queue.claim():
                    task = self.task(claim)
                    self.start(task)
                    self.active.append(task)
                else:  # others have what is left; their journal may lie on a slow file system
                    idle_since = time.monotonic()
            if not self.active and not self.queue.left():
                return True
            time.sleep(PAUSE)
            self.queue.beat()
            for task in list(self.active):
                self.look_after(task)
        return False

    def task(self, claim: Claim) -> Task:
        """The commands of a run, which go on where an earlier attempt was stopped."""
        plan, (trials, _) = self.plan, self.queue.studies[claim.row.name]
        kind, values, seed = "t", claim.trial.params, plan.seed
        if claim.final:
            kind, seed = "s", plan.seed + 1 + claim.number
            values = plan.best(claim.row, trials)
        run = plan.folder / "runs" / f"{claim.row.name}-{kind}{claim.number:02}"
        train = ["-m", plan.command.module]
        if "--in-memory" in expand_files(plan.flags):
            train += [f"--in-memory-dir={plan.made}"]
        train += [*plan.flags, *row_flags(claim.row, values)]
        train += ["--seed", str(seed), "--logs", str(run.parent), "--name", run.name]
        train += ["--resume=latest", "--keep=1", *(plan.command.final if claim.final else ())]
        commands = [train]
        if evaluation := (claim.final and plan.evaluation) or plan.judges:
            commands.append(["-m", "eval.benchmark", str(run), *evaluation])
        return Task(claim, run, commands)

    def start(self, task: Task) -> None:
        """Start a task's next command."""
        command = task.commands.pop(0)
        task.process = children.start(command, self.plan.threads, task.log)
        pid = task.process.pid
        task.claim.trial.set_user_attr("process", [pid, children.started(pid)])

    def look_after(self, task: Task) -> None:
        """Take note of a run's validations and of its end."""
        claim, code = task.claim, task.process.exitcode
        if self.signals:
            return  # `leave` gives it back
        if self.plan.prune and not claim.final and code is None and self.falls_behind(task):
            task.process.kill()
            task.process.join()
            claim.study.tell(claim.trial, state=self.queue.states.PRUNED, skip_if_finished=True)
            self.active.remove(task)
        elif code == 0 and task.commands:
            self.start(task)
        elif code in (0, NonFinite.exit_code):  # a loss that is no number is as bad as it gets
            self.active.remove(task)
            self.score(task, {} if code else self.figures(task))
        elif code is not None:
            why = children.last_line(task.log.read_text(errors="replace"))
            raise Failure(f"{task.run.name} failed: {why} ({task.log})")

    def falls_behind(self, task: Task) -> bool:
        """Whether Optuna's pruner gives a trial up."""
        scores = held_out(task.run, self.plan.command.held_out)
        for step in range(task.reported, len(scores)):
            task.claim.trial.report(100 * scores[step], step + 1)
        task.reported = len(scores)
        return bool(scores) and task.claim.trial.should_prune()

    def figures(self, task: Task) -> dict[str, float]:
        """What a finished run is judged by: figures of data sets, its held-out figure, or both."""
        if task.claim.final and self.plan.evaluation:
            return evaluated(task.run)
        if task.claim.final and self.plan.command.final:
            return {"test": result.read(task.run / "result.json").metrics["acc1"]}
        judged = evaluated(task.run) if self.plan.judges else {}
        return {"held out": held_out(task.run, self.plan.command.held_out)[-1], **judged}

    def score(self, task: Task, figures: dict[str, float]) -> None:
        """Record a run's score, in percent; say how long the study goes on at this pace."""
        claim, score = task.claim, 100 * fmean(figures.values()) if figures else 0.0
        for name, value in figures.items():
            claim.trial.set_user_attr(name, value)
        claim.study.tell(claim.trial, score, skip_if_finished=True)
        minutes, left = (time.monotonic() - task.begin) / 60, self.queue.left()
        rest = children.duration(minutes * left / self.plan.jobs)
        print(
            f"{time.strftime('%H:%M')} {task.run.name}: {score:.2f} after "
            f"{children.duration(minutes)}; {left} runs to go, {rest} for one process",
            flush=True,
        )


def held_out(run: Path, names: tuple[str, ...]) -> list[float]:
    """The mean of some figures at each validation of a run so far."""
    lines = read_metrics(run)
    return [fmean(line[name] for name in names) for line in lines if line["kind"] == "val"]


def evaluated(run: Path) -> dict[str, float]:
    """Top-1 or mean recall of a run on each data set that it was evaluated on."""
    figures = {}
    for path in sorted((run / "results").glob("*.json")):
        record = result.read(path)
        figures[record.dataset] = figure_of(record.metrics)
    return figures
