"""``python -m experiments.every_method``: every method for some hundred steps on real data.

CIFAR-100 as image-text pairs and Flickr8k with its five captions, through ``training.main`` alone:
two teachers, an RDM bank, then a student under each method. Stopped, it goes on where it was. What
each run's loss did is written to ``--json`` with the commands that made it.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from training.data.index import index_shards
from training.engine.environment import environment
from training.errors import Failure, UsageError, cli

MODELS = Path(os.path.relpath(Path(__file__).parent.parent / "demo" / "models"))
METHODS = ("none", "kd", "fd", "clipkd", "tinyclip", "mobileclip", "cifd")
SIZES = {"cifar100": 32, "flickr8k": 64}


def main(argv: list[str]) -> None:
    """Run what is not finished yet, then write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar100", metavar="SHARDS", help="training shards of CIFAR-100")
    parser.add_argument("--flickr8k", metavar="SHARDS", help="training shards of Flickr8k")
    parser.add_argument("--out", type=Path, default=Path("logs/every_method"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--index-dir", help="where shard indexes go [beside the shards]")
    parser.add_argument("--json", type=Path, default=Path("results/every_method.json"))
    args = parser.parse_args(argv)
    given = {data: getattr(args, data) for data in SIZES if getattr(args, data)}
    if not given:
        raise UsageError("--cifar100 SHARDS or --flickr8k SHARDS, or both, are needed")
    record = {"data": {}, "runs": {}}
    if args.json.is_file():  # what it says of the other data set stays
        record |= json.loads(args.json.read_text())
    record |= {"environment": environment(), "seed": 0}
    for data, shards in given.items():
        sources = index_shards(shards, cache_dir=args.index_dir)
        record["data"][data] = sources.fingerprint()
        record["runs"][data] = run_all(args, data, shards)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(record, indent=2) + "\n")


def run_all(args: argparse.Namespace, data: str, shards: str) -> dict[str, dict]:
    """Every run on one data set; name → command, first and last losses."""
    out = args.out / data
    common = [
        f"--train-data={shards}", f"--logs={out}", "--epochs=1", "--resume=latest",
        f"--train-num-samples={args.steps * args.batch_size}", f"--batch-size={args.batch_size}",
        f"--workers={args.workers}", "--log-every-n-steps=50", "--captions=all",
        f"--force-image-size={SIZES[data]}", "--force-context-length=32",
        "--model-config", f"{MODELS}/teacher.json", f"{MODELS}/student.json",
    ]  # fmt: skip
    if args.index_dir:
        common.append(f"--index-dir={args.index_dir}")
    first, second = (f"local-dir:{out}/teacher{i}/student" for i in (0, 1))
    runs = {
        "teacher0": ["--model=teacher"],
        "teacher1": ["--model=teacher", "--seed=1"],
        "rdm": ["--distill=rdm", f"--distill-model={first}", "--rates", "1000", "100", "30"],
    }
    for method in METHODS:
        flags = ["--model=student", f"--distill={method}"]
        if method == "mobileclip":
            flags.append(f"--distill-model={first},{second}")
        elif method != "none":
            flags.append(f"--distill-model={first}")
        if method == "cifd":
            flags.append(f"--rdm-bank={out}/rdm/bank")
        runs[method] = flags
    return {name: run(out / name, [*common, *flags]) for name, flags in runs.items()}


def run(directory: Path, flags: list[str]) -> dict:
    """One run of ``training.main``, which ends at once if it is finished; what its losses did."""
    command = ["-m", "training.main", *flags, f"--name={directory.name}"]
    if subprocess.run([sys.executable, *command]).returncode:
        raise Failure(f"{directory} failed; its message is above")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    terms = [name for name in steps[0] if name.endswith("loss") or "/R=" in name]
    made = json.loads((directory / "environment.json").read_text())[-1]
    return {
        "commit": made["commit"],
        "command": " ".join(["python", *command]),
        "steps": steps[-1]["step"],
        "first": {name: steps[0][name] for name in terms},
        "last": {name: steps[-1][name] for name in terms},
        "samples_per_s": steps[-1]["samples_per_s"],
    }


if __name__ == "__main__":
    cli(main)
