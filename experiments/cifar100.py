"""``python -m experiments.cifar100``: the runs behind Tables 1 and 6 and Figure 5, over seeds.

Every seed has its teacher and a two-layer student under every method. All students learn from the
first seed's teacher, its RDM bank and its assistants of TAKD and DGKD. Each run is an ordinary
command of ``training.classify``. Stopped, the study goes on where it was. What a run gave is kept
in ``--results`` as soon as it ends: a run with a result is made again only when another run needs
its weights and they are not in ``--logs``.
"""

import argparse
import json
import shlex
from pathlib import Path
from statistics import mean

from eval import classifier_bank
from eval.report import main as report
from eval.tables import markdown
from experiments.runs import (
    Queue,
    Run,
    all_there,
    check_settings,
    curve,
    is_finished,
    outstanding,
    priorities,
    write_json,
)
from experiments.seeds import paired, summarise, told
from training.classifier.cifar import SPLITS, find_cifar100
from training.classifier.config import parse_args, parser, run_config
from training.engine.control import STOPPED_EXIT
from training.engine.run import RunDirectory
from training.errors import cli

__all__ = ["check_settings", "costs", "keep_results", "outstanding", "plan", "priorities"]

TEACHER, STUDENT = "cnn10", "cnn2"
#: The RDMs of a student with one, three and five of them; the bank has all of these rates. At
#: R <= 3 a module collapses to 0 bits (results/cifar100/tuning).
RATES = {1: [50], 3: [20, 50, 150], 5: [10, 20, 50, 150, 500]}

# The settings, chosen on held-out training images (results/cifar100/tuning); later groups win. What
# is held out stays out, as in A.2: a teacher that has not seen it can go on to tune students.
EVERY_RUN = (
    "--batch-size 128 --momentum 0.9 --wd 1e-4 --augment flip --precision bf16 --holdout 2500"
)
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
DEEP = "--epochs 5 --lr 0.03 --wd 5e-4 --batch-size 64 --warmup-epochs 1 --grad-clip-norm 5"
SMALL = "--warmup-epochs 1 --grad-clip-norm 5 --lambda-kl 0.25"
TEACHING = f"{DEEP} --epochs 16 --augment crop"
MODELS = {"cnn10": TEACHING, "cnn8": DEEP, "cnn6": DEEP, "cnn4": DEEP, "cnn2": SMALL}
#: What marks a student who sees a part of the images, and for how long: until it knows them.
FEW, LONGER = "_few", "--epochs 30"
#: About how long a run takes, in minutes.
COST = {"cnn10": 29, "cnn8": 6.5, "cnn6": 5.5, "cnn4": 4, "cnn2": 3, "": 7}
WHERE = (
    "--data={data}",
    "--logs={logs}",
    "--name={name}",
    "--resume=latest",
    "--teacher-cache={logs}/answers",
    "--device=cpu",
)


def plan(seeds: list[int], epochs: int | None = None, subset: int = 0, few: int = 0) -> list[Run]:
    """All runs, in an order in which every run comes after those it needs.

    Args:
        seeds: of the students; the first one's teacher and assistants teach them all.
        epochs, subset: fewer of everything, for a trial.
        few: how many images students train on, whose teachers see all; 0: all as well.
    """
    runs: list[Run] = []

    def add(
        name: str, seed: int, method: str, model: str, teachers: list[str], *flags: str, **other
    ) -> str:
        settings = [EVERY_RUN, CLASSIFIERS if model else "", MODELS.get(model, "")]
        settings.append(SETTINGS[other.get("settings", method)])
        if few and model == STUDENT:
            settings.append(f"--subset {few} {LONGER}")
        if epochs:  # perhaps no more than a warm-up takes
            settings.append(f"--epochs {epochs} --warmup-epochs 0")
        if subset:
            settings.append(f"--subset {subset}")
        made = [f"--method={method}", *shlex.split(" ".join(settings)), f"--seed={seed}", "--final"]
        if model:
            made.append(f"--model={model}")
        if teachers:
            made.append("--teacher=" + ",".join(f"{{{t}}}" for t in teachers))
        results = other.get("results", ("result.json",))
        needs = (*teachers, *other.get("needs", ()))
        name += f"{FEW if few and model == STUDENT else ''}_s{seed}"
        cost = COST[model]
        runs.append(
            Run(name, "training.classify", (*made, *flags), needs, results, cost, where=WHERE)
        )
        return name

    first = seeds[0]
    taught = seeds[:1] if few else seeds
    teacher, *_ = [add("teacher", seed, "none", TEACHER, []) for seed in taught]
    shared = add("cnn8_kd", first, "kd", "cnn8", [teacher])
    chains = {}
    for method in ("takd", "dgkd"):  # TAKD reads the last of them, DGKD all
        chains[method] = [teacher, shared]
        for model in ("cnn6", "cnn4"):
            chain = chains[method]
            chain.append(add(f"{model}_{method}", first, method, model, [*chain]))
    bank_rates = sorted({rate for rates in RATES.values() for rate in rates})
    files = tuple(f"result_R{rate:g}.json" for rate in bank_rates)
    every_rate = ("--rates", *map(str, bank_rates))
    bank = add("rdm", first, "rdm", "", [teacher], *every_rate, results=files)

    for seed in seeds:
        add("student", seed, "none", STUDENT, [])
        add("kd", seed, "kd", STUDENT, [teacher])
        for method, chain in chains.items():
            add(method, seed, method, STUDENT, chain)
        add("ibm", seed, "cifd", STUDENT, [teacher], settings="ibm")
        for count, rates in RATES.items():
            picked = [f"--rdm-bank={{{bank}}}", "--rates", *map(str, rates)]
            name = f"cifd{count}"
            add(name, seed, "cifd", STUDENT, [teacher], *picked, needs=(bank,))
            without = [*picked, "--no-ibm"]
            add(f"{name}_noibm", seed, "cifd", STUDENT, [teacher], *without, needs=(bank,))
    return runs


def keep_results(run: Run, data: Path, logs: Path, results: Path) -> None:
    """Copy a finished run's results, with its flags and the essence of its log.

    Raises:
        UsageError: its run directory was made with other settings.
    """
    if not is_finished(run, logs):
        return
    directory = logs / run.name
    config = run_config(parse_args(run.command(data, logs)[2:]))
    RunDirectory(directory, config, parser(), resume=True)
    for file, kept in run.kept(results).items():
        if not kept.is_file():
            result = json.loads((directory / file).read_text())
            added = {"flags": run.depends, "curve": curve(directory, ("step", "loss", "acc1"))}
            write_json(kept, result | added)
    out = results / "bank" / f"{run.name}.json"
    if run.name.startswith("rdm") and not out.is_file():
        classifier_bank.main([str(directory), f"--data={data}", f"--out={out}"])


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


def table(results: Path) -> str:
    """Tables 1 and 6 over seeds, as Markdown: test top-1, paired differences, training top-1."""
    groups = _by_kind(results)
    test, train = (
        {
            name: {one["seed"]: 100 * one[metrics]["acc1"] for one in runs}
            for name, runs in groups.items()
        }
        for metrics in ("metrics", "train_metrics")
    )

    def over(name: str, other: str | None) -> str:
        return told(paired(test[name], test[other])) if other in test else ""

    heads = ["", "n", "test top-1", "− KD", "− the same without IBM", "on training images"]
    lines = [heads, ["---", *["---:"] * 5]]
    for row, name in ROWS.items():
        if name in groups:
            spread, seen = told(summarise([*test[name].values()])), mean(train[name].values())
            over_kd = over(name, None if name in ("teacher", "kd") else "kd")
            ibm = over(name, "kd" if name == "ibm" else f"{name}_noibm")
            lines.append([row, str(len(test[name])), spread, over_kd, ibm, f"{seen:.1f}"])
    return markdown(lines)


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
        kind: mean(run["provenance"]["cpu_seconds"] for run in runs)
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
    for path in sorted((results / "runs").glob("*.json")):
        result = json.loads(path.read_text())
        kind = path.stem.partition("_R")[0].removesuffix(f"_s{result['seed']}")
        groups.setdefault(kind.removesuffix(FEW), []).append(result)
    return groups


def main(argv: list[str]) -> int:
    """Make what is missing; exit 0 when everything is there."""
    parser = argparse.ArgumentParser(prog="python -m experiments.cifar100", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-100 (training.classify)")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="the first one's teacher teaches all",
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument(
        "--few", type=int, default=0, metavar="N", help="students train on N images [all]"
    )
    parser.add_argument("--logs", type=Path, default=Path("logs/cifar100"))
    parser.add_argument(
        "--results", type=Path, help="(default: results/cifar100, with _few for --few)"
    )
    parser.add_argument("--epochs", type=int, help="a trial: so many epochs of everything")
    parser.add_argument("--subset", type=int, default=0, help="a trial: so many training images")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that are left")
    args = parser.parse_args(argv)
    args.results = args.results or Path(f"results/cifar100{FEW if args.few else ''}")
    for split in SPLITS:
        find_cifar100(args.data, split)
    runs = plan(args.seeds, args.epochs, args.subset, args.few)
    check_settings(runs, args.results)

    def keep(run: Run) -> None:
        keep_results(run, args.data, args.logs, args.results)

    for run in runs:
        keep(run)
    if said := all_there(runs, args.results):
        print(f"# {said}" if args.dry_run else said, flush=True)
    todo = outstanding(runs, args.logs, args.results)
    if args.dry_run:
        for run in todo:
            print(shlex.join(["python", *run.command(args.data, args.logs)]))
        return 0
    if not Queue(todo, args.data, args.logs, args.jobs, keep).run():
        return STOPPED_EXIT
    told_by_seed = table(args.results)
    print(told_by_seed)
    (args.results / "table.md").write_text(
        "CIFAR-100: percent, mean ± standard deviation over n seeds; −: the mean of the "
        "differences seed by seed ± its standard error.\n\n" + told_by_seed
    )
    if not args.few:  # whose assistants are trained on more images than they are
        times_kd = costs(args.results)
        write_json(args.results / "costs.json", {"times kd, cpu time": times_kd})
        print("cost, × KD:", ", ".join(f"{k} {v:.2f}" for k, v in times_kd.items()))
    report([str(args.results), f"--out={args.results / 'report.html'}", "--title=CIFAR-100"])
    return 0


if __name__ == "__main__":
    cli(main)
