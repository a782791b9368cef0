"""Finished classification runs as teachers, live or with their answers kept."""

import time
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from cifd_clip import RDMBank
from cifd_clip.classification.methods import Paraphraser, TeacherOutput
from cifd_clip.classification.models import STOCK, Classifier, build, stock_state
from cifd_clip.files import BadFile, file_hash, write_tensors
from cifd_clip.names import nearby
from training.classifier import cifar, imagenet
from training.classifier.cifar import VIEWS, ImageBatch, Table, mirrored
from training.engine.run import bank_folder, read_run
from training.errors import UsageError

Answer = tuple[Tensor, Tensor]  # logits and embedding

EVALUATION_BATCH = 500
#: What loading a damaged file of weights raises.
DAMAGED = (SafetensorError, UnpicklingError, EOFError, KeyError, RuntimeError, ValueError)
SIDES = {"cifar100": cifar.SIDE, "imagenet": imagenet.SIDE}


@dataclass
class TeacherRun:
    """A trained classifier from its run directory.

    Attributes:
        name: its architecture.
        model: frozen.
        hash: SHA-256 of its weights.
        holdout: how many training images it has not seen; None where that is not recorded.
        data: hash of its training images; None where that is not recorded.
    """

    name: str
    model: Classifier
    hash: str
    holdout: int | None
    data: str | None

    @property
    def identity(self) -> dict[str, Any]:
        """What a bank or a paraphraser made with this teacher must match."""
        return {"model": self.name, "weights": self.hash}


def load_teacher(place: str, dataset: str) -> TeacherRun:
    """The classifier of a finished run, or ``NAME:FILE``: a stock model and its weights.

    Raises:
        UsageError: there is none, or its run is not finished.
    """
    name, _, file = place.partition(":")
    if name in STOCK and file:
        return _stock_teacher(name, Path(file), dataset)
    flag, run = "--teacher", Path(place)
    config = _finished(flag, run)
    weights = run / "model.safetensors"
    if not weights.is_file():
        raise UsageError(f"{flag} {run} trained no classifier (--method {config['method']})")
    try:
        state = load_file(weights)
        model = build(config["model"], len(state["head.weight"]), SIDES[config["dataset"]])
        model.load_state_dict(state)
    except DAMAGED as problem:
        raise BadFile(f"{flag}: {weights} is damaged: {problem}") from None
    model.requires_grad_(False).eval()
    seen = read_run(run, "data.json", train=dict)["train"]["hash"]
    return TeacherRun(config["model"], model, file_hash(weights), config["holdout"], seen)


def _stock_teacher(name: str, file: Path, dataset: str) -> TeacherRun:
    if not file.is_file():
        raise UsageError(f"--teacher {name}:{file}: there is no such file{nearby(file)}")
    safe = file.suffix == ".safetensors"
    try:
        state = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        state = stock_state(name, state)
        model = build(name, len(state["head.weight"]), SIDES[dataset])
        model.load_state_dict(state)
    except DAMAGED as problem:
        raise UsageError(f"--teacher {name}:{file} holds no weights of {name}: {problem}") from None
    # What it was trained on is not known here.
    return TeacherRun(name, model.requires_grad_(False).eval(), file_hash(file), None, None)


def check_unseen(place: str, kept: int, holdout: int) -> None:
    """Refuse what was trained on images that are held out from who learns from it.

    Args:
        place: the flag and its value.
        kept: how many images it was trained without; the first of an order that is always the same.
        holdout: how many are held out now.

    Raises:
        UsageError: it has seen some of them.
    """
    if kept < holdout:
        raise UsageError(
            f"{place} was trained with --holdout {kept}: it has seen what --holdout {holdout} "
            "would keep back"
        )


def load_rdms(run: Path, teacher: TeacherRun, holdout: int = 0) -> RDMBank:
    """The assistants of a finished ``--method rdm`` run that has not seen what is held out."""
    config = _finished("--rdm-bank", run)
    check_unseen(f"--rdm-bank {run}", config["holdout"], holdout)
    try:
        return RDMBank.load(bank_folder(run), teacher.identity)
    except (FileNotFoundError, ValueError) as problem:
        raise UsageError(f"--rdm-bank: {problem}") from None


def load_paraphraser(run: Path, teacher: TeacherRun, holdout: int = 0) -> Paraphraser:
    """The one of a finished ``--method paraphraser`` run that has not seen what is held out."""
    config = _finished("--paraphraser", run)
    check_unseen(f"--paraphraser {run}", config["holdout"], holdout)
    try:
        return Paraphraser.load(run / "paraphraser", teacher.identity)
    except (FileNotFoundError, ValueError) as problem:
        raise UsageError(f"--paraphraser: {problem}") from None


def _finished(flag: str, run: Path) -> dict[str, Any]:
    if not (run / "config.json").is_file():
        raise UsageError(f"{flag} {run} is no run directory of training.classify{nearby(run)}")
    config = read_run(run)
    if "method" not in config:  # but --distill
        raise UsageError(
            f"{flag} {run} is a run of training.main, which trains no classifier: expected one of "
            "training.classify"
        )
    if not (run / "finished.json").is_file():
        raise UsageError(f"{flag} {run} is not finished: continue it with --resume latest")
    return read_run(run, method=str, model=str, dataset=str, holdout=int)


class TeacherNetworks(nn.Module):
    """Teachers and assistants that look at every batch.

    Args:
        models: the teachers, each an embedding space of its own.
        rdms: assistants of the first teacher.
        selected: which of them teach.
        weights: λ_n of each assistant selected.
        embeddings: whether embeddings are wanted.
    """

    needs_images = True

    def __init__(
        self,
        models: list[Classifier],
        rdms: RDMBank | None = None,
        selected: list[int] | None = None,
        weights: list[float] | None = None,
        embeddings: bool = True,
    ):
        super().__init__()
        self.models, self.rdms = nn.ModuleList(models), rdms
        self.selected, self.weights = selected or [], weights or []
        self.embeddings = embeddings

    @property
    def dims(self) -> list[int]:
        """T of each embedding space."""
        own = [model.width for model in self.models]
        if self.rdms is None or self.rdms.image.form == "reconstruct":
            return own
        return own + [self.rdms.image.embedding_dim] * len(self.selected)

    @torch.no_grad()
    def forward(self, batch: ImageBatch) -> list[TeacherOutput]:
        """What they say about a batch: the teachers, then the assistants; always in float32."""
        with torch.autocast(batch.labels.device.type, enabled=False):
            return self.outputs([answer(model, batch) for model in self.models])

    @torch.no_grad()
    def outputs(self, answers: list[Answer]) -> list[TeacherOutput]:
        """What teachers and assistants say, of the teachers' answers."""
        outputs = [TeacherOutput(*answer, space) for space, answer in enumerate(answers)]
        if self.rdms is not None:
            assistants = self.rdms.image(outputs[0].embedding, None)
            for i, (k, weight) in enumerate(zip(self.selected, self.weights)):
                own = 0 if self.rdms.image.form == "reconstruct" else len(self.models) + i
                outputs.append(
                    TeacherOutput(assistants.logits[k], assistants.embedding[k], own, weight)
                )
        if self.embeddings:
            return outputs
        return [output._replace(embedding=None) for output in outputs]


def answer(model: Classifier, batch: ImageBatch) -> Answer:
    """A classifier's logits and embedding of a batch."""
    embedding = model.features(batch.images)
    return model.classify(embedding), embedding


class TeacherTable:
    """The answers of `TeacherNetworks` to every view of every row of a table, looked up.

    Args:
        live: who answers.
        table: the training images.
        augment: its views are those of this augmentation.
        hashes: of each teacher's weights.
        directory: where answers are kept for other runs; None: nowhere.

    Attributes:
        saved: CPU seconds that were spent, by an earlier run, on answers found in ``directory``.
    """

    needs_images = False

    def __init__(
        self,
        live: TeacherNetworks,
        table: Table,
        augment: str,
        hashes: list[str],
        directory: Path | None = None,
    ):
        self.dims = live.dims
        self.saved = 0.0
        self._rows = len(table)
        every = []
        for model, name in zip(live.models, hashes, strict=True):
            file = f"{name[:16]}_{table.hash[:16]}_{table.part[:16]}_{augment}.safetensors"
            every.append(self._answers(model, table, augment, directory and directory / file))
        chunks = zip(*(zip(*(t.split(EVALUATION_BATCH) for t in pair)) for pair in every))
        parts = [live.outputs(list(answers)) for answers in chunks]
        self._outputs = [
            outputs[0]._replace(
                logits=torch.cat([o.logits for o in outputs]),
                embedding=_joined([o.embedding for o in outputs]),
            )
            for outputs in zip(*parts)
        ]

    def _answers(self, model: Classifier, table: Table, augment: str, file: Path | None) -> Answer:
        """A teacher's answers to all views, (views·N, classes) and (views·N, T)."""
        device = table.images.device
        if file is not None and file.is_file():
            try:
                with safe_open(file, "pt", device=str(device)) as kept:
                    self.saved += float(kept.metadata()["cpu_seconds"])
                    return kept.get_tensor("logits"), kept.get_tensor("embedding")
            except (*DAMAGED, TypeError) as problem:  # TypeError: it has no metadata
                raise BadFile(
                    f"--teacher-cache: {file} is damaged ({problem}): remove it"
                ) from None
        start = time.process_time()
        pairs = []
        with torch.no_grad():
            for view in range(VIEWS[augment]):
                for rows in torch.arange(len(table), device=device).split(EVALUATION_BATCH):
                    batch = table.batch(rows)
                    pairs.append(answer(model, mirrored(batch) if view else batch))
        logits, embedding = (torch.cat(parts) for parts in zip(*pairs))
        if file is not None:
            spent = {"cpu_seconds": str(time.process_time() - start)}
            write_tensors(file, {"logits": logits, "embedding": embedding}, spent)
        return logits, embedding

    def __call__(self, batch: ImageBatch) -> list[TeacherOutput]:
        """What they said about the batch's rows and views."""
        index = batch.views * self._rows + batch.rows
        return [
            o._replace(
                logits=o.logits[index],
                embedding=None if o.embedding is None else o.embedding[index],
            )
            for o in self._outputs
        ]

    @property
    def embedding(self) -> Tensor:
        """(views·N, T) the first teacher's embeddings."""
        return self._outputs[0].embedding


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat(parts)
