"""``python -m experiments.table1``: Table 1 at equal tuning, and with its authors' KL terms.

The code of TAKD and DGKD takes a KL term's mean over the 100 classes where the equations have its
sum: their λ_KL of 0.25 is 0.0025 here. So every method is a row twice, with λ_KL 0.0025 and tuned
anew, each with the same number of trials on held-out images (training.tune). DGKD leaves one of its
four terms out of each batch, as its code does; KD with the λ_KL of DGKD's three others says what
their number alone brings. Teacher, assistants and bank are experiments.cifar100's. Stopped, it goes
on where it was.
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
from experiments.study import STOPPED, Run, Study, write_result
from training.errors import cli
from training.tuning.table import FORMAT

NAME = "table1"
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
    tuning = Run(
        NAME,
        "training.tune",
        (
            *("--command=classify", "--methods", *rows, "--against=kd", "--space", *SPANS),
            *(f"--trials={trials}", f"--seeds={seeds}", "--", *flags, *trial),
            *("--data={data}", "--teacher-cache={logs}/answers", f"--device={device}"),
        ),
        where=("--logs={logs}", "--name={name}", f"--jobs={jobs}"),
        cost=3.3 * (len(OWN) * trials + len(rows) * seeds),
    )
    needed = {run for needs in students.values() for run in needs}
    for run in reversed(runs.values()):
        needed.update(run.needs if run.name in needed else ())
    return [*(run for run in runs.values() if run.name in needed), tuning]


def keep(results: Path, study: Study, run: Run) -> None:
    """Keep the study's table and its record."""
    if run.name == NAME:
        table = read_json(study.logs / NAME / "table.json", FORMAT)
        write_result(results / f"{NAME}.json", table)
        write_text(results / f"{NAME}.md", (study.logs / NAME / "table.md").read_text())


def main(argv: list[str]) -> int:
    """Execute what is missing; exit 0 when everything is there."""
    parser = cifar_line(f"experiments.{NAME}", __doc__)
    parser.set_defaults(results=Path("results/cifar100"))
    parser.add_argument("--trials", type=int, default=8, help="of each method's weights")
    parser.add_argument("--seeds", type=int, default=6, help="of each row's best weights, all new")
    args = parser.parse_args(argv)
    check_data(args.data)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s | %(message)s", datefmt="%H:%M:%S")
    runs = plan(args.jobs, args.trials, args.seeds, args.epochs, args.subset, args.device)
    study = Study(runs, args.logs, args.data, keep=partial(keep, args.results))
    if args.dry_run:
        study.dry_run()
        return 0
    finished = study.execute(args.jobs)
    print((args.results / f"{NAME}.md").read_text() if finished else "", end="")
    return 0 if finished else STOPPED


if __name__ == "__main__":
    cli(main)
