"""What banks of RDMs keep of their teachers: metrics, bits and maps of the reconstructions.

A bank of CLIP stands in for both towers, a classifier's for the features under its head. Either
way, rounding takes the place of noise, as in stage 2.
"""

import math
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
from cifd_clip.artefact import read_bank_config
from cifd_clip.teacher import weights_hash
from eval import datasets, metrics, models, zeroshot
from eval.bank import Config
from eval.datasets import Folder
from eval.embed import Forward, embed_images, embed_texts
from eval.flags import find_device
from training.classifier.cifar import Table, load_cifar100
from training.classifier.imagenet import PhotoTable, check_classes, load_photos
from training.classifier.teachers import (
    EVALUATION_BATCH,
    TeacherNetworks,
    load_rdms,
    load_teacher,
)
from training.engine.environment import origin
from training.engine.result import BankResult, EmbeddingMap, Metrics, Provenance, Reconstruction
from training.engine.run import bank_folder, holds_bank, read_run
from training.errors import UsageError

CLASSES, PER_CLASS = 10, 40  # of the t-SNE map


def load(path: Path, config: Config) -> "Bank":
    """The bank of a run, of either kind, with its teacher.

    Args:
        path: a run directory, or a bank's folder.
        config: see `eval.bank.parse`.

    Raises:
        UsageError: there is no bank, no data for it, no name of a teacher, or another teacher.
    """
    folder = bank_folder(path)
    if not holds_bank(folder):
        raise UsageError(
            f"'{path}': expected a bank (bank.safetensors) or a run directory with bank/ or "
            "rdm/bank/; train one with --distill rdm or --method rdm"
        )
    kind = ClipBank if read_bank_config(folder)["task"] == "clip" else ClassifierBank
    return kind(folder.absolute(), config)


class Bank:
    """A frozen bank and its teacher.

    Attributes:
        name: the bank's run, for results.
        out: the folder of results.
        datasets, split: what to measure on.
        weights, teacher_weights: SHA-256 of the bank's and of the teacher's.
    """

    datasets: list[str]
    teacher_weights: str

    def __init__(self, folder: Path, config: Config, bank: RDMBank, seed: int | None):
        run = folder.parent
        self.name = f"{run.parent.name}/rdm" if run.name == "rdm" else run.name
        self.out = Path(config.out or run / "results")
        self.split, self.seed = config.split, seed
        self.rdms, self.weights = bank, weights_hash(bank)

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

    def provenance(self, data: "Folder | Images", source: str, **held: int) -> Provenance:
        """Of a result on a data set; ``source`` is what the teacher is called."""
        return Provenance(
            **origin(),
            seed=self.seed,
            weights=self.weights,
            teachers=(self.teacher_weights,),
            source=source,
            data={data.split: data.fingerprint},
            held=held,
            precision=self.forward.precision,
            device=self.forward.device.type,
            versions=zeroshot.versions("scikit-learn"),
        )


class ClipBank(Bank):
    """A bank of `training.main` on zero-shot data sets."""

    def __init__(self, folder: Path, config: Config):
        config.check()
        run = read_run(folder.parent) if (folder.parent / "config.json").is_file() else None
        if not (config.out or run):
            raise UsageError(f"'{folder}': the bank is in no run directory; say --out DIR")
        device = find_device(config.device)
        self.forward = Forward(device, config.precision, config.batch_size, config.workers)
        self.root = datasets.check_root(Path(config.data_root))
        self.model = models.load(config.teacher or _teacher_of(folder, run), device)
        identity = {"model": self.model.name, "weights": self.model.weights}
        try:
            bank = RDMBank.load(folder, identity).to(device)
        except ValueError as error:
            raise UsageError(f"'{folder}': {error}; name the bank's own with --teacher") from error
        super().__init__(folder, config, bank, run and run["seed"])
        self.datasets, self.teacher_weights = datasets.names(config.datasets), self.model.weights

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
        teacher = [
            embed_images(self.model, folder, self.forward),
            embed_texts(self.model, texts, self.forward),
        ]

        def metrics_of(images: Tensor, texts: Tensor) -> Metrics:
            if not classifies:
                return metrics.retrieval_metrics(images, texts, image_of)
            prompts = texts.unflatten(0, (len(folder.classnames), -1))
            classes = F.normalize(prompts.mean(dim=1), dim=-1)
            return zeroshot.classification(images, classes, folder)

        assistants, spaces, total = [], [teacher[0]], teacher
        for k, rate in enumerate(self.rdms.rates):
            towers = zip((self.rdms.image, self.rdms.text), teacher)
            embeddings, bits = zip(*(self._reconstruct(*tower, k) for tower in towers))
            kept = dict(zip(("image", "text"), bits))
            assistants.append(Reconstruction(rate=rate, bits=kept, metrics=metrics_of(*embeddings)))
            spaces.append(embeddings[0])
            total = [so_far + x for so_far, x in zip(total, embeddings)]
        labels = torch.tensor(folder.labels()) if classifies else None
        return BankResult(
            task=folder.task,
            dataset=folder.name,
            split=folder.split,
            model=self.name,
            teacher=metrics_of(*teacher),
            assistants=tuple(assistants),
            mean=metrics_of(*(F.normalize(x, dim=-1) for x in total)),
            map=embedding_map(spaces, self.rdms.rates, labels, folder.classnames)
            if classifies
            else None,
            provenance=self.provenance(
                folder, self.model.source, images=len(teacher[0]), texts=len(texts)
            ),
        )

    @torch.no_grad()
    def _reconstruct(self, rdms, embeddings: Tensor, k: int) -> tuple[Tensor, float]:
        """Module k's unit embeddings (N, D) of unit embeddings (N, D), and bits per embedding."""
        vectors, nats = [], 0.0
        for batch in embeddings.split(self.forward.batch_size):
            vectors.append(rdms.reconstruct(batch)[k])
            nats += float(rdms(batch, None).nats[k].double().sum())
        return torch.cat(vectors), nats / math.log(2) / len(embeddings)


def _teacher_of(folder: Path, run: dict[str, Any] | None) -> str:
    if not (run and run["distill_model"]):
        raise UsageError(
            f"'{folder}': the run names no teacher (it read a cache); say --teacher NAME:WEIGHTS "
            "or a model folder"
        )
    models.add_run_configs(f"'{folder}'", run)
    return ":".join(filter(None, (run["distill_model"], run["distill_pretrained"])))


@dataclass(frozen=True)
class Images:
    """The test images of a classifier's data set, with the names of their classes."""

    name: str
    fingerprint: str
    table: Table | PhotoTable
    classnames: list[str]
    split: str = "test"


class ClassifierBank(Bank):
    """The RDMs of a finished ``training.classify --method rdm`` on the test images."""

    def __init__(self, folder: Path, config: Config):
        if not config.data:
            raise UsageError(f"'{folder}' is a classifier's bank: say --data DIR, its images")
        self.run, self.data = folder.parent, Path(config.data)
        run = read_run(self.run)
        device = find_device(config.device)
        self.forward = Forward(device, batch_size=EVALUATION_BATCH, workers=config.workers)
        teacher = load_teacher(run["teacher"], run["dataset"])
        bank = load_rdms(self.run, teacher)
        super().__init__(folder, config, bank, run["seed"])
        selected = list(range(len(bank.rates)))
        networks = TeacherNetworks([teacher.model], bank, selected, [1.0] * len(selected))
        self.teacher, self.networks = teacher, networks.to(device)
        self.datasets, self.split = [run["dataset"]], "test"
        self.teacher_weights = teacher.hash

    def open(self, dataset: str) -> Images:
        """The test images."""
        if dataset == "imagenet":
            table = load_photos(self.data, "val", self.forward.workers)
            trained = read_run(self.run, "data.json")["train"]
            check_classes(self.data, table, trained["classes"], self.rdms.image.classes)
        else:
            table = load_cifar100(self.data, "test")
        names = class_names(self.data, table)
        return Images(dataset, table.hash, table.to(self.forward.device), names)

    @torch.no_grad()
    def measure(self, images: Images) -> BankResult:
        """Accuracies of the teacher and of its RDMs, bits, and a map of their embeddings."""
        table, size = images.table, self.forward.batch_size
        outputs = [self.networks(b) for b in table.in_order(torch.arange(len(table)), size)]
        logits, spaces = (
            [torch.cat([getattr(one, name) for one in each]) for each in zip(*outputs)]
            for name in ("logits", "embedding")
        )
        teacher, *kept = [metrics.classification_metrics(x, table.labels) for x in logits]
        nats = [self.rdms.image(x, None).nats.sum(1) for x in spaces[0].split(size)]
        bits = (torch.stack(nats).sum(0) / math.log(2) / len(table)).tolist()
        return BankResult(
            task="classification",
            dataset=images.name,
            split=images.split,
            model=self.name,
            teacher=teacher,
            assistants=tuple(
                Reconstruction(rate=rate, bits={"image": b}, metrics=values)
                for rate, b, values in zip(self.rdms.rates, bits, kept, strict=True)
            ),
            map=embedding_map(spaces, self.rdms.rates, table.labels, images.classnames),
            provenance=self.provenance(images, self.teacher.name, images=len(table)),
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
