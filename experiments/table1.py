"""``python -m experiments.table1``: Table 1 at equal tuning, and with a hundredth of the KL term.

The code of TAKD and DGKD takes a KL term's mean over the 100 classes where the equations have its
sum: a λ_KL of 0.25 there is 0.0025 here, and the paper does not say which it has. So every method
is a row twice, with λ_KL 0.0025 and tuned anew, each with the same number of trials on held-out
images (training.tune). DGKD leaves one of its four terms out of each batch, as its code does; KD
with the λ_KL of DGKD's three others says what their number alone brings. A second study has other
numbers of RDMs, and no IBM, under the best weights of CIFD's row. Teacher, assistants and bank are
experiments.cifar100's. Stopped, it goes on where it was.
"""

import logging
from functools import partial
from pathlib import Path

from cifd_clip.files import read_json, write_text
from experiments.cifar100 import (
    CLASSIFIERS,
    EVERY_RUN,
    RATES,
    SMALL,
    STUDENT,
    check_data,
    cifar_line,
)
from experiments.cifar100 import plan as before
from experiments.seeds import table
from experiments.study import STOPPED, Run, Study, write_result
from training.errors import cli
from training.intervals import paired
from training.tuning.table import FORMAT, explanation, lines

NAME, ABLATION = "table1", "table6"
#: What `results/cifar100` has, and other sizes keep in --logs.
SIZE = ("trials", "seeds", "epochs", "subset")
#: 0.25 of a mean over 100 classes, and three such terms.
MEAN, THREE = 0.0025, 0.0075
#: A method's flags; what its row with the authors' mean has besides, where nothing is tuned.
OWN = {
    "kd": "--teacher={teacher}",
    "cifd": f"--teacher={{teacher}} --rdm-bank={{bank}} --rates {' '.join(map(str, RATES[3]))}",
    "takd": "--teacher={takd}",
    "dgkd": "--teacher={dgkd} --kd-drop=1",
}
FIXED = {"cifd": "--lambda-n=0.25 --lambda-emb=0.1 --lambda-i=0.005"}
#: Other parts under the best weights of CIFD's row, which are not tuned again.
PARTS = {
    "cifd3-noibm": "--no-ibm",
    "cifd1": f"--rates {RATES[1][0]}",
    "cifd5": f"--rates {' '.join(map(str, RATES[5]))}",
}
#: Spans of what is tuned: λ_KL from the authors' mean to ten times what was best before.
SPANS = ("lambda_kl=0.0025:2.5", "lambda_n=0.05:2", "lambda_emb=0.01:2", "lambda_i=1e-4:0.1")


def plan(
    jobs: int,
    trials: int,
    seeds: int,
    epochs: int | None = None,
    subset: int = 0,
    device: str = "cpu",
) -> list[Run]:
    """Every run, each after those it needs; the last three arguments as of cifar100's plan."""
    runs = {run.name: run for run in before([0], epochs, subset, device=device)}
    students = {name: runs[f"{name}_s0"].needs for name in ("kd", "takd", "dgkd", "cifd3")}
    taught = {name: ",".join(f"{{{run}}}" for run in needs) for name, needs in students.items()}
    *_, bank = students["cifd3"]
    places = {"teacher": taught["kd"], "bank": f"{{{bank}}}"} | taught

    rows = ["none"]
    for method, text in OWN.items():
        own = text.format(**places)
        rows.append(f"{method}={own}")
        fixed = f"--method {method} {own} --tau 4 {FIXED.get(method, '')}"
        rows.append(f"{method}-mean={fixed} --lambda-kl {MEAN}")
        if method == "kd":
            rows.append(f"kd-three={fixed} --lambda-kl {THREE}")

    trial = [f"--epochs={epochs}", "--warmup-epochs=0"] if epochs else []
    trial += [f"--subset={subset}"] if subset else []
    flags = f"{EVERY_RUN} {CLASSIFIERS} {SMALL} --tau 4 --model {STUDENT}".split()

    def tuning(name: str, rows: list[str], trials: int, count: int, *more: str) -> Run:
        return Run(
            name,
            "training.tune",
            (
                *("--command=classify", "--methods", *rows, *more),
                *(f"--trials={trials}", f"--seeds={seeds}", "--", *flags, *trial),
                *("--data={data}", "--teacher-cache={logs}/answers", f"--device={device}"),
            ),
            where=("--logs={logs}", "--name={name}", f"--jobs={jobs}"),
            cost=3.3 * count,
        )

    best = f"@{{{NAME}}}/best/cifd.args"
    parts = [f"{name}={best} {more}" for name, more in PARTS.items()]
    count = len(OWN) * trials + len(rows) * seeds
    studies = [
        tuning(NAME, rows, trials, count, "--against=kd", "--space", *SPANS),
        tuning(ABLATION, parts, 1, len(parts) * seeds),
    ]
    needed = {run for needs in students.values() for run in needs}
    for run in reversed(runs.values()):
        needed.update(run.needs if run.name in needed else ())
    return [*(run for run in runs.values() if run.name in needed), *studies]


#: What the paper prints in Table 1 and, of three RDMs without the IBM, in Table 6.
PAPER = {
    "none": 44.68, "kd": 44.76, "takd": 44.45, "dgkd": 46.05,
    "cifd1": 46.17, "cifd": 46.68, "cifd5": 47.25, "cifd3-noibm": 46.04,
}  # fmt: skip
#: Its orderings.
PAIRS = (
    ("kd", "none"), ("takd", "kd"), ("dgkd", "kd"), ("dgkd", "takd"),
    ("cifd1", "kd"), ("cifd", "kd"), ("cifd5", "kd"), ("cifd5", "cifd1"),
    ("cifd", "takd"), ("cifd", "dgkd"), ("cifd", "cifd3-noibm"),
)  # fmt: skip


def orderings(scores: dict[str, dict]) -> str:
    """The paper's differences beside ours: tuned, and with the small λ_KL.

    Args:
        scores: of each row, its test top-1 by seed.
    """

    def difference(one: str, other: str) -> str:
        return str(paired(scores.get(one, {}), scores.get(other, {})) or "")

    def untuned(row: str) -> str:
        return "none" if row == "none" else f"{row}-mean"

    rows = [
        [
            f"{one} − {other}",
            f"{PAPER[one] - PAPER[other]:+.2f}",
            difference(one, other),
            difference(untuned(one), untuned(other)),
        ]
        for one, other in PAIRS
    ]
    rows += [[f"{row} − kd-three", "", "", difference(untuned(row), "kd-three")] for row in OWN]
    return table(["", "paper", "tuned", f"λ_KL {MEAN}"], [r for r in rows if any(r[2:])])


def keep(results: Path, study: Study, run: Run) -> None:
    """Keep the record of a finished study, and make the tables again."""
    if run.name in (NAME, ABLATION):
        record = read_json(study.logs / run.name / "table.json", FORMAT)
        write_result(results / f"{run.name}.json", record)
        paths = [path for name in study.runs for path in (study.logs / name).glob("result*.json")]
        teachers = {}
        for path in paths:
            name, result = f"{path.parent.name}{path.stem.removeprefix('result')}", read_json(path)
            teachers[name] = {key: result[key] for key in ("metrics", "provenance")}
        write_result(results / f"{NAME}_teachers.json", teachers)
        write_text(results / f"{NAME}.md", to_markdown(results))


def to_markdown(results: Path) -> str:
    """The tables of the studies whose records are kept, and the paper's orderings."""
    paths = [results / f"{name}.json" for name in (NAME, ABLATION)]
    records = {path.stem: read_json(path) for path in paths if path.is_file()}
    text, scores = "", {}
    for name, record in records.items():
        heads, *rows = lines(record)
        text += f"# {name}\n\n{explanation(record)}\n\n{table(heads, rows)}\n"
        scores |= {row["row"]: row["scores"] for row in record["rows"]}
    teachers = read_json(results / f"{NAME}_teachers.json")
    rows = [[name, f"{100 * result['metrics']['acc1']:.2f}"] for name, result in teachers.items()]
    text += f"# Teacher, assistants, RDMs\n\n{table(['', 'test top-1'], rows)}\n"
    text += "# The paper's orderings\n\nPaired differences of test top-1.\n\n"
    return text + orderings(scores)


def main(argv: list[str]) -> int:
    """Execute what is missing; exit 0 when everything is there."""
    parser = cifar_line(f"experiments.{NAME}", __doc__)
    parser.add_argument("--trials", type=int, default=8, help="of each method's weights")
    parser.add_argument("--seeds", type=int, default=6, help="of each row's best weights, all new")
    args = parser.parse_args(argv)
    check_data(args.data)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s | %(message)s", datefmt="%H:%M:%S")
    whole = all(getattr(args, name) == parser.get_default(name) for name in SIZE)
    results = args.results or (Path("results/cifar100") if whole else args.logs / "results")
    runs = plan(args.jobs, args.trials, args.seeds, args.epochs, args.subset, args.device)
    study = Study(runs, args.logs, args.data, keep=partial(keep, results))
    if args.dry_run:
        study.dry_run()
        return 0
    finished = study.execute(args.jobs)
    print((results / f"{NAME}.md").read_text() if finished else "", end="")
    return 0 if finished else STOPPED


if __name__ == "__main__":
    cli(main)
