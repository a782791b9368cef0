"""What a bank of RDMs still knows of its teacher: zero-shot figures of every reconstruction.

::

    python -m eval.bank logs/bank --data-root DATA --datasets imagenet1k flickr30k

Each RDM stands where its teacher would: image embeddings through the image RDM, the prompts' and
captions' through the text RDM of the same rate, with rounding as in stage 2. So does the mean of
the teacher and all of them, to which squared errors pull a student (docs/paper.md, "Several
assistants are one barycentre"). The teacher is the one that the run's configuration names, and
must be the bank's. Written to ``RUN/results/bank``, one file for each data set: the metrics of all
of these, every assistant's bits, and for classification a t-SNE map of the embeddings of ten
classes. `eval.report` draws them.
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from sklearn.manifold import TSNE
from torch import Tensor

from cifd_clip import RDMBank
from cifd_clip.teacher import weights_hash
from eval import benchmark, datasets, metrics, models
from eval.datasets import Folder, Gap
from eval.models import Evaluated
from training.clip.config import bank_folder, holds_bank
from training.engine.environment import cores, origin
from training.errors import UsageError, cli, sentence

CLASSES, PER_CLASS = 10, 40  # of the t-SNE map


@dataclass
class LoadedBank:
    """A frozen bank with its teacher, on their device."""

    name: str
    out: Path
    bank: RDMBank
    weights: str
    teacher: Evaluated


def find(path: Path) -> Path:
    """The bank's folder: the path itself, or a run's ``bank`` or ``rdm/bank``."""
    folder = bank_folder(path)
    if holds_bank(folder):
        return folder
    raise UsageError(
        f"'{path}': expected a bank (bank.safetensors) or a run directory with bank/ or rdm/bank/; "
        "train one with --distill rdm"
    )


def load(path: Path, teacher: str | None, out: Path | None, device: torch.device) -> LoadedBank:
    """The bank of a run directory, and its teacher.

    Args:
        path: see `find`.
        teacher: what `eval.models.load` takes; None: what the run's configuration names.
        out: folder of results; None: the run's own.
        device: where both go.

    Raises:
        UsageError: no bank, no name of a teacher, or another teacher than the bank's.
    """
    folder = find(path)
    run = folder.absolute().parent
    config = run / "config.json"
    config = json.loads(config.read_text()) if config.is_file() else {}
    if out is None and not config:
        raise UsageError(f"'{path}': the bank is in no run directory; say --out FOLDER")
    evaluated = models.load(teacher or _teacher_of(path, config), device)
    identity = {"model": evaluated.name, "weights": evaluated.weights}
    try:
        bank = RDMBank.load(folder, identity).to(device)
    except ValueError as error:
        raise UsageError(f"'{path}': {error}; name the bank's own with --teacher") from error
    name = f"{run.parent.name}/rdm" if run.name == "rdm" else run.name
    return LoadedBank(name, out or run / "results", bank, weights_hash(bank), evaluated)


def _teacher_of(path: Path, config: dict) -> str:
    name, weights = config.get("distill_model"), config.get("distill_pretrained")
    if not name:
        raise UsageError(
            f"'{path}': the run names no teacher (it read a cache); say --teacher NAME:WEIGHTS or "
            "a model folder"
        )
    for file in filter(Path.is_file, map(Path, config.get("model_config") or [])):
        open_clip.add_model_config(file)
    return f"{name}:{weights}" if weights else name


def classifier(vectors: Tensor) -> Tensor:
    """Unit class embeddings (classes, D), the means over prompts (classes, templates, D)."""
    return F.normalize(vectors.mean(dim=1), dim=-1)


def measure(found: LoadedBank, folder: Folder, args, device: torch.device) -> dict:
    """The teacher's and every assistant's metrics on one data set, their bits, and a map."""
    if folder.task == "zeroshot_classification":
        texts = [t.format(c=name) for name in folder.classnames for t in folder.templates]
        labels = folder.labels()
    else:
        captions = folder.captions()
        texts = [caption for some in captions for caption in some]
        image_of = [i for i, some in enumerate(captions) for _ in some]
        image_of = torch.tensor(image_of, device=device)
    images = benchmark.embed_images(found.teacher, folder, args, device)
    texts = benchmark.embed_texts(found.teacher, texts, args, device)

    def scored(images: Tensor, texts: Tensor) -> dict[str, float | None]:
        if folder.task == "zeroshot_retrieval":
            return metrics.retrieval_metrics(images, texts, image_of)
        classes = classifier(texts.unflatten(0, (len(folder.classnames), -1)))
        logits = 100.0 * metrics.similarities(images, classes)
        return metrics.classification_metrics(logits.cpu(), labels)

    both = (found.bank.image, images), (found.bank.text, texts)
    assistants, embeddings, total = [], [images], [images, texts]
    for k, rate in enumerate(found.bank.rates):
        made = [reconstruct(modules, x, k, args.batch_size) for modules, x in both]
        bits = dict(zip(("image", "text"), (b for _, b in made)))
        assistants.append({"rate": rate, "bits": bits, "metrics": scored(*(x for x, _ in made))})
        embeddings.append(made[0][0])
        total = [so_far + x for so_far, (x, _) in zip(total, made)]
    mean = [F.normalize(x, dim=-1) for x in total]
    result = {
        "teacher": {"metrics": scored(images, texts)},
        "assistants": assistants,
        "mean": {"metrics": scored(*mean)},
    }
    if folder.task == "zeroshot_classification":
        names = ["teacher", *(f"{rate:g}" for rate in found.bank.rates)]
        result["map"] = embedding_map(embeddings, names, labels, folder.classnames)
    result["held"] = {"images": len(images), "texts": len(texts)}
    return result


@torch.no_grad()
def reconstruct(modules, embeddings: Tensor, k: int, batch: int) -> tuple[Tensor, float]:
    """Module k's unit embeddings (N, D) of unit embeddings (N, D), and bits per embedding."""
    vectors, nats = [], 0.0
    for some in embeddings.split(batch):
        vectors.append(modules.reconstruct(some)[k])
        nats += float(modules(some, None).nats[k].double().sum())
    return torch.cat(vectors), nats / math.log(2) / len(embeddings)


def embedding_map(
    embeddings: list[Tensor], names: list[str], labels: Tensor, classnames: list[str]
) -> dict:
    """t-SNE of a few images' embeddings: the teacher's first, the others from the teacher's layout.

    t-SNE's axes mean nothing; what starts from the same layout can be compared by eye.
    """
    present = labels.unique()
    spaced = torch.linspace(0, len(present) - 1, min(CLASSES, len(present))).long().unique()
    chosen = present[spaced]
    rows = torch.cat([(labels == c).nonzero()[:PER_CLASS, 0] for c in chosen])
    place = {int(c): i for i, c in enumerate(chosen)}
    points, start = {}, "pca"
    for name, vectors in zip(names, embeddings):
        points[name] = tsne(vectors[rows.to(vectors.device)].cpu().numpy(), start)
        if name == "teacher" and (spread := points[name][:, 0].std()):
            start = (points[name] / spread * 1e-4).astype(np.float32)  # as sklearn scales its own
    return {
        "classes": [classnames[int(c)] for c in chosen],
        "labels": [place[int(c)] for c in labels[rows]],
        "points": {name: np.round(p, 2).tolist() for name, p in points.items()},
    }


def tsne(vectors: np.ndarray, start) -> np.ndarray:
    """Points (N, 2) of unit vectors (N, D)."""
    perplexity = min(30.0, max(1.0, (len(vectors) - 1) / 3))
    if not np.ptp(vectors, axis=0).any():  # collapsed to one point
        return np.zeros((len(vectors), 2))
    made = TSNE(perplexity=perplexity, init=start, metric="cosine", random_state=0)
    return made.fit_transform(vectors.astype(np.float64))


def run(args, device: torch.device) -> list[str]:
    """Measure every bank on every data set; the gaps, one line each."""
    root = datasets.check_root(args.data_root)
    gaps = []
    for path in args.banks:
        found = load(path, args.teacher, args.out, device)
        for name in datasets.names(args.datasets):
            stem = "_".join(map(benchmark.slug, ("bank", name, args.split, found.name)))
            gap = found.out / "gaps" / f"{stem}_{found.weights[:10]}.json"
            try:
                folder = datasets.open_folder(root, name, args.split)
                told = measure_once(found, folder, args, device)
            except Gap as error:
                reason = sentence(error)
                gap.parent.mkdir(parents=True, exist_ok=True)
                line = {"dataset": name, "model": found.name, "gap": reason}
                gap.write_text(json.dumps(line, indent=2) + "\n")
                gaps.append(f"{found.name} on {name}: not evaluated: {reason}")
                print(gaps[-1], file=sys.stderr)
                continue
            gap.unlink(missing_ok=True)
            print(f"{found.name} on {name}: {told}", flush=True)
    return gaps


def measure_once(found: LoadedBank, folder: Folder, args, device: torch.device) -> str:
    """Write the result of one bank on one data set if it is not there; a line about it."""
    identity = {
        "weights": found.weights,
        "teacher": found.teacher.weights,
        "data": folder.fingerprint,
        "split": folder.split,
        "precision": args.precision,
    }
    key = hashlib.sha256(json.dumps([found.name, identity]).encode()).hexdigest()[:10]
    stem = "_".join(map(benchmark.slug, (folder.name, folder.split, found.name, key)))
    path = found.out / "bank" / f"{stem}.json"
    if path.exists():
        return f"measured already, skipped ({path})"
    result = measure(found, folder, args, device)
    held = result.pop("held")
    versions = {n: importlib.metadata.version(n) for n in (*benchmark.PACKAGES, "scikit-learn")}
    provenance = {
        **identity,
        **origin(),
        "source": found.teacher.source,
        "held": held,
        "device": device.type,
        "versions": versions,
    }
    head = {"task": folder.task, "dataset": folder.name, "model": found.name}
    benchmark.write_once(path, {**head, **result, "provenance": provenance})
    first = next(iter(result["teacher"]["metrics"]))
    figures = [f"R={a['rate']:g} {a['metrics'][first]:.4f}" for a in result["assistants"]]
    teacher = result["teacher"]["metrics"][first]
    return f"{first}: teacher {teacher:.4f}, {', '.join(figures)} ({path})"


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.bank",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("banks", nargs="+", type=Path, help="run directories with a bank, or banks")
    add("--data-root", type=Path, required=True, help="folder of the data sets")
    suites = ", ".join(datasets.SUITES)
    add("--datasets", nargs="+", required=True, help=f"names of folders, or suites: {suites}")
    add("--split", default="test", help="split folder to evaluate (default: %(default)s)")
    add("--teacher", help="NAME:WEIGHTS or a model folder, where the run names none")
    add("--out", type=Path, help="folder of results (default: RUN/results)")
    add(
        "--model-config",
        nargs="+",
        default=[],
        metavar="FILE.json",
        help="of a teacher that OpenCLIP lacks",
    )
    add("--precision", choices=benchmark.PRECISIONS, default="fp32", help="of the teacher's towers")
    add("--batch-size", type=int, default=256)
    add("--workers", type=int, default=min(4, cores()), help="processes that decode images")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Entry point of ``python -m eval.bank``; 1 when a data set could not be evaluated."""
    args = parse(argv)
    models.add_configs(args.model_config)
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise UsageError(f"--device '{args.device}': expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device '{device}': no GPU is to be seen here; use --device cpu")
    gaps = run(args, device)
    if gaps:
        print(f"{len(gaps)} of the evaluations asked for are gaps", file=sys.stderr)
    return 1 if gaps else 0


if __name__ == "__main__":
    cli(main)
