"""``python -m experiments.every_classifier``: every method on the networks of Tables 2 and 3.

For two hundred steps each, with the weights of A.1.2 and A.2: CIFAR-100's networks on its images,
ImageNet's on generated photos in its layout. What each run's losses did is written to --json.
Stopped, it goes on where it was.
"""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.classifiers import BF16, classifier
from experiments.study import STOPPED, Run, Study, command_line, curve, metrics, write_result
from training.engine.environment import environment
from training.errors import UsageError, cli

PAIRS = [
    ("cifar100", "wrn_40_2", "wrn_40_1"),
    ("cifar100", "resnet32x4", "resnet8x4"),
    ("imagenet", "resnet34", "resnet18"),
    ("imagenet", "resnet50", "mobilenetv1_100"),
]
EVERY_RUN = f"{BF16} --lr 0.01 --grad-clip-norm 5 --seed 0"
DATA = {
    "cifar100": "--dataset cifar100 --subset 800 --augment crop --global-batch 16 --epochs 4",
    "imagenet": "--dataset imagenet --workers 1 --global-batch 2 --epochs 8",
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
    large, plain = f"{teacher}_teacher", f"{student}_none"

    def run(name: str, method: str, settings: str, model: str, *teachers: str) -> Run:
        settings, data = f"{EVERY_RUN} {DATA[dataset]} {settings}", "{data}/" + dataset
        return classifier(name, method, settings, model, teachers, data=data)

    def taught(method: str, settings: str, *assistants: str) -> Run:
        return run(f"{student}_{method}", method, settings, student, large, *assistants)

    return [
        run(large, "none", "", teacher),
        run(plain, "none", "", student),
        run(f"{teacher}_rdm", "rdm", f"{BANKS[dataset]} {ASSISTANTS}", "", large),
        run(f"{teacher}_paraphraser", "paraphraser", ASSISTANTS, "", large),
        taught("kd", "--tau 2"),
        taught("takd", "--tau 2", plain),
        taught("dgkd", "--tau 2 --kd-dropout 0.25", plain),
        taught("ft", f"--paraphraser={{{teacher}_paraphraser}}"),
        taught("cifd", f"--rdm-bank={{{teacher}_rdm}} {CIFD[dataset]}"),
    ]


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


def prepare(data: Path, cifar100: Path) -> None:
    """The generated photos and a link to CIFAR-100."""
    if not (data / "imagenet").is_dir():
        draft = data / "imagenet.draft"
        shutil.rmtree(draft, ignore_errors=True)
        draw_photos(draft)
        draft.rename(data / "imagenet")
    (data / "cifar100").unlink(missing_ok=True)
    (data / "cifar100").symlink_to(cifar100.resolve())


def record(study: Study, run: Run) -> dict:
    """What the losses of a finished run did, epoch by epoch."""
    directory = study.logs / run.name
    terms = [name for name in metrics(directory)[0] if name.endswith(("loss", "acc1", "bits"))]
    return {**study.origin(run), "epochs": curve(directory, ("step", *terms))}


def main(argv: list[str]) -> int:
    """Execute what is missing, then write the record."""
    parser = command_line("experiments.every_classifier", __doc__)
    add = parser.add_argument
    add("--cifar100", type=Path, required=True, metavar="DIR", help="CIFAR-100's folder")
    add("--jobs", type=int, default=2, help="runs at a time, one thread each")
    logs, kept = Path("logs/every_classifier"), Path("results/every_classifier.json")
    add("--logs", type=Path, default=logs, metavar="DIR", help="of the runs")
    add("--json", type=Path, default=kept, metavar="FILE", help="the record")
    args = parser.parse_args(argv)
    if not args.cifar100.is_dir():
        raise UsageError(f"--cifar100 '{args.cifar100}': no such folder")
    runs = [run for pair in PAIRS for run in plan(*pair)]
    study = Study(runs, args.logs, args.logs / "data")
    prepare(study.data, args.cifar100)
    if not study.execute(args.jobs):
        return STOPPED
    records = {run.name: record(study, run) for run in runs}
    write_result(args.json, {"environment": environment(), "runs": records})
    for name, entry in records.items():
        losses = entry["epochs"]["loss"]
        print(f"{name:28} loss {losses[0]:9.4g} -> {losses[-1]:9.4g}")
    return 0


if __name__ == "__main__":
    cli(main)
