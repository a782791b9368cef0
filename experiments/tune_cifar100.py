"""``python -m experiments.tune_cifar100``: hyperparameters by Optuna (appendix A.1.1).

Every trial is an ordinary run of ``training.classify``, judged by its held-out training images
after each epoch and ended early by asynchronous successive halving. The study is a file: stopped,
it goes on, and several processes may work on it at once.

    python -m experiments.tune_cifar100 --name kd --tune lr tau --trials 40 -- \\
        --data DIR --method kd --model cnn2 --teacher RUN --epochs 30 --holdout 5000
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from training.classifier.config import STAGE1, parse_args
from training.engine.environment import environment
from training.errors import Failure, UsageError, cli

#: flag → (lowest, highest, whether on a logarithmic scale)
SPACE = {
    "lr": (3e-3, 0.2, True),
    "momentum": (0.8, 0.98, False),
    "tau": (1.0, 10.0, True),
    "kd-dropout": (0.0, 0.7, False),
    "lambda-kl": (0.05, 20.0, True),
    "lambda-n": (0.05, 5.0, True),
    "lambda-emb": (1e-3, 100.0, True),
    "lambda-i": (1e-4, 1.0, True),
    "lambda-ft": (1.0, 1000.0, True),
    "density-lr": (1e-3, 0.1, True),
}
#: Learning-rate decay is tuned too: the schedule, by name.
SCHEDULES = ("cosine", "linear", "const")


def main(argv: list[str]) -> None:
    """Work on a study until it has its trials, then write the best settings."""
    optuna = load_optuna()
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
    finished = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    while len(study.get_trials(states=finished)) < args.trials:
        study.optimize(lambda trial: run(trial, args, flags, optuna.TrialPruned), n_trials=1)
    best = study.best_trial
    chosen = " ".join(f"--{k} {v:.4g}" if k != "lr-schedule" else f"--{k} {v}"
                      for k, v in best.params.items())  # fmt: skip
    record = {
        "environment": environment(),
        "trial": best.number,
        "holdout_acc1": best.value,
        "flags": chosen,
        "fixed": shlex.join(flags),
        "trials": [
            {"number": t.number, "state": t.state.name, "value": t.value, "params": t.params}
            for t in study.trials
        ],
    }
    (args.logs / f"{args.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"held-out top-1 {100 * best.value:.2f} with {chosen}")


def load_optuna():
    """The optuna package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UsageError(
            "tuning needs Optuna, which is not installed: pip install 'cifd_clip[tune]'"
        ) from None
    return optuna


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and after ``--`` those of every run.

    Raises:
        UsageError: the runs would not be judged by held-out training images alone.
    """
    ours, _, flags = [list(part) for part in _cut(argv)]
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tune_cifar100",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--name", required=True, help="of the study")
    parser.add_argument(
        "--tune", nargs="+", required=True, choices=(*SPACE, "lr-schedule"), help="which flags"
    )
    parser.add_argument("--trials", type=int, default=40, help="in the whole study")
    parser.add_argument("--min-epochs", type=int, default=3, help="before a trial may be ended")
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    parser.add_argument("--logs", type=Path, default=Path("logs/tune"))
    args = parser.parse_args(ours)
    common = parse_args(flags)
    if common.method in STAGE1:
        raise UsageError(f"--method {common.method} makes no student that could be judged")
    if not common.holdout or common.final:
        raise UsageError(
            "tuning looks at held-out training images alone: give the runs --holdout 5000, and no "
            "--final"
        )
    return args, flags


def _cut(argv: list[str]) -> tuple[list[str], list[str], list[str]]:
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at : at + 1], argv[at + 1 :]


def run(trial, args: argparse.Namespace, flags: list[str], pruned: type[Exception]) -> float:
    """One trial; its held-out top-1 accuracy at the end."""
    chosen = []
    for name in args.tune:
        if name == "lr-schedule":
            chosen.append(f"--lr-schedule={trial.suggest_categorical(name, SCHEDULES)}")
            continue
        low, high, log = SPACE[name]
        chosen.append(f"--{name}={trial.suggest_float(name, low, high, log=log)!r}")
    directory = args.logs / args.name / f"trial{trial.number}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    said = directory.parent / f"{directory.name}.err"
    with open(said, "w") as errors:
        process = subprocess.Popen(
            [sys.executable, *command(directory, [*flags, *chosen])],
            stdout=errors,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        value = follow(process, directory / "metrics.jsonl", trial)
    finally:
        process.terminate()
        process.wait()
    if value is None:
        raise pruned
    if process.returncode == 3:  # diverged: as bad as it gets
        return 0.0
    if process.returncode:
        raise Failure(f"trial {trial.number} failed: {said.read_text().splitlines()[-1]}")
    return value


def command(directory: Path, flags: list[str]) -> list[str]:
    """What a trial runs, after ``python``: on the CPU, unless its flags say where."""
    where = [f"--logs={directory.parent}", f"--name={directory.name}", "--keep=1"]
    return ["-m", "training.classify", "--device=cpu", *flags, *where]


def follow(process: subprocess.Popen, metrics: Path, trial) -> float | None:
    """Report each epoch's held-out accuracy; None when the trial is not worth going on."""
    seen, value = 0, 0.0
    while True:
        ended = process.poll() is not None
        for value in held_out(metrics)[seen:]:
            seen += 1
            trial.report(value, seen)
        if ended:
            return value
        if seen and trial.should_prune():
            return None
        time.sleep(0.5)


def held_out(metrics: Path) -> list[float]:
    """The held-out accuracies that a run has logged so far."""
    if not metrics.is_file():
        return []
    text = metrics.read_text()
    whole = text[: text.rfind("\n") + 1].splitlines()
    return [line["acc1"] for line in map(json.loads, whole) if line["kind"] == "val"]


if __name__ == "__main__":
    cli(main)
