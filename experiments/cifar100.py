"""``python -m experiments.cifar100``: the runs behind Tables 1 and 6 and Figure 5, over seeds.

Every seed has its teacher and a two-layer student under every method. All students learn from the
first seed's teacher, its RDM bank and its assistants of TAKD and DGKD. Each run is an ordinary
command of training.classify. Stopped, the study goes on where it was. What a run gave is kept in
--results as soon as it ends: a run with a result is executed again only when another run needs its
weights and they are not in --logs.
"""

import argparse
from pathlib import Path
from statistics import mean

from cifd_clip.files import read_json, write_text
from experiments.seeds import spread, table
from experiments.study import (
    STOPPED,
    Run,
    Study,
    command_line,
    curve,
    read_results,
    write_result,
)
from training.errors import cli
from training.intervals import paired

TEACHER, STUDENT = "cnn10", "cnn2"
#: The RDMs of a student with one, three and five of them; the bank has all of these rates. At
#: R <= 3 a module collapses to 0 bits (results/cifar100/tuning).
RATES = {1: [50], 3: [20, 50, 150], 5: [10, 20, 50, 150, 500]}

# The settings, chosen on held-out training images (results/cifar100/tuning); later groups win. What
# is held out stays out, as in A.2: a teacher that has not seen it can go on to tune students.
EVERY_RUN = (
    "--global-batch 128 --momentum 0.9 --wd 1e-4 --augment flip --precision amp_bf16 --holdout 2500"
)
PLACE = (
    "--data={data}", "--logs={logs}", "--name={name}", "--resume=latest",
    "--teacher-cache={logs}/answers",
)  # fmt: skip
CLASSIFIERS = "--epochs 15 --lr 0.02"
SETTINGS = {
    "none": "",
    "kd": "--tau 4",
    "takd": "--tau 4",
    "dgkd": "--tau 4 --kd-dropout 0.25",
    "cifd": "--tau 4 --lambda-n 0.25 --lambda-emb 0.1 --lambda-i 0.005",
    "ibm": "--tau 4 --lambda-i 0.005",
    "rdm": "--epochs 10 --opt adamw --lr 1e-3 --tau 4 --precision fp32",
}
#: Settings of single models, whatever the method: those with many layers and no normalisation need
#: a warm-up, and overfit without the larger decay. The teacher, which has no teacher whose answers
#: could be kept, sees crops, and needs the noise of small batches: held out, 54.5 % where batches
#: of 128 stop at 50. The student too needs warm-up and clipping: τ² makes the KL terms large.
DEEP = "--epochs 5 --lr 0.03 --wd 5e-4 --global-batch 64 --warmup-epochs 1 --grad-clip-norm 5"
SMALL = "--warmup-epochs 1 --grad-clip-norm 5 --lambda-kl 0.25"
TEACHING = f"{DEEP} --epochs 16 --augment crop"
MODELS = {"cnn10": TEACHING, "cnn8": DEEP, "cnn6": DEEP, "cnn4": DEEP, "cnn2": SMALL}
#: What marks a student who sees a part of the images, and for how long: until it knows them.
FEW, LONGER = "_few", "--epochs 30"
#: About how long a run takes, in minutes.
COST = {"cnn10": 29, "cnn8": 6.5, "cnn6": 5.5, "cnn4": 4, "cnn2": 3, "": 7}


def plan(
    seeds: list[int],
    epochs: int | None = None,
    subset: int = 0,
    few: int = 0,
    device: str = "cpu",
) -> list[Run]:
    """All runs, each after those it needs.

    Args:
        seeds: of the students; the first one's teacher and assistants teach them all.
        epochs, subset: fewer of everything, for a trial.
        few: how many images students train on, whose teachers see all; 0: all as well.
        device: where all of them train.
    """
    runs: list[Run] = []
    trial = f"--epochs {epochs} --warmup-epochs 0 " if epochs else ""
    trial += f"--subset {subset} " if subset else ""

    def add(kind: str, seed: int, method: str, model: str, teachers=(), *more: str, **other) -> str:
        """Add a run; its name."""
        part = few if model == STUDENT else 0
        settings = [f"--method={method}", EVERY_RUN, CLASSIFIERS if model else ""]
        settings += [MODELS.get(model, ""), SETTINGS["ibm" if kind == "ibm" else method]]
        settings.append(f"--subset {part} {LONGER}" if part else "")
        flags = f"{' '.join(settings)} {trial} --seed={seed} --final".split()
        flags += [f"--model={model}"] if model else []
        flags += [f"--teacher={','.join(f'{{{name}}}' for name in teachers)}"] if teachers else []
        name = f"{kind}{FEW if part else ''}_s{seed}"
        kept = {"results": ("",), "cost": COST[model], **other}
        place = (*PLACE, f"--device={device}")
        runs.append(Run(name, "training.classify", (*flags, *more), place, **kept))
        return name

    # 1. Of every seed a teacher; of the first, its assistants: TAKD reads the last, DGKD all.
    first = seeds[0]
    teacher, *_ = [add("teacher", s, "none", TEACHER) for s in (seeds[:1] if few else seeds)]
    shared = add("cnn8_kd", first, "kd", "cnn8", [teacher])
    chains = {}
    for method in ("takd", "dgkd"):
        chain = chains[method] = [teacher, shared]
        for model in ("cnn6", "cnn4"):
            chain.append(add(f"{model}_{method}", first, method, model, [*chain]))
    # 2. The bank of all rates.
    rates = [str(rate) for rate in sorted({rate for some in RATES.values() for rate in some})]
    results = tuple(f"_R{rate}" for rate in rates)
    bank = add("rdm", first, "rdm", "", [teacher], "--rates", *rates, results=results)
    # 3. The students.
    for seed in seeds:
        add("student", seed, "none", STUDENT)
        add("kd", seed, "kd", STUDENT, [teacher])
        for method, chain in chains.items():
            add(method, seed, method, STUDENT, chain)
        add("ibm", seed, "cifd", STUDENT, [teacher])
        for count, some in RATES.items():
            picked = [f"--rdm-bank={{{bank}}}", "--rates", *map(str, some)]
            for end, ibm in (("", []), ("_noibm", ["--no-ibm"])):
                kind = f"cifd{count}{end}"
                add(kind, seed, "cifd", STUDENT, [teacher], *picked, *ibm)
    return runs


def keep_results(study: Study, run: Run) -> None:
    """Copy a finished run's results, with its flags and the essence of its log."""
    directory = study.logs / run.name
    for file, kept in study.kept(run).items():
        if not kept.is_file():
            added = {"flags": list(run.flags), "curve": curve(directory, ("step", "loss", "acc1"))}
            write_result(kept, read_json(directory / file) | added)
    if run.name.startswith("rdm") and not any((study.results / "bank").glob(f"*{run.name}*")):
        from eval import bank  # takes seconds to import

        bank.main([str(directory), f"--data={study.data}", f"--out={study.results}"])


#: Table 1, then Table 6: the row's name, and its runs'.
ROWS = {
    "Teacher, 10 layers": "teacher",
    "Student, 2 layers": "student",
    "KD": "kd",
    "TAKD (3 TA)": "takd",
    "DGKD (3 TA)": "dgkd",
    "KD with IBM": "ibm",
    **{f"CIFD ({count} RDM)": f"cifd{count}" for count in RATES},
    **{f"CIFD ({count} RDM), no IBM": f"cifd{count}_noibm" for count in RATES},
}


def to_markdown(results: Path) -> str:
    """Tables 1 and 6 over seeds: test top-1, paired differences, training top-1."""
    groups = _by_kind(results)
    test, train = (
        {
            name: {run["provenance"]["seed"]: 100 * run[metrics]["acc1"] for run in runs}
            for name, runs in groups.items()
        }
        for metrics in ("metrics", "train_metrics")
    )

    def over(name: str, other: str | None) -> str:
        return str(paired(test[name], test[other]) or "") if other in test else ""

    rows = []
    for row, name in ROWS.items():
        if name in groups:
            top1, seen = spread(test[name].values()), mean(train[name].values())
            over_kd = over(name, None if name in ("teacher", "kd") else "kd")
            ibm = over(name, "kd" if name == "ibm" else f"{name}_noibm")
            rows.append([row, str(len(test[name])), top1, over_kd, ibm, f"{seen:.1f}"])
    heads = ["", "n", "test top-1", "− KD", "− the same without IBM", "on training images"]
    return table(heads, rows)


#: The runs that a student costs besides its teacher.
CHAINS = {
    "kd": ("kd",),
    "takd": ("cnn8_kd", "cnn6_takd", "cnn4_takd", "takd"),
    "dgkd": ("cnn8_kd", "cnn6_dgkd", "cnn4_dgkd", "dgkd"),
    **{f"cifd{count}": ("rdm", f"cifd{count}") for count in RATES},
}


def costs(results: Path) -> dict[str, float]:
    """What each method took besides the teacher, in CPU time, relative to KD (section 4.3).

    A CPU's time does not grow when others use the machine. The bank's is that of all its rates
    together. Means over seeds; methods with a run missing are left out. `eval.cost` counts MACs.
    """
    spent = {
        kind: mean(run["training"]["cpu_seconds"] for run in runs)
        for kind, runs in _by_kind(results).items()
    }
    return {
        method: sum(spent[name] for name in chain) / spent["kd"]
        for method, chain in CHAINS.items()
        if spent.keys() >= {"kd", *chain}
    }


def _by_kind(results: Path) -> dict[str, list[dict]]:
    """The kept results by what they are runs of, one for each seed (of the bank: and rate)."""
    groups: dict[str, list[dict]] = {}
    for name, result in read_results(results).items():
        end = f"_s{result['provenance']['seed']}"
        kind = name.partition("_R")[0].removesuffix(end).removesuffix(FEW)
        groups.setdefault(kind, []).append(result)
    return groups


def cifar_line(module: str, doc: str) -> argparse.ArgumentParser:
    """The parser of a study of CIFAR-100, with what every such study can be told."""
    parser = command_line(module, doc)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="as for training.classify")
    add("--jobs", type=int, default=2, help="runs at a time, one thread each")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where all of them train")
    add("--logs", type=Path, default=Path("logs/cifar100"), metavar="DIR", help="of the runs")
    add("--results", type=Path, metavar="DIR", help="of the tables [results/cifar100]")
    add("--epochs", type=int, help="a trial: so many epochs of everything")
    add("--subset", type=int, default=0, help="a trial: so many training images")
    add("--dry-run", action="store_true", help="print the commands that are left and their cost")
    return parser


def check_data(data: Path) -> None:
    """Refuse a folder without both splits of CIFAR-100.

    Raises:
        UsageError: it has no such split.
    """
    from training.classifier.cifar import SPLITS, find_cifar100  # takes seconds to import

    for split in SPLITS:
        find_cifar100(data, split)


def main(argv: list[str]) -> int:
    """Execute what is missing; exit 0 when everything is there."""
    parser = cifar_line("experiments.cifar100", __doc__)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first one's teacher teaches")
    add("--few", type=int, default=0, help="students train on N images; 0: on all")
    args = parser.parse_args(argv)
    from eval.report import main as report  # takes seconds to import

    check_data(args.data)
    results = args.results or Path(f"results/cifar100{FEW if args.few else ''}")
    runs = plan(args.seeds, args.epochs, args.subset, args.few, args.device)
    study = Study(runs, args.logs, args.data, results, keep_results)
    if args.dry_run:
        study.dry_run()
        return 0
    if sentence := study.complete():
        print(sentence, flush=True)
    if not study.execute(args.jobs):
        return STOPPED
    by_seed = to_markdown(results)
    print(by_seed)
    write_text(
        results / "table.md",
        "CIFAR-100: percent, mean ± standard deviation over n seeds; −: the mean of the "
        "differences seed by seed ± half of its 95 % t-interval.\n\n" + by_seed,
    )
    if not args.few:  # whose assistants are trained on more images than they are
        times_kd = costs(results)
        write_result(results / "costs.json", {"times kd, cpu time": times_kd})
        print("cost, × KD:", ", ".join(f"{k} {v:.2f}" for k, v in times_kd.items()))
    report([str(results), f"--out={results / 'report.html'}", "--title=CIFAR-100"])
    return 0


if __name__ == "__main__":
    cli(main)
