"""What a study compares: rows, the weights of each, and the values that its trials try.

A trial's values are a pure function of the study's seed, the row and the trial's number: a study
that was stopped, or that several processes share, tries what an undisturbed one tries.
"""

import argparse
import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cifd_clip.methods import DECLARED
from cifd_clip.names import did_you_mean
from training.engine.config import check_place
from training.engine.flags import CommandLine, Given, expand_files, spelled
from training.errors import UsageError

EDGE = 0.05  # of a span (of its logarithm): a best value this near to an end is on the edge
#: What a weight is of: without it in a row's configuration, the weight has no effect.
OF = {"lambda_n": "rates", "lambda_emb": "rates", "lambda_i": "ibm"}
#: A row of --methods: a method, or NAME=FLAGS.
ROW = re.compile(r"([\w.+-]+)(?:=(.*))?", re.DOTALL)
OURS = ("name", "logs", "seed", "resume", "keep", "final")
TEACHERS = ("--distill-model=", "--distill-pretrained=", "--teacher-cache=")


class Weight(NamedTuple):
    """A flag that is tuned."""

    name: str
    default: float | None
    low: float
    high: float

    def at(self, share: float) -> float:
        """The value at a share of the span, which is logarithmic; four digits, as flags say it."""
        return float(f"{self.low * (self.high / self.low) ** share:.4g}")

    def on_edge(self, value: float) -> bool:
        """Whether a wider span might have a better value."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return not EDGE < share < 1 - EDGE


@dataclass(frozen=True)
class Row:
    """What is compared: a method under flags, and its weights."""

    name: str
    flags: tuple[str, ...]
    weights: tuple[Weight, ...]

    def trials(self, count: int, seed: int) -> list[dict[str, float]]:
        """The values of each trial: first those that the flags leave or give, then draws.

        A row without weights has none.
        """
        words = sha256(f"{seed}/{self.name}".encode()).digest()
        draws = np.random.Generator(np.random.Philox(int.from_bytes(words[:16], "big")))
        shares = draws.random((count, len(self.weights)))
        tried = [{w.name: w.at(s) for w, s in zip(self.weights, row)} for row in shares]
        defaults = {w.name: w.default for w in self.weights}
        inside = all(w.default and w.low <= w.default <= w.high for w in self.weights)
        return ([defaults] if inside else []) + tried[: count - inside] if defaults else []


class Command(NamedTuple):
    """A command whose methods are compared."""

    module: str
    method: str
    """The flag that names a method."""
    parse: Callable[[list[str]], Given]
    """What a command line gives."""
    resolve: Callable[[list[str]], Any]
    """The configuration of a command line."""
    weights: Callable[[Any], list[Weight]]
    """What can be tuned of a configuration."""
    held_out: tuple[str, ...]
    """The figures that judge a trial: their mean, of the last validation."""
    final: tuple[str, ...]
    """Flags of the runs that are evaluated."""


@dataclass(frozen=True)
class Plan:
    """A study.

    Attributes:
        command: what runs.
        folder: where everything lies.
        rows: what is compared.
        flags: of every run.
        trials, seeds: how many of each row.
        against: the row that the others are compared with.
        seed: of the trials; the final runs have the next ones.
        evaluation: flags of `eval.benchmark` for the final runs; none: they are judged as trials.
        jobs, threads: runs at a time, and threads of each.
        prune: whether trials that fall behind are ended early.
        margin: points by which a trial must be ahead of a row's defaults to take their place.
        judges: flags of `eval.benchmark` for the trials, whose data sets judge them too.
    """

    command: Command
    folder: Path
    rows: tuple[Row, ...]
    flags: tuple[str, ...]
    trials: int
    seeds: int
    against: str
    seed: int
    evaluation: tuple[str, ...]
    jobs: int
    threads: int
    prune: bool
    margin: float = 0.0
    judges: tuple[str, ...] = ()

    def best(self, row: Row, trials: Any) -> dict[str, float]:
        """The weights of a row's final runs, from Optuna's study of its trials, which are done."""
        if not row.weights:
            return {}
        defaults = {weight.name: weight.default for weight in row.weights}
        done = (t for t in trials.get_trials() if t.state.name == "COMPLETE" and t.value)
        begin = next((t for t in done if t.params == defaults), None)
        clear = begin is None or trials.best_value - begin.value > self.margin
        return dict(trials.best_params if clear else begin.params)

    @property
    def name(self) -> str:
        """Of the study."""
        return self.folder.name

    @property
    def logs(self) -> Path:
        """The parent of its folder."""
        return self.folder.parent

    @property
    def made(self) -> Path:
        """Where samples are kept that all of its runs hold in memory; gone when it is finished."""
        return self.folder / "made"

    @property
    def settings(self) -> dict[str, Any]:
        """What may not change while the study goes on."""
        spans = {row.name: [list(weight) for weight in row.weights] for row in self.rows}
        return {
            "module": self.command.module,
            "flags": list(self.flags),
            "rows": {row.name: list(row.flags) for row in self.rows},
            "spans": spans,
            "trials": self.trials,
            "seeds": self.seeds,
            "seed": self.seed,
            "evaluation": list(self.evaluation),
            "prune": self.prune,
            **({"margin": self.margin} if self.margin else {}),
            **({"judges": list(self.judges)} if self.judges else {}),
        }


def _clip_given(argv: list[str]) -> Given:
    from training.clip.flags import parse

    return parse(argv)


def _clip(argv: list[str]) -> Any:
    from training.clip.flags import named_files, resolve

    given = _clip_given(argv)
    return resolve(given, **named_files(given))


def _clip_weights(config: Any) -> list[Weight]:
    options = DECLARED[config.distill].options if config.distill in DECLARED else ()
    return [Weight(o.name, _one(config.options[o.name]), *o.span) for o in options if o.span]


def _classifier_given(argv: list[str]) -> Given:
    from training.classifier.config import parse

    return parse(argv)


def _classifier(argv: list[str]) -> Any:
    from training.classifier.config import bank_rates, resolve

    given = _classifier_given(argv)
    return resolve(given, bank=bank_rates(given))


def _classifier_weights(config: Any) -> list[Weight]:
    fields = config.__dataclass_fields__.items() if config.teachers else ()
    return [
        Weight(name, _one(getattr(config, name)), *field.metadata["span"])
        for name, field in fields
        if "span" in field.metadata and _belongs(config, field)
    ]


def _belongs(config: Any, field: Any) -> bool:
    """Whether a flag is of the method of a configuration; most are of every method."""
    methods = field.metadata.get("methods")
    return methods is None or config.method in methods


def _one(default: Any) -> float:
    return default[0] if isinstance(default, (list, tuple)) else default


RECALL = tuple(f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10))
COMMANDS = {
    "main": Command("training.main", "distill", _clip_given, _clip, _clip_weights, RECALL, ()),
    "classify": Command(
        "training.classify",
        "method",
        _classifier_given,
        _classifier,
        _classifier_weights,
        ("acc1",),
        ("--final",),
    ),
}


def parse(argv: Sequence[str]) -> Plan:
    """The study that a command line asks for.

    Raises:
        UsageError: a flag is wrong, of the study or of its runs.
    """
    parser = CommandLine(
        "training.tune",
        "Compare methods fairly: each gets the same number of trials of its weights, judged by "
        "held-out training samples; the best of each then runs with new seeds. A study goes on "
        "where it was stopped, and several processes may work on one.",
        "python -m training.tune --methods NAME|NAME=FLAGS ... [flags] -- FLAGS OF training.main",
    )
    add = parser.add_argument_group("what is compared").add_argument
    add("--methods", nargs="+", required=True, metavar="NAME",
        help="methods; NAME='FLAGS': a row with flags of its own, which are not tuned")  # fmt: skip
    add("--against", metavar="NAME", help="the row that others are compared with [the first]")
    add("--command", choices=COMMANDS, default="main", help="of training: what the runs are")
    add("--trials", type=int, default=12, metavar="N", help="of each row")
    add("--seeds", type=int, default=6, metavar="N", help="of each row's best weights, all new")
    add("--seed", type=int, default=0, help="of the trials' runs and values")
    add("--space", nargs="+", default=[], metavar="NAME=LOW:HIGH",
        help="the span of a flag, logarithmic, in place of the method's own; of all rows' if "
        "no method declares one, such as lr=1e-4:1e-2")  # fmt: skip
    add("--prune", action="store_true",
        help="end trials that fall behind (successive halving): cheaper, but a method that "
        "learns late is not compared at an equal budget")  # fmt: skip
    add("--margin", type=float, default=0.0, metavar="POINTS",
        help="a row keeps its defaults unless a trial is ahead of them by more than this: say a "
        "standard error of the held-out score, where few samples judge")  # fmt: skip
    add = parser.add_argument_group("evaluation of training.main's runs").add_argument
    add("--data-root", metavar="DIR",
        help="of the final ones, as of eval.benchmark; without: judged as trials")  # fmt: skip
    add("--datasets", nargs="+", default=[], metavar="NAME", help="as of eval.benchmark")
    add("--trial-root", metavar="DIR",
        help="of the trials, besides held-out recall: where labelled samples are that the runs do "
        "not train on, and that are no test set")  # fmt: skip
    add("--trial-datasets", nargs="+", default=[], metavar="NAME", help="as of eval.benchmark")
    add = parser.add_argument_group("where and how").add_argument
    add("--name", required=True, help="of the study")
    add("--logs", type=Path, default=Path("logs/tune"), metavar="DIR", help="parent of the study")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time of this process")
    add("--threads", type=int, default=1, metavar="N", help="of each run")
    place = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:place])
    return plan(args, list(argv[place + 1 :]))


def plan(args: argparse.Namespace, flags: list[str]) -> Plan:
    """The study of parsed flags, and of the flags of its runs.

    Raises:
        UsageError: a row can't run, or would be judged by other data than held-out samples.
    """
    for name in ("trials", "seeds", "jobs", "threads"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.margin < 100:
        raise UsageError(f"--margin {args.margin:g}: expected points from 0 to 100")
    check_place(args.name, args.logs)
    evaluation = _evaluation("", args.data_root, args.datasets)
    judges = _evaluation("trial-", args.trial_root, args.trial_datasets)
    command = COMMANDS[args.command]
    given = command.parse(flags)
    _refuse_ours(given, "after --")
    if args.command == "main" and given.keys().isdisjoint(("val_data", "val_fraction")):
        flags += ["--val-fraction=0.1"]
    spans = dict(map(_span, args.space))
    rows = [_row(command, text, flags, spans) for text in args.methods]
    tuned = {weight.name for row in rows for weight in row.weights}
    if vain := next((name for name in spans if name not in tuned), None):
        raise UsageError(
            f"--space {vain}: no row has such a number to tune{did_you_mean(vain, tuned)}"
        )
    names = [row.name for row in rows]
    if len(set(names)) < len(names):
        raise UsageError(f"--methods has a row twice: {' '.join(names)}")
    against = args.against or names[0]
    if against not in names:
        raise UsageError(
            f"--against {against}: expected one of {', '.join(names)}{did_you_mean(against, names)}"
        )
    if args.command == "classify" and (evaluation or judges):
        raise UsageError(
            "--data-root and --trial-root are of training.main's runs; classifiers have --final "
            "and --holdout"
        )
    return Plan(
        command=command,
        folder=args.logs / args.name,
        rows=tuple(rows),
        flags=tuple(flags),
        trials=args.trials,
        seeds=args.seeds,
        against=against,
        seed=args.seed,
        evaluation=evaluation,
        jobs=args.jobs,
        threads=args.threads,
        prune=args.prune,
        margin=args.margin,
        judges=judges,
    )


def _evaluation(kind: str, root: str | None, datasets: list[str]) -> tuple[str, ...]:
    """Flags of `eval.benchmark`."""
    if bool(root) != bool(datasets):
        where = "trial-root" if kind else "data-root"
        raise UsageError(f"--{where} DIR and --{kind}datasets NAME ... go together")
    return ("--data-root", root, "--datasets", *datasets) if root else ()


def _refuse_ours(given: Given, where: str) -> None:
    """Refuse what the study itself says of each of its runs."""
    for name in OURS:
        if name in given:
            raise UsageError(
                f"{spelled(name)} {where}: the study itself says it of each of its runs"
            )


def _span(text: str) -> tuple[str, tuple[float, float]]:
    name, _, ends = text.partition("=")
    try:
        low, high = map(float, ends.split(":"))
    except ValueError:
        low = high = 0.0
    if not 0 < low < high < math.inf:
        raise UsageError(f"--space '{text}': expected NAME=LOW:HIGH with 0 < LOW < HIGH")
    return name.removeprefix("--").replace("-", "_"), (low, high)


def _row(command: Command, text: str, flags: list[str], spans: dict[str, tuple]) -> Row:
    """A row of ``--methods``; its command line is resolved once, to be refused at once."""
    match = ROW.fullmatch(text)
    if not match:
        raise UsageError(f"--methods '{text}': expected a method, or NAME='FLAGS'")
    name, own = match[1], expand_files(shlex.split(match[2] or ""))
    fixed = command.parse(own)
    _refuse_ours(fixed, f"of --methods {name}")
    method = fixed.get(command.method, name)
    if command.method not in fixed:
        own = [f"--{command.method}", name, *own]
    if method == "none" and command.module == "training.main":
        own += TEACHERS  # which the others share
    config = command.resolve([*flags, *own])
    _check(command, name, config)
    weights = {
        weight.name: weight
        for weight in command.weights(config)
        if weight.name not in fixed and (weight.name not in OF or has(config, OF[weight.name]))
    }
    for flag, (low, high) in spans.items():
        if flag in weights:
            weights[flag] = weights[flag]._replace(low=low, high=high)
        elif _shared(config, flag) and flag not in fixed:
            weights[flag] = Weight(flag, getattr(config, flag), low, high)
    return Row(name, tuple(own), tuple(weights.values()))


def _shared(config: Any, flag: str) -> bool:
    """Whether it is a number of every run, which no method declares as a weight of its own."""
    field = config.__dataclass_fields__.get(flag)
    if field is None or "span" in field.metadata or not _belongs(config, field):
        return False
    return isinstance(getattr(config, flag), float | None)


def has(config: Any, part: str) -> bool:
    """Whether a configuration has rates or a bottleneck."""
    return bool({**vars(config), **getattr(config, "options", {})}.get(part))


def _check(command: Command, name: str, config: Any) -> None:
    """Refuse rows that can't be judged, or that would train a bank in every run."""
    if command.module == "training.classify":
        if config.method in ("rdm", "paraphraser"):
            raise UsageError(f"--methods {name}: it makes no student that could be judged")
        if not config.holdout or config.final:
            raise UsageError(
                "trials are judged by held-out training images alone: give the runs --holdout N, "
                "and no --final"
            )
        return
    if config.distill == "rdm":
        raise UsageError(f"--methods {name}: a bank is no student that could be judged")
    frequency = config.val_frequency
    if not (config.val_data or config.val_fraction) or not frequency or config.epochs % frequency:
        raise UsageError(
            f"--methods {name}: trials are judged by held-out pairs after the last epoch: give the "
            "runs --val-fraction or --val-data, and a --val-frequency that divides --epochs "
            f"{config.epochs}, got {frequency}"
        )
    if config.distill == "cifd" and config.rates and not config.rdm_bank:
        raise UsageError(
            f"--methods {name}: each of its runs would train a bank: train one with "
            "`python -m training.main --distill rdm`, and give the row --rdm-bank RUN"
        )


def row_flags(row: Row, values: dict[str, float]) -> list[str]:
    """A row's own flags with values of its weights."""
    return [*row.flags, *(f"{spelled(name)}={value:g}" for name, value in values.items())]
