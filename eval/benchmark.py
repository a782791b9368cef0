"""Zero-shot evaluation of runs, checkpoints and OpenCLIP models, offline.

::

    python -m eval.benchmark logs/cifd logs/clipkd --data-root DATA --datasets paper
    python -m eval.benchmark ViT-B-16:datacomp_xl_s13b_b90k --data-root DATA --datasets imagenetv2

The data lie in clip_benchmark's WebDataset layout (NAME/test/0.tar, ...) or as their authors
distribute them (``eval/builders.py`` lists how); nothing is downloaded, and what can't be evaluated
is a named gap and exit code 1. Class names, templates and metrics are clip_benchmark's, and so is
the result's JSON (``clip_benchmark build`` takes it). A result's name holds what was evaluated
(model, weights, data, precision), so nothing is overwritten and a repeated evaluation is skipped. A
run's results go into ``RUN/results``. Processes of torchrun or srun share the evaluations, as do
the jobs of an array with --part.
"""

import argparse
import base64
import hashlib
import importlib.metadata
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import cache
from itertools import groupby, product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from eval import datasets, metrics, models
from eval.datasets import Folder, Gap
from eval.models import Evaluated
from eval.tables import UNPUBLISHED, WHOLE, shortfall
from training.engine.environment import cores, origin
from training.errors import UsageError, cli, sentence

PRECISIONS = {"fp32": None, "amp_bf16": torch.bfloat16, "amp": torch.float16}
PACKAGES = ("torch", "open_clip_torch", "clip-benchmark", "timm", "transformers", "numpy", "Pillow")
EXAMPLES = 9


class Classifiers:
    """Text embeddings of classes, each made once: ImageNet's variants share most of theirs."""

    def __init__(self, model: Evaluated, device: torch.device, precision: str, batch: int = 1024):
        self.model, self.device, self.precision, self.batch = model, device, precision, batch
        self.known: dict[tuple[str, tuple[str, ...]], torch.Tensor] = {}

    def __call__(self, classnames: list[str], templates: list[str]) -> torch.Tensor:
        """The classifier (D, classes): the normalised mean over templates of unit embeddings."""
        templates = tuple(templates)
        missing = [c for c in dict.fromkeys(classnames) if (c, templates) not in self.known]
        step = max(1, self.batch // len(templates))
        with torch.no_grad(), autocast(self.device, self.precision):
            for start in progress(range(0, len(missing), step), "classes"):
                some = missing[start : start + step]
                texts = [template.format(c=name) for name in some for template in templates]
                vectors = self.model.encode_text(texts, self.device)
                vectors = finite(vectors, "text", self.model).view(len(some), len(templates), -1)
                mean = torch.nn.functional.normalize(vectors.mean(dim=1), dim=-1)
                self.known.update({(c, templates): v for c, v in zip(some, mean)})
        return torch.stack([self.known[c, templates] for c in classnames], dim=1)


def autocast(device: torch.device, precision: str):
    """The forward pass's precision; similarities stay float32 whatever it is."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()


def progress(items, what: str):
    """A progress bar on a terminal, nothing elsewhere."""
    return tqdm(items, desc=what, leave=False, disable=None)


def embed_images(model: Evaluated, folder: Folder, args, device: torch.device) -> torch.Tensor:
    """Unit embeddings (N, D) of every image, in the folder's order."""
    loader = torch.utils.data.DataLoader(
        folder.images(model.transform), batch_size=args.batch_size, num_workers=args.workers
    )
    with torch.no_grad(), autocast(device, args.precision):
        batches = [model.encode_image(x.to(device)) for x in progress(loader, folder.name)]
    return finite(torch.cat(batches), "image", model)


def embed_texts(model: Evaluated, texts: list[str], args, device: torch.device) -> torch.Tensor:
    """Unit embeddings (M, D) of captions."""
    starts = progress(range(0, len(texts), args.batch_size), "captions")
    with torch.no_grad(), autocast(device, args.precision):
        batches = [model.encode_text(texts[s : s + args.batch_size], device) for s in starts]
    return finite(torch.cat(batches), "text", model)


def finite(embeddings: torch.Tensor, kind: str, model: Evaluated) -> torch.Tensor:
    """The embeddings (N, D), unless there are others than numbers: no comparison with them holds.

    Raises:
        Gap: saying how many.
    """
    bad = int((~embeddings.isfinite()).any(dim=-1).sum())
    if bad:
        raise Gap(
            f"{bad} of {len(embeddings)} {kind} embeddings of {model.name} are not finite: its "
            "weights are, or --precision overflows"
        )
    return embeddings


def classify(model: Evaluated, folder: Folder, classifiers: Classifiers, args, device):
    """Metrics of zero-shot classification, and what the data set held."""
    labels = folder.labels()
    classifier = classifiers(folder.classnames, folder.templates)
    images = embed_images(model, folder, args, device)
    logits = 100.0 * metrics.similarities(images, classifier.T)
    held = {
        "images": len(images),
        "classes": len(folder.classnames),
        "templates": len(folder.templates),
    }
    return metrics.classification_metrics(logits.cpu(), labels), held, None


def retrieve(model: Evaluated, folder: Folder, args, device):
    """Metrics of retrieval both ways, what the data set held, and some queries with answers."""
    captions = folder.captions()
    texts = [caption for some in captions for caption in some]
    image_of = torch.tensor([i for i, some in enumerate(captions) for _ in some], device=device)
    images = embed_images(model, folder, args, device)
    vectors = embed_texts(model, texts, args, device)
    held = {"images": len(images), "captions": len(texts)}
    found = metrics.retrieval_metrics(images, vectors, image_of)
    return found, held, examples(folder, images, vectors, texts, image_of)


def examples(folder: Folder, images, vectors, texts, image_of, top: int = 5) -> list[dict]:
    """A few captions, evenly spaced over the set, each with its image and the images retrieved."""
    chosen = torch.linspace(0, len(texts) - 1, min(EXAMPLES, len(texts))).long().tolist()
    scores = metrics.similarities(vectors[chosen], images)
    nearest = scores.sort(dim=1, descending=True, stable=True).indices[:, :top].tolist()
    return [
        {
            "caption": texts[text],
            "image": thumbnail(folder, int(image_of[text])),
            "retrieved": [
                {"image": thumbnail(folder, i), "hit": i == int(image_of[text])} for i in answers
            ],
        }
        for text, answers in zip(chosen, nearest)
    ]


def thumbnail(folder: Folder, index: int, side: int = 96) -> str:
    """A small PNG of an image, base64."""
    image = datasets.picture(folder.samples[index]).convert("RGB")
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def identity(model: Evaluated, folder: Folder, precision: str) -> dict:
    """What a figure depends on: a result is repeated exactly when all of this is."""
    return {
        "weights": model.weights,
        "preprocessing": model.preprocessing,
        "data": folder.fingerprint,
        "split": folder.split,
        "precision": precision,
    }


def result_name(model: Evaluated, folder: Folder, precision: str) -> str:
    """A file name that two different evaluations never share."""
    parts = [folder.name, folder.split, model.name, model.weights[:10]]
    key = json.dumps([model.name, identity(model, folder, precision)], sort_keys=True)
    parts.append(hashlib.sha256(key.encode()).hexdigest()[:10])
    return "_".join(slug(part) for part in parts) + ".json"


def slug(text: str) -> str:
    """Text as part of a file name, not longer than a file system takes."""
    return re.sub(r"[^A-Za-z0-9._@+-]+", "-", text).strip("-")[-80:]


def write_once(path: Path, content: dict) -> None:
    """Write strict JSON; an existing file is never touched, a half-written one never seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    try:
        os.link(draft, path)
    except FileExistsError:
        print(f"{path}: written by another process meanwhile; kept")
    finally:
        draft.unlink()


def evaluate(model: Evaluated, folder: Folder, classifiers: Classifiers, args, device):
    """The result of one model on one data set, and retrieval examples or None."""
    if folder.task == "zeroshot_classification":
        values, held, shown = classify(model, folder, classifiers, args, device)
    else:
        values, held, shown = retrieve(model, folder, args, device)
    result = {
        "dataset": folder.name,
        "model": model.name,
        "pretrained": model.weights[:10],
        "task": folder.task,
        "metrics": values,
        "language": "en",
        "provenance": {
            **identity(model, folder, args.precision),
            **origin(),
            "source": model.source,
            "parameters": model.parameters,
            "held": held,
            "protocol": protocol(folder, held),
            "device": device.type,
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }
    return result, shown


def protocol(folder: Folder, held: dict[str, int]) -> str:
    """Whether a known set's test split is whole; where not, how it differs."""
    known = datasets.PROTOCOLS.get(folder.name)
    if known is None or folder.split != "test":
        return UNPUBLISHED
    wanted = {"images": known.images, "classes": known.classes, "captions": known.captions}
    wrong = [f"{held.get(k, 0)} {k} of {v}" for k, v in wanted.items() if v and held.get(k) != v]
    return "; ".join(wrong) or WHOLE


def share(items: Sequence, number: int, of: int) -> Sequence:
    """The ``number``-th of ``of`` equal parts: neighbours stay together, and none is left out."""
    return items[len(items) * (number - 1) // of : len(items) * number // of]


class Place(NamedTuple):
    """Of this process among those that torchrun or srun started together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def of_process(cls) -> "Place":
        """Read it from the environment; an sbatch script itself is alone, whatever its job has."""
        torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        srun = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        for names in (torchrun, srun):
            if all(name in os.environ for name in names):
                return cls(*(int(os.environ[name]) for name in names))
        return cls()


def run(args, device: torch.device, place: Place) -> list[str]:
    """Evaluate this process's share of models on data sets; the gaps, one line each."""
    root = datasets.check_root(args.data_root)
    # opened and fingerprinted once for all models
    opened = cache(lambda name: datasets.open_folder(root, name, args.split))
    pairs = list(product(dict.fromkeys(args.models), datasets.names(args.datasets)))
    pairs = share(share(pairs, *args.part), place.rank + 1, place.size)
    gaps = []
    for spec, of_model in groupby(pairs, key=lambda pair: pair[0]):
        model = models.load(spec, device)
        classifiers = Classifiers(model, device, args.precision)
        for _, name in of_model:
            if reason := evaluate_once(model, name, opened, classifiers, args, device):
                gaps.append(f"{model.name} on {name}: not evaluated: {reason}")
                print(gaps[-1], file=sys.stderr)
    return gaps


def evaluate_once(model, name: str, opened, classifiers, args, device) -> str | None:
    """Write the result of one model on one data set if it is not there; why not, if it can't."""
    out = args.out or (model.run / "results" if model.run else Path("results"))
    gap = out / "gaps" / f"{slug(name)}_{args.split}_{slug(model.name)}_{model.weights[:10]}.json"
    try:
        folder = opened(name)
        path = out / result_name(model, folder, args.precision)
        if path.exists():
            print(f"{model.name} on {name}: evaluated already, skipped ({path})")
            return None
        result, shown = evaluate(model, folder, classifiers, args, device)
    except Gap as error:
        # one that comes from a loader's process ends the traceback it has there
        reason = sentence(error)
        gap.parent.mkdir(parents=True, exist_ok=True)
        line = {"dataset": name, "model": model.name, "weights": model.weights, "gap": reason}
        gap.write_text(json.dumps(line, indent=2) + "\n")
        return reason
    if shown:
        write_once(out / "examples" / path.name, {"model": model.name, "queries": shown})
    write_once(path, result)
    gap.unlink(missing_ok=True)
    told = ", ".join(f"{k} {v:.4f}" for k, v in result["metrics"].items() if v is not None)
    if differs := shortfall(result["provenance"]):
        told += f"; not the published {name}: {differs}"
    print(f"{model.name} on {name}: {told} ({path})", flush=True)
    return None


def part(text: str) -> tuple[int, int]:
    """``I/N``, one-based."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}': expected I/N with 1 <= I <= N, e.g. 1/4")
    return int(match[1]), int(match[2])


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("models", nargs="+", help="run directories, checkpoints, model folders, NAME[:PRETRAINED]")
    add("--data-root", type=Path, required=True, help="folder of the data sets")
    suites = ", ".join(datasets.SUITES)
    add("--datasets", nargs="+", required=True, help=f"names of folders, or suites: {suites}")
    add("--split", default="test", help="split folder to evaluate (default: %(default)s)")
    add("--out", type=Path, help="folder of results (default: RUN/results; results for others)")
    add(
        "--model-config",
        nargs="+",
        default=[],
        metavar="FILE.json",
        help="of NAMEs that OpenCLIP lacks",
    )
    add("--precision", choices=PRECISIONS, default="fp32", help="of the towers' forward pass")
    add("--batch-size", type=int, default=256)
    add("--workers", type=int, default=min(4, cores()), help="processes that decode images")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--part", type=part, default=(1, 1), help="I/N: the I-th of N parts of the evaluations")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Entry point of ``python -m eval.benchmark``; 1 when a data set could not be evaluated."""
    args = parse(argv)
    models.add_configs(args.model_config)
    place = Place.of_process()
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise UsageError(f"--device '{args.device}': expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device '{device}': no GPU is to be seen here; use --device cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
    # torchrun, and srun --wait, end the others soon after one has ended: all wait for the last
    wait = place.size > 1 and "MASTER_ADDR" in os.environ
    if wait:
        dist.init_process_group(
            "gloo", rank=place.rank, world_size=place.size, timeout=timedelta(days=30)
        )
    gaps = run(args, device, place)
    if gaps:
        print(f"{len(gaps)} of the evaluations asked for are gaps", file=sys.stderr)
    if wait:
        dist.barrier()
        dist.destroy_process_group()
    return 1 if gaps else 0


if __name__ == "__main__":
    cli(main)
