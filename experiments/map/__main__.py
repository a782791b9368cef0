"""``python -m experiments.map``: what each term of distillation brings, and where.

Pretrained teachers; students of two sizes on 2,000 to 20,000 labelled images beside photos; in
each cell every method under equal tuning (training.tune), then new seeds on two subsets of the
data. results/map/protocol.md says what is measured and was written before the first figure.
Stopped, it goes on where it was.
"""

import logging
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from experiments.map.table import write_map
from experiments.study import STOPPED, Run, Study, command_line
from training.errors import UsageError, cli

MODELS = Path(os.path.relpath(Path(__file__).parent / "models"))
SUBSETS = ("a", "b")
AGAINST = "clipkd"
TEST = ("--data-root={data}/benchmark", "--datasets", "cifar100", "flickr8k")
#: Samples are made once for all runs on a subset.
MADE = ("--in-memory", "--in-memory-dir={logs}/made")


class Scale(NamedTuple):
    """How large everything is."""

    images: tuple[int, ...]  # labelled ones, of each cell
    models: str  # prefix of the students' configurations
    samples: int  # of a run, whatever the cell
    batch: int
    bank: int  # samples of a bank's training
    trials: int
    seeds: int  # of each subset
    teacher: int = 0  # labelled images that it is aligned on, with photos in proportion; 0: all
    device: str = "cpu"
    workers: int = 0  # that decode what caches and banks see


SCALES = {
    "full": Scale((2_000, 6_000, 20_000), "small", 128_000, 128, 256_000, 8, 3),
    "trial": Scale((200, 400), "tiny", 512, 64, 512, 2, 2, 300),
}
#: Photos beside the labelled images: all of Flickr8k's beside 20,000.
PHOTOS = 6_591 / 20_000
#: The student of every cell, and the one that the largest cell has as well.
SMALL, LARGE = "gap10", "gap3"
RATES = "10000 3000 1000"
#: Images of a cell → points by which a trial must be ahead of the defaults: a standard error of its
#: score (35 % among 798 and 2,659 held-out pairs). The first cell ran without.
MARGIN = {6_000: 1.7, 20_000: 0.9}
#: Trials of each row for the large student, of whose runs each takes four minutes of a core.
LARGE_TRIALS = 3
#: Row → its flags; of a row without, the name is the method's.
ROWS = {
    "none": "",
    "fd": "",
    "clipkd-published": "--distill clipkd --projector separate --interactive-scale raw "
    "--lambda-fd 2000 --lambda-crd 1 --lambda-icl 1",
    "clipkd": "",
    "cifd": "--rdm-bank {bank}",
    "cifd-noibm": "--distill cifd --rdm-bank {bank} --no-ibm",
    "clipkd+rdm": "--distill clipkd --rdm-bank {bank}",
    "clipkd+ibm": "--distill clipkd --ibm",
}
#: Rows of the largest cell alone.
MORE = {
    "cifd0": "--distill cifd --rates",
    "cifd1": "--distill cifd --rdm-bank {bank1}",
    "kd": "",
    "tinyclip": "",
    "mobileclip": "",
    "rkd": "",
    "clipkd-siglip": "--distill clipkd --siglip",
    "tinyclip-50": "--distill tinyclip --distill-logit-scale 50",
    "mobileclip-two": "--distill mobileclip --teacher-cache {caches} --distill-logit-scale 100 100",
    "cifd-two": "--distill cifd --teacher-cache {caches} --rdm-bank {bank},{second}",
    # Û in D dimensions, an eighth, a quarter and all of the teacher's T; the others have a half.
    **{
        f"cifd-{dims}": f"--distill cifd --rdm-bank {{bank}} --force-embed-dim {dims} "
        "--lambda-cl 0.0005 --lambda-i 0.0001 --lambda-n 1"
        for dims in (32, 64, 256)
    },
}


class Cell(NamedTuple):
    """A part of the map."""

    images: int
    model: str

    @property
    def name(self) -> str:
        """Of its studies."""
        return f"{self.model}-{self.images}"


def cells(scale: Scale) -> list[Cell]:
    """The cells, the smallest data first."""
    return [Cell(n, SMALL) for n in scale.images] + [Cell(scale.images[-1], LARGE)]


def plan(scale: Scale, jobs: int, names: Collection[str] = ()) -> Iterator[Run]:
    """Every run of the cells of these names [all], each after those it needs."""
    done = set()
    for cell in [cell for cell in cells(scale) if not names or cell.name in names]:
        for subset in SUBSETS:
            data, more = f"{cell.images}{subset}", cell == Cell(scale.images[-1], SMALL)
            if data not in done:
                done.add(data)
                yield from teaching(scale, data, more)
            yield tuning(scale, cell, subset, ROWS | (MORE if more else {}), jobs)
        # What the first subset's RDMs are as teachers, of the test data that judged the students.
        data = f"{cell.images}{SUBSETS[0]}"
        if f"kept-{data}" not in done:
            done.add(f"kept-{data}")
            flags = (f"{{bank-{data}}}", "--teacher={data}/teacher", *TEST)
            yield Run(f"kept-{data}", "eval.bank", flags, where=("--out={here}",), cost=3)


def common(scale: Scale, data: str) -> tuple[str, ...]:
    """Flags of all runs on a subset."""
    return (
        f"--train-data={{data}}/{data}",
        *("--captions=all", "--view-seed=0", "--aug-cfg", "scale=[0.6,1.0]", "--views=4"),
        *(f"--batch-size={scale.batch}", "--precision=fp32", f"--device={scale.device}"),
    )


def teaching(scale: Scale, data: str, more: bool) -> Iterator[Run]:
    """The teachers' caches of a subset, and their banks; without ``more`` those of `ROWS` alone."""
    flags = (f"--model={scale.models}-{SMALL}",)
    flags += ("--model-config", f"{MODELS}/{scale.models}-{SMALL}.json")
    workers = f"--workers={scale.workers}"
    for number in ("", "1")[: 1 + more]:
        teacher = f"--distill-model=local-dir:{{data}}/teacher{number}"
        yield Run(
            f"cache{number}-{data}",
            "training.cache_teacher",
            (*common(scale, data), teacher, *flags),
            where=(f"--teacher-cache={{logs}}/cache{number}-{data}", workers),
            cost=8,
        )
    steps = ("--epochs=1", f"--train-num-samples={scale.bank}", "--val-fraction=0.1")
    banks = (("bank", "", RATES), ("bank1", "", "1000"), ("second", "1", RATES))
    for name, number, rates in banks if more else banks[:1]:
        cache = f"--teacher-cache={{cache{number}-{data}}}"
        yield Run(
            f"{name}-{data}",
            "training.main",
            (*common(scale, data), *steps, cache, "--distill=rdm", "--rates", *rates.split()),
            where=("--logs={logs}", "--name={name}", "--resume=latest", *MADE, workers),
            cost=2,
        )


def tuning(scale: Scale, cell: Cell, subset: str, rows: dict[str, str], jobs: int) -> Run:
    """A cell's study on a subset: the first tunes, the second takes the first's weights."""
    data, first = f"{cell.images}{subset}", subset == SUBSETS[0]
    taught = {name: f"{{{name}-{data}}}" for name in ("bank", "bank1", "second")}
    taught["caches"] = f"{{cache-{data}}},{{cache1-{data}}}"
    methods = []
    for name, text in rows.items():
        flags = text.format(**taught)
        if not first:
            flags = f"@{{{cell.name}-{SUBSETS[0]}}}/best/{name}.args {flags}"
        methods.append(f"{name}={flags}" if flags else name)
    model = f"{scale.models}-{cell.model}"
    trials = min(scale.trials, LARGE_TRIALS) if cell.model == LARGE else scale.trials
    size = ("--trials", str(trials), "--seeds", str(scale.seeds))
    runs = (*common(scale, data), f"--teacher-cache={{cache-{data}}}", f"--model={model}")
    runs += ("--model-config", f"{MODELS}/{model}.json", "--val-fraction=0.1", "--epochs=1")
    runs += (f"--train-num-samples={scale.samples}", "--save-frequency=0", "--lr=4e-3")
    runs += (*MADE, "--workers=0")
    if cell.images in MARGIN:
        size += (f"--margin={MARGIN[cell.images]}",)
    return Run(
        f"{cell.name}-{subset}",
        "training.tune",
        ("--methods", *methods, f"--against={AGAINST}", *size, *TEST, "--", *runs),
        where=("--logs={logs}", "--name={name}", f"--jobs={jobs}"),
        cost=2 * len(rows) * (scale.seeds + trials * first) / jobs,
    )


def main(argv: list[str]) -> int:
    """Execute what is missing; exit 0 when everything is there."""
    parser = command_line("experiments.map", __doc__)
    add = parser.add_argument
    add("--cifar100", type=Path, required=True, metavar="DIR", help="with cifar100_*.npz")
    add("--flickr8k", type=Path, required=True, metavar="DIR", help="with train/*.tar, test/*.tar")
    add("--scale", choices=SCALES, default="full", help="how large everything is")
    add("--cells", nargs="+", metavar="NAME", help="some of the map, such as gap10-2000")
    add("--jobs", type=int, default=2, help="students at a time, one thread each")
    add("--workers", type=int, default=0, help="processes that decode what caches and banks see")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where all of them train")
    add("--logs", type=Path, default=Path("logs/map"), metavar="DIR", help="of the runs")
    add("--results", type=Path, metavar="DIR",
        help="of the map [results/map; of a smaller scale: in --logs]")  # fmt: skip
    add("--dry-run", action="store_true", help="print the commands that are left and their cost")
    args = parser.parse_args(argv)
    scale = SCALES[args.scale]._replace(device=args.device, workers=args.workers)
    results = args.results or (
        Path("results/map") if args.scale == "full" else args.logs / "results"
    )
    names = [cell.name for cell in cells(scale)]
    if unknown := set(args.cells or ()).difference(names):
        raise UsageError(f"--cells {unknown.pop()}: expected some of {' '.join(names)}")
    study = Study(list(plan(scale, args.jobs, args.cells or ())), args.logs, args.logs / "data")
    if args.dry_run:
        study.dry_run()
        return 0
    from experiments.map.data import prepare  # takes seconds to import

    logging.basicConfig(level=logging.INFO, format="%(asctime)s | %(message)s", datefmt="%H:%M:%S")
    prepare(args.logs / "data", args.cifar100, args.flickr8k, scale.images, PHOTOS, scale.teacher)
    finished = study.execute(jobs=1)
    print(write_map(args.logs, results, names, SUBSETS))
    return 0 if finished else STOPPED


if __name__ == "__main__":
    cli(main)
