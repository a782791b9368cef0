"""What banks of RDMs keep of their teachers: metrics, bits and maps of the reconstructions.

A bank of CLIP stands in for both towers, a classifier's for the features under its head. Either
way, rounding takes the place of noise, as in stage 2.
"""

import json
import math
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.manifold import TSNE
from torch import Tensor
from torchvision.datasets import CIFAR100

from cifd_clip import RDMBank
from cifd_clip.teacher import weights_hash
from eval import datasets, metrics, models, zeroshot
from eval.datasets import Folder
from eval.embed import Forward, embed_images, embed_texts
from eval.models import Evaluated
from eval.result import run_config
from training.classifier.cifar import Table
from training.classifier.imagenet import PhotoTable, check_classes
from training.classifier.run import load_split
from training.classifier.teachers import EVALUATION_BATCH, LiveTeachers, load_rdms, load_teacher
from training.clip.flags import bank_folder, holds_bank
from training.engine.result import BankResult, EmbeddingMap, Metrics, Provenance, Reconstruction
from training.engine.run import origin
from training.errors import UsageError

CLASSES, PER_CLASS = 10, 40  # of the t-SNE map


def load(path: Path, args: Namespace, forward: Forward) -> "Bank":
    """The bank of a run, of either kind, with its teacher.

    Args:
        path: a run directory, or a bank's folder.
        args: see `eval.bank.parse`.
        forward: how the teacher is run.

    Raises:
        UsageError: there is no bank, no data for it, no name of a teacher, or another teacher.
    """
    in_run = (path / "config.json").is_file() and not holds_bank(path)
    if in_run and "method" in run_config(path):
        return ClassifierBank(path, args, forward)
    return ClipBank(path, args, forward)


class Bank:
    """A frozen bank and its teacher.

    Attributes:
        name: the bank's run, for results.
        out: the folder of results.
        datasets: what to measure on.
        split: the split of each.
        weights, teacher_weights: SHA-256 of the bank's and of the teacher's.
        seed: of the bank's run.
        source: what its teacher is called.
        forward: how the teacher is run.
    """

    name: str
    out: Path
    datasets: list[str]
    split: str
    weights: str
    teacher_weights: str
    seed: int | None
    source: str
    forward: Forward

    def identity(self, data: "Folder | Images") -> dict[str, Any]:
        """What the figures on a data set depend on."""
        return {
            "model": self.name,
            "weights": self.weights,
            "teacher": self.teacher_weights,
            "data": data.fingerprint,
            "split": data.split,
            "precision": self.forward.precision,
        }

    def provenance(self, data: "Folder | Images", held: dict[str, int]) -> Provenance:
        """Of a result on a data set."""
        return Provenance(
            **origin(),
            seed=self.seed,
            weights=self.weights,
            teachers=(self.teacher_weights,),
            source=self.source,
            data={data.split: data.fingerprint},
            held=held,
            precision=self.forward.precision,
            device=self.forward.device.type,
            versions=zeroshot.versions("scikit-learn"),
        )


class ClipBank(Bank):
    """A bank of `training.main` on zero-shot data sets."""

    def __init__(self, path: Path, args: Namespace, forward: Forward):
        folder = bank_folder(path)
        if not holds_bank(folder):
            raise UsageError(
                f"'{path}': expected a bank (bank.safetensors) or a run directory with bank/ or "
                "rdm/bank/; train one with --distill rdm"
            )
        if not (args.data_root and args.datasets):
            raise UsageError(f"'{path}' is a bank of CLIP: say --data-root DIR and --datasets NAME")
        run = folder.absolute().parent
        config = run_config(run) if (run / "config.json").is_file() else None
        if args.out is None and config is None:
            raise UsageError(f"'{path}': the bank is in no run directory; say --out DIR")
        self.root = datasets.check_root(args.data_root)
        self.model = models.load(args.teacher or _teacher_of(path, config), forward.device)
        self.bank = _load_bank(path, folder, self.model).to(forward.device)
        self.name = f"{run.parent.name}/rdm" if run.name == "rdm" else run.name
        self.out = args.out or run / "results"
        self.datasets, self.split = datasets.names(args.datasets), args.split
        self.weights, self.teacher_weights = weights_hash(self.bank), self.model.weights
        self.seed, self.source = config and config["seed"], self.model.source
        self.forward = forward

    def open(self, dataset: str) -> Folder:
        """One of the data sets."""
        return datasets.open_folder(self.root, dataset, self.split)

    def measure(self, folder: Folder) -> BankResult:
        """The metrics of the teacher, of every rate, and of the mean of all of them."""
        classifies = folder.task == "zeroshot_classification"
        if classifies:
            texts = [t.format(c=name) for name in folder.classnames for t in folder.templates]
        else:
            texts, image_of = zeroshot.captions_of(folder)
            image_of = image_of.to(self.forward.device)
        teacher = (
            embed_images(self.model, folder, self.forward),
            embed_texts(self.model, texts, self.forward),
        )

        def metrics_of(images: Tensor, texts: Tensor) -> Metrics:
            if not classifies:
                return metrics.retrieval_metrics(images, texts, image_of)
            prompts = texts.unflatten(0, (len(folder.classnames), -1))
            classes = F.normalize(prompts.mean(dim=1), dim=-1)
            return zeroshot.classification(images, classes, folder)

        towers = (self.bank.image, self.bank.text)
        assistants, spaces, total = [], [teacher[0]], list(teacher)
        for k, rate in enumerate(self.bank.rates):
            pairs = [reconstruct(rdms, x, k, self.forward.batch_size)
                     for rdms, x in zip(towers, teacher)]  # fmt: skip
            embeddings, bits = zip(*pairs)
            assistants.append(
                Reconstruction(
                    rate=rate,
                    bits=dict(zip(("image", "text"), bits)),
                    metrics=metrics_of(*embeddings),
                )
            )
            spaces.append(embeddings[0])
            total = [so_far + x for so_far, x in zip(total, embeddings)]
        held = {"images": len(teacher[0]), "texts": len(texts)}
        points = None
        if classifies:
            labels = torch.tensor(folder.labels())
            points = embedding_map(spaces, self.bank.rates, labels, folder.classnames)
        return BankResult(
            task=folder.task,
            dataset=folder.name,
            split=folder.split,
            model=self.name,
            teacher=metrics_of(*teacher),
            assistants=tuple(assistants),
            mean=metrics_of(*(F.normalize(x, dim=-1) for x in total)),
            map=points,
            provenance=self.provenance(folder, held),
        )


def _load_bank(path: Path, folder: Path, teacher: Evaluated) -> RDMBank:
    try:
        return RDMBank.load(folder, {"model": teacher.name, "weights": teacher.weights})
    except ValueError as error:
        raise UsageError(f"'{path}': {error}; name the bank's own with --teacher") from error


def _teacher_of(path: Path, config: dict[str, Any] | None) -> str:
    name = config and config["distill_model"]
    if not name:
        raise UsageError(
            f"'{path}': the run names no teacher (it read a cache); say --teacher NAME:WEIGHTS or "
            "a model folder"
        )
    models.add_run_configs(f"'{path}'", config)
    weights = config["distill_pretrained"]
    return f"{name}:{weights}" if weights else name


@torch.no_grad()
def reconstruct(rdms, embeddings: Tensor, k: int, batch_size: int) -> tuple[Tensor, float]:
    """Module k's unit embeddings (N, D) of unit embeddings (N, D), and bits per embedding."""
    vectors, nats = [], 0.0
    for batch in embeddings.split(batch_size):
        vectors.append(rdms.reconstruct(batch)[k])
        nats += float(rdms(batch, None).nats[k].double().sum())
    return torch.cat(vectors), nats / math.log(2) / len(embeddings)


@dataclass(frozen=True)
class Images:
    """The test images of a classifier's data set, with the names of their classes."""

    name: str
    split: str
    fingerprint: str
    table: Table | PhotoTable
    classnames: list[str]


class ClassifierBank(Bank):
    """The RDMs of a finished ``training.classify --method rdm`` on the test images."""

    def __init__(self, run: Path, args: Namespace, forward: Forward):
        if not args.data:
            raise UsageError(f"'{run}' is a bank of a classifier: say --data DIR, its images")
        config = run_config(run)
        if config["method"] != "rdm":
            raise UsageError(f"'{run}' trained no RDMs, but --method {config['method']}")
        teacher = load_teacher(config["teacher"][0], config["dataset"])
        rdms = load_rdms(run, teacher)
        picked = list(range(len(rdms.rates)))
        teachers = LiveTeachers([teacher.model], rdms, picked, [1.0] * len(picked))
        self.teachers = teachers.to(forward.device)
        self.run, self.data, self.workers = run, args.data, forward.workers
        self.name, self.out = run.resolve().name, args.out or run / "results"
        self.datasets, self.split = [config["dataset"]], "test"
        self.weights, self.teacher_weights = weights_hash(rdms), teacher.hash
        self.seed, self.source = config["seed"], teacher.name
        self.forward = forward

    def open(self, dataset: str) -> Images:
        """The test images."""
        where = Namespace(dataset=dataset, data=self.data, workers=self.workers)
        table = load_split(where, "test")
        if isinstance(table, PhotoTable):
            trained = json.loads((self.run / "data.json").read_text())["train"]
            check_classes(self.data, table, trained["classes"], self.teachers.rdms.classes)
        names = class_names(self.data, table)
        return Images(dataset, "test", table.hash, table.to(self.forward.device), names)

    @torch.no_grad()
    def measure(self, images: Images) -> BankResult:
        """Accuracies of the teacher and of its RDMs, bits, and a map of their embeddings."""
        table, rdms, logits, embeddings = images.table, self.teachers.rdms, [], []
        for batch in table.in_order(torch.arange(len(table)), EVALUATION_BATCH):
            outputs = self.teachers(batch)
            logits.append(torch.stack([one.logits for one in outputs]))
            embeddings.append([one.embedding for one in outputs])
        labels = table.labels
        teacher, *scores = [
            metrics.classification_metrics(each, labels) for each in torch.cat(logits, dim=1)
        ]
        spaces = [torch.cat(each) for each in zip(*embeddings)]
        nats = [rdms(x, None).nats.sum(1) for x in spaces[0].split(EVALUATION_BATCH)]
        bits = (torch.stack(nats).sum(0) / math.log(2) / len(table)).tolist()
        return BankResult(
            task="classification",
            dataset=images.name,
            split=images.split,
            model=self.name,
            teacher=teacher,
            assistants=tuple(
                Reconstruction(rate=rate, bits={"image": b}, metrics=values)
                for rate, b, values in zip(rdms.rates, bits, scores, strict=True)
            ),
            map=embedding_map(spaces, rdms.rates, labels, images.classnames),
            provenance=self.provenance(images, {"images": len(table)}),
        )


def class_names(data: Path, table: Table | PhotoTable) -> list[str]:
    """What the classes are called; their numbers where the data don't say."""
    if isinstance(table, PhotoTable):
        return list(table.class_names)
    packed, meta = data / "cifar100_test.npz", data / "cifar-100-python" / "meta"
    if packed.is_file():
        return np.load(packed)["classnames"].tolist()
    if meta.is_file():
        return CIFAR100(data).classes
    return [str(number) for number in range(table.classes)]


def embedding_map(
    spaces: list[Tensor], rates: list[float], labels: Tensor, classnames: list[str]
) -> EmbeddingMap:
    """t-SNE of a few images of some classes: of the teacher, and of each rate from its layout.

    t-SNE's axes mean nothing; what starts from the same layout can be compared by eye.

    Args:
        spaces: embeddings (N, D) of the teacher, and of every rate.
        rates: R of each.
        labels: (N,) class numbers.
        classnames: names of all classes.
    """
    labels = labels.cpu()
    present = labels.unique()
    spaced = torch.linspace(0, len(present) - 1, min(CLASSES, len(present))).long().unique()
    chosen = present[spaced].tolist()
    rows = torch.cat([(labels == c).nonzero()[:PER_CLASS, 0] for c in chosen])
    points, start = {}, "pca"
    for name, vectors in zip(["teacher", *(f"{rate:g}" for rate in rates)], spaces):
        points[name] = tsne(vectors[rows.to(vectors.device)].cpu().numpy(), start)
        if name == "teacher" and (spread := points[name][:, 0].std()):
            start = (points[name] / spread * 1e-4).astype(np.float32)  # as sklearn scales its own
    return EmbeddingMap(
        classes=tuple(classnames[c] for c in chosen),
        labels=tuple(chosen.index(c) for c in labels[rows].tolist()),
        points={name: np.round(p, 2).tolist() for name, p in points.items()},
    )


def tsne(vectors: np.ndarray, start) -> np.ndarray:
    """Points (N, 2) of unit vectors (N, D)."""
    if not np.ptp(vectors, axis=0).any():  # collapsed to one point
        return np.zeros((len(vectors), 2))
    perplexity = min(30.0, max(1.0, (len(vectors) - 1) / 3))
    model = TSNE(perplexity=perplexity, init=start, metric="cosine", random_state=0)
    return model.fit_transform(vectors.astype(np.float64))
