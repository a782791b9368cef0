"""``python -m experiments.caches``: students from other kinds of cache against those from float16.

A teacher, its bank, a cache of every kind, and from each a student of every seed, on pairs of which
a tenth is held out. --json says what students recall of those, and what the code takes and keeps.
"""

import os
import time
from pathlib import Path
from statistics import fmean

import torch

from cifd_clip.artefact import MODALITIES
from cifd_clip.files import write_json
from experiments.seeds import spread
from experiments.study import STOPPED, Run, Study, command_line
from training.clip.cache import read_embeddings
from training.engine.environment import environment
from training.engine.run import read_metrics
from training.errors import cli
from training.intervals import paired

MODELS = Path(os.path.relpath(Path(__file__).parent.parent / "demo" / "models"))
#: Kinds of cache: their flags. The first is what the others are compared with.
KINDS = {
    "float16": (),
    "coded": ("--code-with={bank}",),
    "stored": ("--store-views",),
    "torch": ("--image-backend=torch",),
}
HELD = "--val-fraction=0.1"


def plan(data: str, epochs: int, seeds: int) -> list[Run]:
    """Teacher, bank, caches and students."""
    where = ("--logs={logs}", "--name={name}", "--resume=latest", "--workers=1")
    common = (f"--train-data={data}", "--captions=all", "--force-image-size=64", "--lr=2e-3",
              "--force-context-length=32", "--batch-size=128",
              "--model-config", f"{MODELS}/teacher.json", f"{MODELS}/student.json")  # fmt: skip
    taught = (*common, "--distill-model={teacher}")
    teacher = (*common, HELD, "--model=teacher", f"--epochs={2 * epochs}")
    bank = (*taught, HELD, "--distill=rdm", "--rates", "3000", "300", f"--epochs={epochs}")
    runs = [
        Run("teacher", "training.main", teacher, where),
        Run("bank", "training.main", bank, where),
    ]
    for kind, own in KINDS.items():
        cache = (*taught, "--views=4", "--teacher-cache={here}/cache", *own)
        runs.append(Run(kind, "training.cache_teacher", cache, ("--workers=1",)))
        student = (*common, HELD, "--model=student", "--distill=fd", f"--epochs={epochs}")
        student += (f"--teacher-cache={{{kind}}}/cache", "--in-memory")
        for seed in range(seeds):
            flags = (*student, f"--seed={seed}")
            runs.append(Run(f"{kind}-{seed}", "training.main", flags, where))
    return runs


def recall(run: Path) -> float:
    """Mean recall of the held-out pairs after the last epoch, in percent."""
    last = [line for line in read_metrics(run) if line["kind"] == "val"][-1]
    return 100 * fmean(value for name, value in last.items() if "_retrieval_recall" in name)


def code(logs: Path) -> dict[str, float]:
    """Bits an embedding, rows that one core reads a second, and 1 − cosine to the teacher's."""
    torch.set_num_threads(1)
    count = bits = seconds = away = 0.0
    for path in (logs / "coded/cache").glob("*-*.safetensors"):
        stored, coded = (
            read_embeddings(logs / kind / "cache" / path.name) for kind in ("float16", "coded")
        )
        bits += 8 * path.stat().st_size
        for modality in MODALITIES:
            start = time.perf_counter()
            rows = coded[modality][:, :]
            seconds += time.perf_counter() - start
            away += float((1 - (rows.astype(float) * stored[modality]).sum(-1)).sum())
            count += rows[..., 0].size
    sizes = {"bits": bits / count, "float16_bits": 16 * rows.shape[-1]}
    return sizes | {"rows_per_s": count / seconds, "1_minus_cosine_to_teacher": away / count}


def main(argv: list[str]) -> int:
    """Execute what is missing, then compare."""
    parser = command_line("experiments.caches", __doc__)
    add = parser.add_argument
    add("--train-data", required=True, metavar="SHARDS", help="of images and captions")
    add("--logs", type=Path, default=Path("logs/caches"), metavar="DIR", help="of the runs")
    add("--epochs", type=int, default=20, help="of bank and students; twice that of the teacher")
    add("--seeds", type=int, default=3, help="of students")
    add("--jobs", type=int, default=2, help="runs at a time, one thread each")
    add("--json", type=Path, default=Path("results/caches.json"), metavar="FILE")
    args = parser.parse_args(argv)
    study = Study(plan(args.train_data, args.epochs, args.seeds), args.logs)
    if not study.execute(args.jobs):
        return STOPPED
    recalls = {k: {s: recall(args.logs / f"{k}-{s}") for s in range(args.seeds)} for k in KINDS}
    apart = {kind: paired(own, recalls["float16"]) for kind, own in recalls.items()}
    content = {"recall": recalls, "difference to float16": apart, "code": code(args.logs)}
    write_json(args.json, {"environment": environment(), **content})
    for kind, own in recalls.items():
        print(f"{kind}: {spread(own.values())}, to float16 {apart[kind]}")
    print(content["code"])
    return 0


if __name__ == "__main__":
    cli(main)
