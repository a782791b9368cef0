"""``python -m experiments.tune_cifar100``: hyperparameters by Optuna (appendix A.1.1).

Every trial is an ordinary run of training.classify, judged by its held-out training images after
each epoch and ended early by asynchronous successive halving. The study is a file: stopped, it goes
on, and several processes may work on it at once. After -- come the flags of every run:

    python -m experiments.tune_cifar100 --name kd --tune lr tau --trials 40 -- \\
        --data DIR --method kd --model cnn2 --teacher RUN --epochs 30 --holdout 5000
"""

import json
import shlex
import time
from argparse import Namespace
from pathlib import Path

from experiments.classifiers import CHOICES, SPACE
from experiments.study import command_line, last_line, start, write_result
from training.engine.environment import environment
from training.errors import Failure, UsageError, cli

DIVERGED = 3  # the exit code of such a run


def parse(argv: list[str]) -> tuple[Namespace, list[str]]:
    """Our flags, and after ``--`` those of every run.

    Raises:
        UsageError: the runs would not be judged by held-out training images alone.
    """
    parser = command_line("experiments.tune_cifar100", __doc__)
    add = parser.add_argument
    add("--name", required=True, help="of the study")
    names = [*SPACE, *CHOICES]
    text = f"which flags: {', '.join(names)}"
    add("--tune", nargs="+", required=True, choices=names, metavar="FLAG", help=text)
    add("--trials", type=int, default=40, help="in the whole study")
    add("--min-epochs", type=int, default=3, help="before a trial may be ended")
    add("--seed", type=int, default=0, help="of the search")
    add("--logs", type=Path, default=Path("logs/tune"), metavar="DIR", help="of the study")
    place = argv.index("--") if "--" in argv else len(argv)
    args, flags = parser.parse_args(argv[:place]), argv[place + 1 :]
    from training.classifier.config import STAGE1, parse_args  # takes seconds to import

    run = parse_args(flags)
    if run.method in STAGE1:
        raise UsageError(f"--method {run.method} makes no student that could be judged")
    if not run.holdout or run.final:
        raise UsageError(
            "tuning looks at held-out training images alone: give the runs --holdout 5000, and no "
            "--final"
        )
    return args, flags


def suggest(trial, names: list[str]) -> list[str]:
    """A trial's values of the flags that are tuned."""
    values = {}
    for name in names:
        if name in CHOICES:
            values[name] = trial.suggest_categorical(name, CHOICES[name])
        else:
            low, high, log = SPACE[name]
            values[name] = trial.suggest_float(name, low, high, log=log)
    return [f"--{name}={value}" for name, value in values.items()]


def command(directory: Path, flags: list[str]) -> list[str]:
    """What a trial runs, after ``python``: on the CPU, unless its flags say where."""
    where = [f"--logs={directory.parent}", f"--name={directory.name}", "--keep=1"]
    return ["-m", "training.classify", "--device=cpu", *flags, *where]


def held_out(metrics: Path) -> list[float]:
    """The held-out accuracies that a run has logged so far."""
    text = metrics.read_text() if metrics.is_file() else ""
    whole = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return [line["acc1"] for line in whole if line["kind"] == "val"]


def follow(trial, directory: Path, flags: list[str]) -> float | None:
    """Run a trial; its held-out accuracy at the end, None if it is not worth going on."""
    log = directory.with_suffix(".log")
    process, values, ended = start(command(directory, flags), 1, log), [0.0], False
    try:
        while not ended:
            ended = process.poll() is not None
            for value in held_out(directory / "metrics.jsonl")[len(values) - 1 :]:
                trial.report(value, len(values))
                values.append(value)
            if not ended and len(values) > 1 and trial.should_prune():
                return None
            time.sleep(0.5 * (not ended))
    finally:
        process.terminate()
        process.wait()
    if process.returncode == DIVERGED:  # as bad as it gets
        return 0.0
    if process.returncode:
        raise Failure(f"trial {trial.number} failed: {last_line(log.read_text())} ({log})")
    return values[-1]


def main(argv: list[str]) -> None:
    """Work on a study until it has its trials, then write the best settings."""
    try:
        import optuna
    except ImportError:
        raise UsageError(
            "tuning needs Optuna, which is not installed: pip install 'cifd_clip[tune]'"
        ) from None
    args, flags = parse(argv)
    args.logs.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=args.name,
        storage=f"sqlite:///{args.logs / args.name}.db",
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=args.seed),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=args.min_epochs),
    )
    fixed = study.user_attrs.get("fixed", shlex.join(flags))
    if fixed != shlex.join(flags):
        raise UsageError(
            f"--name {args.name}: its trials had the flags {fixed!r}; use them, or another --name"
        )
    study.set_user_attr("fixed", fixed)

    def objective(trial) -> float:
        directory = args.logs / args.name / f"trial{trial.number}"
        value = follow(trial, directory, [*flags, *suggest(trial, args.tune)])
        if value is None:
            raise optuna.TrialPruned
        return value

    finished = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    while len(study.get_trials(states=finished)) < args.trials:
        study.optimize(objective, n_trials=1)
    write_best(study, args.logs / f"{args.name}.json", fixed)


def write_best(study, path: Path, fixed: str) -> None:
    """Write the best settings and every trial."""
    best = study.best_trial
    flags = " ".join(f"--{k} {v if k in CHOICES else f'{v:.4g}'}" for k, v in best.params.items())
    trials = [
        {"number": t.number, "state": t.state.name, "value": t.value, "params": t.params}
        for t in study.trials
    ]
    record = {"environment": environment(), "trial": best.number, "holdout_acc1": best.value}
    write_result(path, record | {"flags": flags, "fixed": fixed, "trials": trials})
    print(f"held-out top-1 {100 * best.value:.2f} with {flags}")


if __name__ == "__main__":
    cli(main)
