"""What a report is made of: run directories and folders of results, and what each is a run of."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cifd_clip.files import read_json
from cifd_clip.names import nearby
from eval.result import Examples, GapRecord
from training.classifier.config import Config as ClassifierConfig
from training.clip.config import OWN_WEIGHTS, Config, recorded
from training.engine.config import free_to_change
from training.engine.result import BankResult, Result, read
from training.engine.run import read_metrics, read_run
from training.errors import UsageError
from training.tuning import table as tuning

#: What may differ between the runs of one setting besides what may differ within one run.
SEEDED = free_to_change(Config) | free_to_change(ClassifierConfig)
SEEDED |= {"seed", "view_seed", "name", "rdm_bank", "teacher", "paraphraser"}
T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """What a run is a run of; the runs of one setting differ by their seed alone.

    Attributes:
        method: a ``--distill`` or ``--method``; ``released``: weights as somebody published them.
        student, teachers: architectures, with ``:WEIGHTS`` that are published.
        rdms: assistants per modality; None where the run does not record its bank.
        dataset, subset: of a classifier, and how many of the training images, where not all.
        rest: everything else, as text; empty where it is not known.
    """

    method: str
    student: str
    teachers: tuple[str, ...] = ()
    rdms: int | None = 0
    ibm: bool = False
    dataset: str | None = None
    subset: int = 0
    rest: str = ""

    def __str__(self) -> str:
        cifd, count = self.method == "cifd", "?" if self.rdms is None else self.rdms
        parts = [f"{count} RDM"] if cifd or self.rdms else []
        if self.ibm != cifd:
            parts.append("IBM" if self.ibm else "no IBM")
        return f"{self.method} ({', '.join(parts)})" if parts else self.method


@dataclass
class Source:
    """What one path brings: of a run its configuration (``clip`` of a CLIP run's) and log; results.

    A folder of results has no ``config``. Of a study of `training.tune` there is its table.
    """

    path: Path
    config: dict[str, Any] | None = None
    clip: Config | None = None
    finished: dict[str, Any] | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    banks: list[BankResult] = field(default_factory=list)
    gaps: list[GapRecord] = field(default_factory=list)
    examples: list[Examples] = field(default_factory=list)
    study: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The folder's name, by which results call the run."""
        path = self.path.resolve()
        return f"{path.parent.name}/rdm" if path.name == "rdm" else path.name

    @property
    def method(self) -> str:
        """How the run trained: ``none`` of a folder of results."""
        if self.clip:
            return self.clip.distill
        return self.config["method"] if self.config else "none"

    @property
    def taught_by(self) -> dict[str, Any]:
        """The teachers and banks that a CLIP run recorded, if it came so far."""
        known = self.clip and (self.path / "teachers.json").is_file()
        types = {"teachers": list, "banks": list}
        return read_run(self.path, "teachers.json", **types) if known else {}

    @property
    def teachers(self) -> tuple[str, ...]:
        """A CLIP run's: ``NAME:TAG``, or a run by its folder's name."""
        recorded = self.taught_by.get("teachers", [])  # of a cache only the cache knows the name
        named = self.clip.teachers if self.clip else []
        return tuple(_teacher(*one) for one in named or [(one["model"], "") for one in recorded])

    @property
    def trained(self) -> str:
        """How long and on what a CLIP run trained, in words."""
        if not (self.clip and self.finished):
            return ""
        held = read_run(self.path, "data.json", usable=(int, str))["usable"]
        held = f"{held:,}" if isinstance(held, int) else held  # a stream's are not counted
        return f"{self.finished['samples']:,} samples seen of {held}"


def read_sources(paths: Iterable[Path]) -> list[Source]:
    """Run directories, each once and with its own stage 1 where it has one, and folders of results.

    A folder of runs is all of them.

    Raises:
        UsageError: nothing to report there, or results of a run that was trained again since.
        BadFile: a result is of another format, or none.
    """
    runs = (run for path in paths for run in _runs_in(path))
    stages = [stage for run in runs for stage in (run, run / "rdm")]
    there = [p for p in stages if p.name != "rdm" or (p / "config.json").is_file()]
    return [_read(path) for path in {path.resolve(): path for path in there}.values()]


def _runs_in(path: Path) -> list[Path]:
    """The runs in a folder that is nothing else; else the path itself."""
    if (path / "config.json").is_file() or any(path.glob("*.json")):
        return [path]
    return sorted(file.parent for file in path.glob("*/config.json")) or [path]


def _read(path: Path) -> Source:
    if not path.is_dir():
        raise UsageError(
            f"'{path}': no such folder; expected a run directory or a results folder{nearby(path)}"
        )
    source = Source(path)
    if (path / "config.json").is_file():
        source.config = read_run(path)
        if "distill" in source.config:
            source.clip = recorded(path)
        else:
            read_run(path, method=str)  # of training.classify
        if (path / "finished.json").is_file():
            source.finished = read_run(path, "finished.json")
        source.metrics = read_metrics(path)
        results = path / "results"
        _read_results(source, [*path.glob("result*.json"), *results.glob("*.json")], results)
        _check_one_student(source)
    elif (path / "settings.json").is_file():
        if not (path / "table.json").is_file():
            raise UsageError(f"'{path}': the study is not finished: go on with its command")
        types = {"against": str, "rows": list, "settings": dict}
        source.study = read_json(path / "table.json", tuning.FORMAT, **types)
    else:
        _read_results(source, [*path.glob("*.json"), *path.glob("runs/**/*.json")], path)
    if not (source.metrics or source.results or source.gaps or source.banks or source.study):
        raise UsageError(
            f"'{path}': holds neither metrics.jsonl nor results; evaluate the run first"
        )
    return source


def _check_one_student(source: Source) -> None:
    """Refuse results of a run trained again in its place: both weights go by the run's name.

    Which are the older ones the files don't say, and the mean over seeds would take either. A
    checkpoint's results, of ``NAME@step``, are their own.
    """
    named = [r.provenance.weights for r in source.results if r.model == source.name]
    weights = sorted({each[:10] for each in named if each})
    if len(weights) > 1:
        raise UsageError(
            f"'{source.path}': results/ holds results of {source.name} with different weights, "
            f"{' and '.join(weights)} (in the files' names); move those of older ones away"
        )


def _read_results(source: Source, files: Iterable[Path], folder: Path) -> None:
    """Results have a task; what else lies beside them is of the study that they are from."""

    def read_all(name: str, kind: type[T]) -> list[T]:
        return [read(path, kind) for path in sorted((folder / name).glob("*.json"))]

    source.results = [read(file) for file in sorted(files) if "task" in read_json(file)]
    source.banks = read_all("bank", BankResult)
    source.gaps = read_all("gaps", GapRecord)
    source.examples = read_all("examples", Examples)


def setting_of(source: Source, result: Result) -> tuple[Setting | None, int | None]:
    """What a result is a result of, and the run's seed; None where nothing says so."""
    if result.training:
        return classifier_setting(result), result.provenance.seed
    if source.clip is None:
        named = result.provenance.source
        released = ":" in named and not named.startswith(OWN_WEIGHTS)
        return (Setting("released", named) if released else None), None
    if result.model != source.name:  # a checkpoint on the way
        return Setting(source.method, result.model), source.clip.seed
    return _clip_setting(source), source.clip.seed


def classifier_setting(result: Result) -> Setting:
    """What a run of `training.classify`, or one of its RDMs, is a run of."""
    training = result.training
    rest = {k: v for k, v in training.settings.items() if k not in SEEDED}
    return Setting(
        method=training.method,
        student=training.student or "",
        teachers=(training.teacher,) if training.teacher else (),
        rdms=len(training.rates) if training.role == "student" else 0,
        ibm=training.ibm,
        dataset=result.dataset,
        subset=training.settings["subset"],
        rest=json.dumps([training.rates, training.assistants, rest], sort_keys=True),
    )


def _teacher(name: str, weights: str | None) -> str:
    """A file of weights has no name that a paper could print."""
    if name.startswith("local-dir:"):
        return Path(name.removeprefix("local-dir:").removesuffix("/student")).name
    return f"{name}:{weights}" if weights and "/" not in weights else name


def _clip_setting(source: Source) -> Setting:
    config, taught_by = source.clip, source.taught_by
    # The bank has its own rates, whatever the run's flag said.
    banks = [bank | {"teacher": None} for bank in taught_by.get("banks", ())]
    unknown = config.distill == "cifd" and not taught_by
    rest = {k: v for k, v in source.config.items() if k not in SEEDED and (unknown or k != "rates")}
    return Setting(
        method=config.distill,
        student=f"{config.model}:{config.pretrained}" if config.pretrained else config.model,
        teachers=source.teachers,
        rdms=None if unknown else sum(len(bank["rates"]) for bank in banks),
        ibm=config.options.get("ibm", False),
        rest=json.dumps([banks, rest], sort_keys=True),
    )
