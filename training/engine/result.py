"""What an evaluation says: one schema for CLIP models, classifiers and banks of RDMs.

A zero-shot result is clip_benchmark's JSON as well: the keys that it knows (dataset, model,
pretrained, task, metrics, language) are at the top. Keys that the schema does not name are left
alone: a study keeps a run's flags and its curve there.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from cifd_clip.files import BadFile, read_json, write_json

FORMAT = 1
#: What `Provenance.protocol` says unless a split differs from the one published under its name.
WHOLE, UNPUBLISHED = "whole", "no published protocol"
#: Name → value, a share of 1; None where a metric is not defined (top-5 of four classes).
Metrics = dict[str, float | None]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a figure depends on, and how to make it again.

    Attributes:
        command, commit: what made it; None where a study keeps them beside the result.
        seed: of the run whose weights these are.
        weights: SHA-256 of the weights that were evaluated.
        teachers: SHA-256 of the weights of each teacher.
        source: what the command calls the model.
        data: split → fingerprint of its images.
        held: what the evaluated split held: images, classes, templates, captions.
        protocol: `WHOLE`, `UNPUBLISHED`, or how the split differs from the published one.
        preprocessing: of an image: size, mean, standard deviation, interpolation.
        precision, device: of the forward pass.
        parameters: by part: ``image``, ``text`` and ``token_table``, or ``model``.
        versions: of packages.
        machine: what else `training.engine.run.environment` says.
    """

    command: str | None = None
    commit: str | None = None
    seed: int | None = None
    weights: str | None = None
    teachers: tuple[str, ...] = ()
    source: str = ""
    data: dict[str, str] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    protocol: str = ""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    precision: str = ""
    device: str = ""
    parameters: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> tuple:
        """What a figure of one model on one data set depends on: it repeats when this does."""
        return self.weights, self.teachers, self.data, self.preprocessing, self.precision

    @property
    def shortfall(self) -> str:
        """How the split differs from the published one; nothing if it does not."""
        return "" if self.protocol in ("", WHOLE, UNPUBLISHED) else self.protocol


@dataclass(frozen=True, kw_only=True)
class Training:
    """How `training.classify` trained what was evaluated.

    Attributes:
        method: its ``--method``.
        role: ``student``, or what a student needs: ``rdm`` or ``paraphraser``.
        student: the classifier's architecture; None of an RDM and a paraphraser.
        teacher: the teacher's architecture.
        assistants: those of TAKD and DGKD, large to small.
        rates: R of the RDMs: those that taught the student, or all of the bank.
        rate: R of this RDM.
        ibm: whether the student had an Information Bottleneck Module.
        settings: the run's configuration.
        steps, processes, seconds, cpu_seconds: what it took.
    """

    method: str
    role: str = "student"
    student: str | None = None
    teacher: str | None = None
    assistants: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    rate: float | None = None
    ibm: bool = False
    settings: dict[str, Any]
    steps: int
    processes: int = 1
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """The metrics of one model on one split of one data set.

    Attributes:
        task: ``zeroshot_classification``, ``zeroshot_retrieval`` or ``classification``.
        model: the run's or the model's name.
        pretrained: what tells weights of one name apart: clip_benchmark's word for it.
        metrics: on ``split``; None if a classifier has not looked at it (no ``--final``).
        holdout_metrics, train_metrics: of a classifier, on training images that were kept back and
            on those that it was trained on.
        training: of a classifier.
    """

    task: str
    dataset: str
    split: str
    model: str
    pretrained: str = ""
    language: str = "en"
    metrics: Metrics | None = None
    holdout_metrics: Metrics | None = None
    train_metrics: Metrics | None = None
    training: Training | None = None
    provenance: Provenance


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What the RDMs of one rate keep: bits per embedding by modality, and metrics in its place."""

    rate: float
    bits: dict[str, float]
    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class EmbeddingMap:
    """Two-dimensional points of some images' embeddings, of the teacher and of each rate.

    Attributes:
        classes: their names.
        labels: the class of each image, a place in ``classes``.
        points: ``teacher`` or ``{R:g}`` → (x, y) of each image.
    """

    classes: tuple[str, ...]
    labels: tuple[int, ...]
    points: dict[str, tuple[tuple[float, ...], ...]]

    def __post_init__(self):
        count, classes = len(self.labels), range(len(self.classes))
        if "teacher" not in self.points or any(
            [len(point) for point in points] != [2] * count for points in self.points.values()
        ):
            raise ValueError("map has other points than expected: (x, y) of each image")
        if not set(self.labels) <= set(classes):
            raise ValueError(f"map has labels {set(self.labels)}, expected {classes}")


@dataclass(frozen=True, kw_only=True)
class BankResult:
    """What a bank of RDMs keeps of its teacher on one split of one data set.

    Attributes:
        task, dataset, split: as of `Result`.
        model: the bank's run.
        teacher: the teacher's own metrics.
        assistants: what the RDMs of each rate keep.
        mean: metrics of the mean of teacher and assistants, the point that several of them pull a
            CLIP student to.
        map: of classification.
    """

    task: str
    dataset: str
    split: str
    model: str
    teacher: Metrics
    assistants: tuple[Reconstruction, ...]
    mean: Metrics | None = None
    map: EmbeddingMap | None = None
    provenance: Provenance


def of_classifier(
    *,
    dataset: str,
    model: str,
    training: Training,
    measured: Mapping[str, Metrics | None],
    environment: Mapping[str, Any],
    **provenance: Any,
) -> Result:
    """The result of a run of `training.classify`, of one of its RDMs or of a paraphraser.

    Args:
        dataset: ``--dataset``.
        model: the run's name.
        training: how it was trained.
        measured: ``metrics`` (of the test split), ``holdout_metrics`` and ``train_metrics``.
        environment: see `training.engine.run.environment`.
        provenance: what else is known of `Provenance`: seed, weights, teachers, data.
    """
    machine = dict(environment)
    return Result(
        task="classification",
        dataset=dataset,
        split="test",
        model=model,
        pretrained=(provenance.get("weights") or "")[:10],
        **measured,
        training=training,
        provenance=Provenance(
            command=machine.pop("command"),
            commit=machine.pop("commit"),
            versions=machine.pop("packages"),
            machine=machine,
            **provenance,
        ),
    )


def write(path: Path, result: Any) -> None:
    """Write a result; what is None at the top is left out.

    Raises:
        BadFile: it is not what its class says; metrics that are no numbers, for one.
    """
    content = {key: value for key, value in asdict(result).items() if value is not None}
    _decoded(path, type(result), content)
    write_json(path, content, FORMAT)


def read(path: Path, kind: type[T] = Result) -> T:
    """Read a result, or another dataclass that `write` wrote.

    Raises:
        BadFile: it is missing, no JSON, of another format, or not what its class says.
    """
    return _decoded(path, kind, read_json(path, FORMAT))


def _decoded(path: Path, kind: type[T], content: Any) -> T:
    try:
        return decode(kind, content)
    except ValueError as error:
        raise BadFile(f"{path} is no {kind.__name__}: {error}") from error


def decode(kind: Any, value: Any, name: str = "it") -> Any:
    """A JSON value as the annotated type ``kind``: a dataclass, tuple, dict, number or text.

    Raises:
        ValueError: it is of another type, or a dataclass lacks a value; ``name`` says where.
    """
    outer, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if outer in (Union, UnionType):  # X | None
        return None if value is None else decode(inner[0], value, name)
    if outer is dict and isinstance(value, dict):
        return {key: decode(inner[1], each, f"{name}.{key}") for key, each in value.items()}
    if outer is tuple and isinstance(value, list | tuple):
        return tuple(decode(inner[0], each, f"{name}[{i}]") for i, each in enumerate(value))
    if is_dataclass(kind) and isinstance(value, dict):
        return kind(**_attributes(kind, value, name))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number and math.isfinite(value):
        return float(value)
    if (kind is not int or number) and kind in (int, str, bool) and isinstance(value, kind):
        return value
    expected = "a finite number" if kind is float else getattr(kind, "__name__", kind)
    raise ValueError(f"{name} is {str(value)[:40]!r}, expected {expected}")


def _attributes(kind: type, value: dict[str, Any], name: str) -> dict[str, Any]:
    hints = get_type_hints(kind)
    for each in fields(kind):
        if each.name not in value and MISSING is each.default is each.default_factory:
            raise ValueError(f"{name} lacks {each.name!r}")
    return {
        key: decode(hint, value[key], key if name == "it" else f"{name}.{key}")
        for key, hint in hints.items()
        if key in value
    }
