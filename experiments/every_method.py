"""``python -m experiments.every_method``: every method for some hundred steps on real data.

CIFAR-100 as image-text pairs and Flickr8k with its five captions, through training.main alone: two
teachers, an RDM bank, then a student under each method. Stopped, it goes on where it was. What each
run's losses did is written to --json with the commands that made it.
"""

import argparse
import os
from pathlib import Path

from cifd_clip.files import read_json, write_json
from experiments.study import STOPPED, Run, Study, command_line, metrics
from training.engine.environment import cores, environment
from training.errors import UsageError, cli

MODELS = Path(os.path.relpath(Path(__file__).parent.parent / "demo" / "models"))
RECORD = Path("results/every_method.json")
SIZES = {"cifar100": 32, "flickr8k": 64}


def plan(args: argparse.Namespace, data: str, shards: str) -> list[Run]:
    """Two teachers, the bank of the first and a student under every method, on one data set."""
    from cifd_clip import METHODS

    where = (
        f"--train-data={shards}", "--logs={logs}", "--name={name}", "--resume=latest",
        f"--workers={args.workers}", *([f"--index-dir={args.index_dir}"] if args.index_dir else []),
    )  # fmt: skip
    common = (
        "--epochs=1", f"--train-num-samples={args.steps * args.batch_size}",
        f"--batch-size={args.batch_size}", "--log-every-n-steps=50", "--captions=all",
        f"--force-image-size={SIZES[data]}", "--force-context-length=32",
        "--model-config", f"{MODELS}/teacher.json", f"{MODELS}/student.json",
    )  # fmt: skip
    first = "--distill-model=local-dir:{teacher0}/student"
    both = f"{first},local-dir:{{teacher1}}/student"
    runs = {
        "teacher0": ("--model=teacher",),
        "teacher1": ("--model=teacher", "--seed=1"),
        "rdm": ("--distill=rdm", first, "--rates", "1000", "100", "30"),
    }
    for method in METHODS:
        taught = {"none": [], "mobileclip": [both]}.get(method, [first])
        bank = ["--rdm-bank={rdm}/bank"] if method == "cifd" else []
        runs[method] = ("--model=student", f"--distill={method}", *taught, *bank)
    return [
        Run(name, "training.main", (*common, *flags), where=where) for name, flags in runs.items()
    ]


def record(study: Study, run: Run) -> dict:
    """What the losses of a finished run did: the first and the last logged."""
    lines = metrics(study.logs / run.name)
    first, last = lines[0], lines[-1]
    terms = [name for name in first if name.endswith("loss") or "/R=" in name]
    return {
        **study.origin(run),
        "steps": last["step"],
        "first": {name: first[name] for name in terms},
        "last": {name: last[name] for name in terms},
        "samples_per_s": last["samples_per_s"],
    }


def main(argv: list[str]) -> int:
    """Execute what is missing, then write the record."""
    parser = command_line("experiments.every_method", __doc__)
    add = parser.add_argument
    add("--cifar100", metavar="SHARDS", help="training shards of CIFAR-100")
    add("--flickr8k", metavar="SHARDS", help="training shards of Flickr8k")
    add("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    add("--out", type=Path, default=Path("logs/every_method"), metavar="DIR", help="of the runs")
    add("--steps", type=int, default=300, help="of each run")
    add("--batch-size", type=int, default=64, help="of each step")
    add("--workers", type=int, default=1, help="processes that decode, of each run")
    add("--index-dir", metavar="DIR", help="where shard indexes go [beside the shards]")
    add("--json", type=Path, default=RECORD, metavar="FILE", help="the record")
    args = parser.parse_args(argv)
    given = {data: getattr(args, data) for data in SIZES if getattr(args, data)}
    if not given:
        raise UsageError("--cifar100 SHARDS or --flickr8k SHARDS, or both, are needed")
    from training.data.index import index_shards

    content = {"data": {}, "runs": {}}
    if args.json.is_file():  # what it says of the other data set stays
        content |= read_json(args.json)
    content |= {"environment": environment(), "seed": 0}
    for data, shards in given.items():
        content["data"][data] = index_shards(shards, cache_dir=args.index_dir).fingerprint()
        study = Study(plan(args, data, shards), args.out / data)
        if not study.execute(args.jobs, max(1, cores() // max(1, args.jobs)), show=args.jobs == 1):
            return STOPPED
        content["runs"][data] = {r.name: record(study, r) for r in study.runs.values()}
    write_json(args.json, content)
    return 0


if __name__ == "__main__":
    cli(main)
