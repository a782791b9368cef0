"""``python -m experiments.every_classifier``: every method on the networks of Tables 2 and 3.

For two hundred steps each, with the weights of A.1.2 and A.2: CIFAR-100's networks on its images,
ImageNet's on generated photos in its layout. What each run's losses did is written to ``--json``.
Stopped, it goes on where it was.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.runs import Queue, Run, curve, is_finished, write_json
from training.engine.control import STOPPED_EXIT
from training.engine.environment import environment
from training.errors import UsageError, cli

PAIRS = [
    ("cifar100", "wrn_40_2", "wrn_40_1"),
    ("cifar100", "resnet32x4", "resnet8x4"),
    ("imagenet", "resnet34", "resnet18"),
    ("imagenet", "resnet50", "mobilenetv1_100"),
]
EVERY_RUN = "--precision bf16 --lr 0.01 --grad-clip-norm 5 --seed 0"
DATA = {
    "cifar100": "--dataset cifar100 --subset 800 --augment crop --batch-size 16 --epochs 4",
    "imagenet": "--dataset imagenet --workers 1 --batch-size 2 --epochs 8",
}
ASSISTANTS = "--opt adamw --lr 1e-3 --precision fp32"
BANKS = {
    "cifar100": "--rdm-form reconstruct --rates 1.0 0.8 0.6 --tau 2",
    "imagenet": "--rdm-form reconstruct --rates 10000 5000 1000 --embedding-loss smooth_l1 --tau 2",
}
CIFD = {
    "cifar100": "--lambda-emb 100 --lambda-i 0.005 --tau 2 --kd-dropout 0.25",
    "imagenet": "--lambda-emb 100 --lambda-i 0.001 --tau 2 --kd-dropout 0.25 "
    "--embedding-loss smooth_l1",
}
#: Generated photos: a class is a colour and a pattern of stripes, a photo of it their place.
CLASSES, PER_CLASS, SIDE = 10, 5, 256


def plan(dataset: str, teacher: str, student: str) -> list[Run]:
    """A teacher, its RDMs and paraphraser, and a student under every method.

    Between them TAKD and DGKD have the plain student: no network of these families lies between.
    """
    names = {kind: f"{teacher}_{kind}" for kind in ("teacher", "rdm", "paraphraser")}
    names |= {m: f"{student}_{m}" for m in ("none", "kd", "takd", "dgkd", "ft", "cifd")}
    here = {kind: f"{{{name}}}" for kind, name in names.items()}
    under, chain = f"--teacher={here['teacher']}", f"--teacher={here['teacher']},{here['none']}"
    wanted = [
        ("teacher", "none", f"--model={teacher}", ""),
        ("none", "none", f"--model={student}", ""),
        ("rdm", "rdm", under, f"{BANKS[dataset]} {ASSISTANTS}"),
        ("paraphraser", "paraphraser", under, ASSISTANTS),
        ("kd", "kd", under, f"--model={student} --tau 2"),
        ("takd", "takd", chain, f"--model={student} --tau 2"),
        ("dgkd", "dgkd", chain, f"--model={student} --tau 2 --kd-dropout 0.25"),
        ("ft", "ft", under, f"--model={student} --paraphraser={here['paraphraser']}"),
        ("cifd", "cifd", under, f"--model={student} --rdm-bank={here['rdm']} {CIFD[dataset]}"),
    ]
    where = (
        *("--data={data}/" + dataset, "--logs={logs}", "--name={name}", "--resume=latest"),
        "--device=cpu",
    )
    runs = []
    for kind, method, place, flags in wanted:
        made = f"--method={method} {EVERY_RUN} {DATA[dataset]} {flags} {place}".split()
        needs = tuple(name for k, name in names.items() if here[k] in f"{place} {flags}")
        runs.append(Run(names[kind], "training.classify", tuple(made), needs, where=where))
    return runs


def draw_photos(directory: Path) -> None:
    """``train/`` and ``val/`` in ImageNet's layout; the same pixels every time."""
    rng = np.random.default_rng(0)
    across = np.arange(SIDE)
    for label in range(CLASSES):
        colour = rng.integers(64, 256, 3)
        step = rng.normal(size=2) * 0.2
        for i in range(PER_CLASS + 1):
            phase = rng.uniform(0, 2 * np.pi)
            stripes = np.sin(step[0] * across[:, None] + step[1] * across + phase)
            pixels = (colour * (stripes[..., None] + 1) / 2).astype(np.uint8)
            split = "train" if i < PER_CLASS else "val"
            path = directory / split / f"n{label:08d}" / f"n{label:08d}_{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


def record(run: Run, data: Path, logs: Path) -> dict:
    """What the losses of a finished run did, epoch by epoch."""
    lines = (logs / run.name / "metrics.jsonl").read_text().splitlines()
    terms = [name for name in json.loads(lines[0]) if name.endswith(("loss", "acc1", "bits"))]
    made = json.loads((logs / run.name / "environment.json").read_text())[-1]
    return {
        "command": " ".join(["python", *run.command(data, logs)]),
        "commit": made["commit"],
        "epochs": curve(logs / run.name, ("step", *terms)),
    }


def main(argv: list[str]) -> int:
    """Make what is missing, then write the record."""
    parser = argparse.ArgumentParser(prog="python -m experiments.every_classifier")
    parser.description = __doc__
    parser.add_argument("--cifar100", type=Path, required=True, help="CIFAR-100's folder")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--logs", type=Path, default=Path("logs/every_classifier"))
    parser.add_argument("--json", type=Path, default=Path("results/every_classifier.json"))
    args = parser.parse_args(argv)
    data = args.logs / "data"
    if not args.cifar100.is_dir():
        raise UsageError(f"--cifar100 '{args.cifar100}': no such folder")
    if not (data / "imagenet").is_dir():
        draft = data / "imagenet.draft"
        shutil.rmtree(draft, ignore_errors=True)
        draw_photos(draft)
        draft.rename(data / "imagenet")
    (data / "cifar100").unlink(missing_ok=True)
    (data / "cifar100").symlink_to(args.cifar100.resolve())
    runs = [run for pair in PAIRS for run in plan(*pair)]
    todo = [run for run in runs if not is_finished(run, args.logs)]
    if not Queue(todo, data, args.logs, args.jobs, lambda run: None).run():
        return STOPPED_EXIT
    made = {run.name: record(run, data, args.logs) for run in runs}
    write_json(args.json, {"environment": environment(), "runs": made})
    for name, entry in made.items():
        losses = entry["epochs"]["loss"]
        print(f"{name:28} loss {losses[0]:9.4g} -> {losses[-1]:9.4g}")
    return 0


if __name__ == "__main__":
    cli(main)
