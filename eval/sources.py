"""What the report is made of: run directories and folders of results, and what each run is of."""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from eval.tables import Row, Run, add_result, common_name, shortfall
from training.clip.config import Config
from training.engine.config import free_to_change
from training.errors import UsageError

#: What may differ between the runs of one setting besides what may differ within one run.
SEEDED = free_to_change(Config) | {
    "seed",
    "view_seed",
    "name",
    "rdm_bank",
    "teacher",
    "paraphraser",
}

#: In the order of their lines.
METHODS = ("none", "kd", "ft", "takd", "dgkd", "cifd")


@dataclass(frozen=True)
class Setting:
    """What a run is a run of; the runs of one setting differ by their seed alone.

    Attributes:
        method: a ``--distill`` or ``--method``; ``released``: weights as somebody published them.
        student: its architecture, with ``:WEIGHTS`` where it began from (or is) published weights.
        teachers: their architectures, with ``:WEIGHTS`` where a tag names those.
        rdms: number of assistants per modality; None where the bank is gone.
        ibm: whether the student had an Information Bottleneck Module.
        dataset: what a classifier was trained on; None for CLIP.
        subset: how many of its training images, where not all.
        rest: everything else, as text.
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
        if self.method != "cifd":
            return self.method
        known = "?" if self.rdms is None else self.rdms
        return f"cifd ({known} RDM{'' if self.ibm else ', no IBM'})"


@dataclass
class Source:
    """What one path brings: a run's configuration and metrics, and results."""

    path: Path
    config: dict | None = None
    finished: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    taught_by: dict = field(default_factory=dict)
    metrics: list[dict] = field(default_factory=list)
    results: list[dict] = field(default_factory=list)
    banks: list[dict] = field(default_factory=list)
    gaps: list[dict] = field(default_factory=list)
    examples: list[dict] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's name, by which results call the run."""
        path = self.path.resolve()
        return f"{path.parent.name}/rdm" if path.name == "rdm" else path.name

    @property
    def method(self) -> str:
        """How the run trained."""
        config = self.config or {}
        return config.get("distill") or config.get("method") or "none"

    @property
    def teachers(self) -> list[str]:
        """The run directories or names of a run's teachers."""
        given = (self.config or {}).get("distill_model") or []
        given = given.split(",") if isinstance(given, str) else given
        return [name.removeprefix("local-dir:").removesuffix("/student") for name in given]


def read_source(path: Path) -> list[Source]:
    """A run directory, with its own stage 1 where it has one, or a folder of results.

    Raises:
        UsageError: nothing to report there, or results of a run that was trained again since.
    """
    if not path.is_dir():
        raise UsageError(f"'{path}': no such folder; expected a run directory or a results folder")
    source = Source(path)
    if (path / "config.json").is_file():
        _read_run(source)
    else:
        _read_results(source, [*path.glob("*.json"), *path.glob("runs/**/*.json")], path)
    if not (source.metrics or source.results or source.gaps or source.banks):
        raise UsageError(
            f"'{path}': holds neither metrics.jsonl nor results; evaluate the run first"
        )
    stage1 = path / "rdm" / "config.json"
    return [source, *(read_source(stage1.parent) if stage1.is_file() else [])]


def _read_run(source: Source) -> None:
    path = source.path
    source.config = json.loads((path / "config.json").read_text())
    files = {"finished": "finished.json", "data": "data.json", "taught_by": "teachers.json"}
    for name, file in files.items():
        if (path / file).is_file():
            setattr(source, name, json.loads((path / file).read_text()))
    if (path / "metrics.jsonl").is_file():
        lines = (path / "metrics.jsonl").read_text().splitlines()
        source.metrics = [json.loads(line) for line in lines]
    results = path / "results"
    _read_results(source, [*path.glob("result*.json"), *results.glob("*.json")], results)
    _check_one_student(source)


def _check_one_student(source: Source) -> None:
    """Refuse results of a run trained again in its place: both weights go by the run's name.

    Which are the older ones the files don't say, and the mean over seeds would take either. A
    checkpoint's results, of ``NAME@step``, are their own.
    """
    provenances = [r.get("provenance", {}) for r in source.results if r.get("model") == source.name]
    weights = sorted({p["weights"][:10] for p in provenances if p.get("weights")})
    if len(weights) > 1:
        raise UsageError(
            f"'{source.path}': results/ holds results of {source.name} with different weights, "
            f"{' and '.join(weights)} (in the files' names); move those of older ones away"
        )


def _read_results(source: Source, files: list[Path], folder: Path) -> None:
    found = [json.loads(file.read_text()) for file in sorted(files)]
    source.results = [r for r in found if isinstance(r, dict) and "task" in r]
    source.banks = _read_all(folder / "bank")
    source.gaps = _read_all(folder / "gaps")
    source.examples = _read_all(folder / "examples")


def _read_all(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def rows(sources: list[Source], pooled: bool = True) -> list[Row]:
    """The students' and teachers' figures, in the order of the sources.

    Args:
        pooled: one row for each setting and precision, over its seeds; otherwise one row for each
            set of weights.

    Raises:
        UsageError: two results that one row would hold are of different data. Rows of their own
            would tear the runs apart on all other data sets too.
    """
    found: list[Row] = []
    first: dict[tuple, tuple[str, str]] = {}
    counted = set()
    for source in sources:
        for result in source.results:
            if result.get("role"):  # a part of another run
                continue
            row, run = _row_of(found, source, result, pooled)
            provenance = result.get("provenance", {})
            what = id(row), result["dataset"], provenance.get("split"), result["task"]
            data = _tested_on(provenance)
            other, others_data = first.setdefault(what, (run.name, data))
            if others_data != data:
                whose = " and ".join(dict.fromkeys((other, run.name)))
                raise UsageError(
                    f"'{source.path}': results of {whose} on {result['dataset']} are of different "
                    f"data, {others_data} and {data}; move one of them away"
                )
            if (what, run) not in counted:  # else a copy
                add_result(row, result, run)
            counted.add((what, run))
            row.trained = trained(source) or row.trained
    for gap in (gap for source in sources for gap in source.gaps):
        of_model = [row for row in found if gap["model"] in row.names]
        if not of_model:
            of_model = [Row(gap["model"])]
            found += of_model
        for row in of_model:
            row.gaps[gap["dataset"]] = gap["gap"]
    for row in found:
        row.name = common_name(row.names) or row.name
    return sorted(found, key=_place)


def _tested_on(provenance: dict) -> str:
    """Fingerprints of a result's data, and how its test set differs from the published one."""
    data = provenance.get("data") or "unknown"
    data = data if isinstance(data, dict) else {"": data}
    told = ", ".join(f"{split} {text[:12]}".strip() for split, text in sorted(data.items()))
    return f"{told} ({part})" if (part := shortfall(provenance)) else told


def _place(row: Row) -> tuple:
    """Classifiers of a study by method; what else there is stays in the order it was given."""
    setting = row.setting
    if setting is None or setting.dataset is None:
        return (0,)
    method = METHODS.index(setting.method) if setting.method in METHODS else len(METHODS)
    return 1, setting.dataset, method, setting.student, setting.rdms or 0, setting.ibm


def _row_of(found: list[Row], source: Source, result: dict, pooled: bool) -> tuple[Row, Run]:
    """The row a result belongs to, made where it is the first, and its run.

    Runs pool when they differ by their seed alone: a seed's second run is no further sample.
    """
    setting, seed = setting_of(source, result)
    provenance = result.get("provenance", {})
    named = provenance.get("settings", {}).get("name")
    name = result.get("model") or named or f"{setting.dataset} {setting.student}"
    precision = provenance.get("precision")
    run = Run(name, seed, str(provenance.get("weights")))
    for row in found:
        same = run in row.runs
        pools = pooled and setting and setting.rest and seed not in (None, *row.seeds)
        if (row.setting, row.precision) == (setting, precision) and (same or pools):
            return row, run
    method = str(setting) if setting else ""
    found.append(Row(name, method, setting=setting, precision=precision))
    return found[-1], run


def trained(source: Source) -> str:
    """How long and on what a run trained, in words."""
    seen, held = source.finished.get("samples"), source.data.get("usable")
    parts = [f"{seen:,} samples seen" if seen else "", f"of {held:,}" if seen and held else ""]
    return " ".join(filter(None, parts))


def setting_of(source: Source, result: dict) -> tuple[Setting | None, int | None]:
    """What a result is a result of, and the run's seed; None where nothing says so."""
    if result["task"] == "classification":
        return _classifier_setting(result), result.get("seed")
    if source.config is None:
        named = result.get("provenance", {}).get("source", "")
        released = ":" in named and not named.startswith(("local-dir:", "hf-hub:"))
        return (Setting("released", named) if released else None), None
    if result["model"] != source.name:  # a checkpoint on the way
        return Setting(source.method, result["model"]), source.config.get("seed")
    return _clip_setting(source), source.config.get("seed")


def _classifier_setting(result: dict) -> Setting:
    cifd = result["method"] == "cifd"
    rates = result.get("rates") or []
    settings = result.get("provenance", {}).get("settings", {})
    unknown = cifd and not rates and settings.get("rdm_bank")  # all of a bank that is not named
    rest = {k: v for k, v in settings.items() if k not in SEEDED}
    return Setting(
        method=result["method"],
        student=result["student"],
        teachers=(result["teacher"],) if result.get("teacher") else (),
        rdms=None if unknown else len(rates) if cifd else 0,
        ibm=cifd and bool(result.get("ibm")),
        dataset=result["dataset"],
        subset=settings.get("subset") or 0,
        rest=json.dumps([rates, result.get("assistants"), rest], sort_keys=True),
    )


def _clip_setting(source: Source) -> Setting:
    config = source.config
    cifd = source.method == "cifd"
    unknown = cifd and not source.taught_by
    bank = None if unknown else source.taught_by.get("bank") or {"rates": []}
    settled = SEEDED if unknown else SEEDED | {"rates"}  # the bank has its own
    rest = {k: v for k, v in {**_absent_flags(), **config}.items() if k not in settled}
    student, pretrained = config.get("model", source.name), config.get("pretrained")
    return Setting(
        method=source.method,
        student=f"{student}:{pretrained}" if pretrained else student,
        teachers=_teacher_names(source),
        rdms=None if bank is None else len(bank["rates"]),
        ibm=cifd and not config.get("no_ibm", False),
        rest=json.dumps([bank and {**bank, "teacher": None}, rest], sort_keys=True),
    )


@cache
def _absent_flags() -> dict:
    """What flags stand for in runs that are older than they are (`training.engine.run`)."""
    return {**json.loads(json.dumps({})), **{}}


def _teacher_names(source: Source) -> tuple[str, ...]:
    """``ARCH`` or ``ARCH:WEIGHTS`` of each teacher; of a cache's teacher, its architecture."""
    config = source.config
    named = config.get("distill_model")
    if not named:
        return tuple(teacher["model"] for teacher in source.taught_by.get("teachers", []))
    weights = iter((config.get("distill_pretrained") or "").split(","))
    return tuple(
        name if name.startswith(("local-dir:", "hf-hub:")) else _with_tag(name, next(weights, ""))
        for name in named.split(",")
    )


def _with_tag(name: str, weights: str) -> str:
    """A file of weights has no name that a paper could print."""
    return f"{name}:{weights}" if weights and "/" not in weights else name
