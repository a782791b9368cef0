"""What banks of RDMs keep of their teachers: metrics, bits and maps of the reconstructions.

A bank of CLIP stands in for both towers, a classifier's for the features under its head. Either
way, rounding takes the place of noise, as in stage 2.
"""

import math
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.manifold import TSNE
from torch import Tensor, nn
from torchvision.datasets import CIFAR100

from cifd_clip import RDMBank
from cifd_clip.artefact import MODALITIES, modalities_of, read_bank_config
from cifd_clip.names import nearby
from cifd_clip.teacher import weights_hash
from eval import datasets, metrics, models, zeroshot
from eval.datasets import Folder
from eval.embed import Forward, embed_images, embed_texts
from training.classifier.cifar import Table, load_cifar100
from training.classifier.imagenet import PhotoTable, check_classes, load_photos
from training.classifier.teachers import (
    EVALUATION_BATCH,
    TeacherNetworks,
    load_rdms,
    load_teacher,
)
from training.engine.environment import origin, versions
from training.engine.result import BankResult, EmbeddingMap, Metrics, Provenance, Reconstruction
from training.engine.run import bank_folder, holds_bank, read_run
from training.errors import UsageError

CLASSES, PER_CLASS = 10, 40  # of the t-SNE map


def load(path: Path, args: Namespace, forward: Forward) -> "Bank":
    """The bank, of either kind, of a run directory or a bank's folder, with its teacher.

    Raises:
        UsageError: there is no bank, no data for it, no name of a teacher, or another teacher.
    """
    folder = bank_folder(path)
    if not holds_bank(folder):
        raise UsageError(
            f"'{path}': expected a bank (bank.safetensors) or a run directory with bank/ or "
            f"rdm/bank/; train one with --distill rdm or --method rdm{nearby(path)}"
        )
    kind = ClipBank if read_bank_config(folder)["task"] == "clip" else ClassifierBank
    return kind(folder.absolute(), args, forward)


class Measured(NamedTuple):
    """What the teacher and each of its RDMs make of a data set, the teacher first."""

    scores: list[Metrics]
    bits: list[dict[str, float]]
    """Of the RDMs alone."""
    images: list[Tensor]
    """Image embeddings (N, D)."""
    held: dict[str, int]
    mean: Metrics | None = None


class Bank:
    """A frozen bank, named after its run for results, and its teacher.

    Attributes:
        out: the folder of results.
        datasets, split: what to measure on.
        source: what its teacher is called.
        weights, teacher_weights: SHA-256 of the bank's and of the teacher's.
    """

    datasets: list[str]
    source: str
    teacher_weights: str

    def __init__(self, folder: Path, out: str | None, split: str, rdms: RDMBank, run: dict | None):
        self.name = folder.parent.name
        if self.name == "rdm":
            self.name = f"{folder.parent.parent.name}/rdm"
        self.out, self.split = Path(out or folder.parent / "results"), split
        self.rdms, self.weights = rdms, weights_hash(rdms)
        self.seed = run and run["seed"]

    def provenance(self, data: "Folder | Images") -> Provenance:
        """Of a result on a data set, before it is known what the data set holds."""
        return Provenance(
            **origin(),
            seed=self.seed,
            weights=self.weights,
            teachers=(self.teacher_weights,),
            source=self.source,
            data={data.split: data.fingerprint},
            precision=self.forward.precision,
            device=self.forward.device.type,
            versions=versions(*zeroshot.PACKAGES, "scikit-learn"),
        )

    def result(self, data: "Folder | Images", provenance: Provenance) -> BankResult:
        """The metrics of the teacher and of every rate, the bits of each rate, and a map."""
        scores, bits, images, held, mean = self.measure(data)
        rates, points = self.rdms.rates, None
        if data.task != "zeroshot_retrieval":
            points = embedding_map(images, rates, torch.tensor(data.targets), data.classnames)
        kept = zip(rates, bits, scores[1:], strict=True)
        return BankResult(
            task=data.task,
            dataset=data.name,
            split=data.split,
            model=self.name,
            teacher=scores[0],
            assistants=tuple(Reconstruction(rate=r, bits=b, metrics=m) for r, b, m in kept),
            mean=mean,
            map=points,
            provenance=replace(provenance, held=held),
        )


class ClipBank(Bank):
    """A bank of `training.main` on zero-shot data sets."""

    def __init__(self, folder: Path, args: Namespace, forward: Forward):
        if not (args.data_root and args.datasets):
            raise UsageError(f"'{folder}' is a CLIP's bank: say --data-root DIR --datasets NAME")
        modalities = modalities_of(read_bank_config(folder)["teacher"])
        if modalities != MODALITIES:
            raise UsageError(
                f"'{folder}' is the bank of a teacher of {modalities[0]}s alone, which has no "
                "zero-shot figures; its bits are in its run's metrics.jsonl"
            )
        run = read_run(folder.parent) if (folder.parent / "config.json").is_file() else None
        if not (args.out or run):
            raise UsageError(f"'{folder}': the bank is in no run directory; say --out DIR")
        self.root = datasets.check_root(Path(args.data_root))
        self.model = models.load(args.teacher or _teacher_of(folder, run), forward.device)
        self.source, self.teacher_weights = self.model.source, self.model.weights
        self.datasets, self.forward = datasets.wanted(args.datasets, self.root), forward
        identity = {"model": self.model.name, "weights": self.model.weights}
        try:
            rdms = RDMBank.load(folder, identity).to(forward.device)
        except ValueError as error:
            raise UsageError(f"'{folder}': {error}; name the bank's own with --teacher") from error
        super().__init__(folder, args.out, args.split, rdms, run)

    def open(self, dataset: str) -> Folder:
        return datasets.open_folder(self.root, dataset, self.split)

    def measure(self, folder: Folder) -> Measured:
        """Zero-shot metrics, and those of the mean of the teacher and all RDMs."""
        if classifies := folder.task == "zeroshot_classification":
            texts = [t.format(c=name) for name in folder.classnames for t in folder.templates]
        else:
            texts, image_of = zeroshot.captions_of(folder)
            image_of = image_of.to(self.forward.device)

        def metrics_of(images: Tensor, texts: Tensor) -> Metrics:
            if not classifies:
                return metrics.retrieval_metrics(images, texts, image_of)
            prompts = texts.unflatten(0, (len(folder.classnames), -1))
            classes = F.normalize(prompts.mean(dim=1), dim=-1)
            return zeroshot.classification(images, classes, folder)

        own_images = embed_images(self.model, folder, self.forward)
        own_texts = embed_texts(self.model, texts, self.forward)
        images, image_bits = self._reconstruct(self.rdms.image, own_images)
        texts_kept, text_bits = self._reconstruct(self.rdms.text, own_texts)
        spaces = [(own_images, own_texts), *zip(images, texts_kept)]
        mean = (F.normalize(sum(embeddings), dim=-1) for embeddings in zip(*spaces))
        return Measured(
            scores=[metrics_of(*embeddings) for embeddings in spaces],
            bits=[{"image": i, "text": t} for i, t in zip(image_bits, text_bits)],
            images=[own_images, *images],
            held={"images": len(own_images), "texts": len(own_texts)},
            mean=metrics_of(*mean),
        )

    @torch.no_grad()
    def _reconstruct(self, rdms: nn.Module, embeddings: Tensor) -> tuple[Tensor, list[float]]:
        """Unit embeddings (K, N, D) of (N, D), and bits per embedding, of every rate."""
        batches = embeddings.split(self.forward.batch_size)
        vectors = torch.cat([rdms.reconstruct(batch) for batch in batches], dim=1)
        nats = sum(rdms(batch, None).nats.double().sum(1) for batch in batches)
        return vectors, (nats / math.log(2) / len(embeddings)).tolist()


def _teacher_of(folder: Path, run: dict[str, Any] | None) -> str:
    if not (run and run["distill_model"]):
        raise UsageError(
            f"'{folder}': the run names no teacher (it read a cache); say --teacher NAME:WEIGHTS "
            "or a model folder"
        )
    models.add_configs(run["model_config"], str(folder))
    return ":".join(filter(None, (run["distill_model"], run["distill_pretrained"])))


@dataclass(frozen=True)
class Images:
    """The test images of a classifier's data set, with the names of their classes."""

    name: str
    table: Table | PhotoTable
    classnames: list[str]
    split: str = "test"
    task: str = "classification"

    @property
    def fingerprint(self) -> str:
        return self.table.hash

    @property
    def targets(self) -> list[int]:
        return self.table.labels.tolist()


class ClassifierBank(Bank):
    """The RDMs of a finished ``training.classify --method rdm`` on the test images."""

    def __init__(self, folder: Path, args: Namespace, forward: Forward):
        if not args.data:
            raise UsageError(f"'{folder}' is a classifier's bank: say --data DIR, its images")
        self.run, self.data = folder.parent, args.data
        run = read_run(self.run)
        teacher = load_teacher(run["teacher"], run["dataset"])
        rdms = load_rdms(self.run, teacher)
        selected = list(range(len(rdms.rates)))
        networks = TeacherNetworks([teacher.model], rdms, selected, [1.0] * len(selected))
        self.networks, self.forward = networks.to(forward.device), forward
        self.source, self.teacher_weights = teacher.name, teacher.hash
        self.datasets = [run["dataset"]]
        super().__init__(folder, args.out, "test", rdms, run)

    def open(self, dataset: str) -> Images:
        if dataset == "imagenet":
            table = load_photos(self.data, "val", self.forward.workers)
            trained = read_run(self.run, "data.json", train=dict)["train"]
            check_classes(self.data, table, trained["classes"], self.rdms.image.classes)
        else:
            table = load_cifar100(self.data, "test")
        names = class_names(self.data, table)
        return Images(dataset, table.to(self.forward.device), names)

    @torch.no_grad()
    def measure(self, images: Images) -> Measured:
        table, size = images.table, EVALUATION_BATCH
        outputs = [self.networks(b) for b in table.in_order(torch.arange(len(table)), size)]
        logits, spaces = (
            [torch.cat([getattr(one, name) for one in each]) for each in zip(*outputs)]
            for name in ("logits", "embedding")
        )
        nats = [self.rdms.image(x, None).nats.sum(1) for x in spaces[0].split(size)]
        bits = (torch.stack(nats).sum(0) / math.log(2) / len(table)).tolist()
        scores = [metrics.classification_metrics(x, table.labels) for x in logits]
        return Measured(scores, [{"image": b} for b in bits], spaces, {"images": len(table)})


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
        labels, classnames: (N,) class numbers, and the names of all classes.
    """
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
