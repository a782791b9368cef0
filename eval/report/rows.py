"""Results as rows: one for each setting over its seeds, or one for each run."""

import re
import statistics
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from eval.report.runs import Setting, Source, setting_of
from eval.report.table import Cell, Column, Table, columns, mean
from training.engine.result import Provenance, Result
from training.errors import UsageError

TASKS = {
    "classification": {"acc1": "top-1", "acc5": "top-5"},
    "zeroshot_classification": {"acc1": "top-1", "acc5": "top-5"},
    "zeroshot_retrieval": {
        f"{way}_retrieval_recall@{k}": f"{sign} R@{k}"
        for way, sign in (("image", "T→I"), ("text", "I→T"))
        for k in (1, 5, 10)
    },
}
SIZES = {"image": "image tower", "text": "text tower"}
MARK = "†"  # of a figure that is not of what its name promises: a note below says why
#: Of classifiers, in the order of their rows.
METHODS = ("none", "kd", "ft", "takd", "dgkd", "cifd")
Figure = tuple[str, str]  # data set (with its split where that is not "test"), metric's label


class RunKey(NamedTuple):
    """One of the runs of a row."""

    name: str
    seed: int | None
    weights: str | None


@dataclass
class Row:
    """One setting, where it is known: its runs' figures in percent, in the order of the runs.

    ``gaps`` has reasons by data set; ``shortfalls`` how a data set differs from the published one:
    ``5 images of 50000``; ``trained`` how long and on what, in words.
    """

    name: str
    method: str = ""
    setting: Setting | None = None
    precision: str = ""
    parameters: dict[str, int] = field(default_factory=dict)
    runs: list[RunKey] = field(default_factory=list)
    values: dict[Figure, list[float]] = field(default_factory=dict)
    gaps: dict[str, str] = field(default_factory=dict)
    shortfalls: dict[str, str] = field(default_factory=dict)
    trained: str = ""

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(run.name for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs that have one."""
        return sorted(run.seed for run in self.runs if run.seed is not None)

    @property
    def teachers(self) -> str:
        return ", ".join(self.setting.teachers) if self.setting else ""

    @property
    def student(self) -> tuple:
        """What tells whether two rows have the same student."""
        return self.setting.student if self.setting else self.name, self.parameters

    def mean(self, figure: Figure) -> float:
        return statistics.fmean(self.values[figure])

    def cell(self, figure: Figure, baseline: "Row | None" = None) -> Cell:
        """``46.7``, with ``± 0.2`` of several runs; the reason of a gap, or nothing.

        Where only some of the row's runs have the figure, it says how many. ``baseline`` is the row
        that it is compared with.
        """
        values = self.values.get(figure)
        if values is None:
            return self.gap(figure[0])
        cell = mean(values, 1, MARK if figure[0] in self.shortfalls else "")
        few = f" (n = {len(values)})" if len(values) < len(self.runs) else ""
        compared = baseline and figure in baseline.values
        difference = f"{self.mean(figure) - baseline.mean(figure):+.1f}" if compared else ""
        return replace(cell, small=f"{cell.small}{few}".strip(), difference=difference)

    def gap(self, dataset: str) -> Cell:
        reason = self.gaps.get(dataset)
        return Cell(f"gap: {reason}" if reason else "", style="gap")

    def notes(self, dataset: str | None = None) -> list[str]:
        """What is to be said below a table of the figures on this data set, or on all."""
        return [
            f"Not the published {name}: {reason}"
            for name, reason in self.shortfalls.items()
            if dataset in (None, name)
        ]

    def add(self, result: Result, run: RunKey) -> None:
        """Add a result's metrics, as those of a run of this setting."""
        self.runs += [] if run in self.runs else [run]
        name = result.dataset
        dataset = name if result.split == "test" else f"{name} ({result.split})"
        parts = {dataset: result.metrics, f"{name} (held out)": result.holdout_metrics}
        for images, metrics in {**parts, f"{name} (train)": result.train_metrics}.items():
            for metric, label in TASKS[result.task].items():
                if metrics and metrics.get(metric) is not None:
                    self.values.setdefault((images, label), []).append(100 * metrics[metric])
        if shortfall := result.provenance.shortfall:
            self.shortfalls[dataset] = shortfall
        if not result.metrics:
            self.gaps[name] = "the test split was not looked at"
        self.parameters = result.provenance.parameters or self.parameters


def rows_of(sources: list[Source], pooled: bool = True) -> list[Row]:
    """The students' and teachers' figures, in the order of the sources.

    Args:
        sources: of the report.
        pooled: one row for each setting and precision, over its seeds; else for each run.

    Raises:
        UsageError: two results that one row would hold are of different data. Rows of their own
            would tear the runs apart on all other data sets too.
    """
    rows: list[Row] = []
    first: dict[tuple, tuple[str, str]] = {}
    counted = set()
    for source in sources:
        for result in source.results:
            if result.training and result.training.role != "student":
                continue
            row, run = _row_of(rows, source, result, pooled)
            key = id(row), result.dataset, result.split, result.task
            data = _tested_on(result.provenance)
            other, others_data = first.setdefault(key, (run.name, data))
            if others_data != data:
                whose = " and ".join(dict.fromkeys((other, run.name)))
                raise UsageError(
                    f"'{source.path}': results of {whose} on {result.dataset} are of different "
                    f"data, {others_data} and {data}; move one of them away"
                )
            if (key, run) not in counted:  # else a copy
                row.add(result, run)
            counted.add((key, run))
            row.trained = source.trained or row.trained
    for gap in (gap for source in sources for gap in source.gaps):
        if not any(gap.model in (row.name, *row.names) for row in rows):
            rows.append(Row(gap.model))
        for row in rows:
            if gap.model in (row.names or [row.name]):
                row.gaps[gap.dataset] = gap.gap
    for row in rows:
        row.name = _common_name(row.names) or row.name
    return sorted(rows, key=_place)


def _row_of(rows: list[Row], source: Source, result: Result, pooled: bool) -> tuple[Row, RunKey]:
    """The row a result belongs to, made where it is the first, and its run.

    Runs pool when they differ by their seed alone: a seed's second run is no further sample.
    """
    setting, seed = setting_of(source, result)
    precision = result.provenance.precision
    run = RunKey(result.model, seed, result.provenance.weights)
    for row in rows:
        same = run in row.runs
        pools = pooled and setting and setting.rest and seed not in (None, *row.seeds)
        if (row.setting, row.precision) == (setting, precision) and (same or pools):
            return row, run
    method = str(setting) if setting else ""
    rows.append(Row(result.model, method, setting, precision))
    return rows[-1], run


def _tested_on(provenance: Provenance) -> str:
    """Fingerprints of a result's data, and how its test set differs from the published one."""
    hashes = (f"{split} {text[:12]}" for split, text in sorted(provenance.data.items()))
    data = ", ".join(hashes) or "unknown"
    return f"{data} ({provenance.shortfall})" if provenance.shortfall else data


def _common_name(names: list[str]) -> str:
    """What the names of several seeds' runs share: ``cifd-seed0``, ``cifd-seed1`` → ``cifd``."""
    if len(names) < 2:
        return "".join(names)
    stems = {re.sub(r"[-_. ]*(seed|s)?[-_=]?\d+$", "", name) for name in names}
    return stems.pop() if len(stems) == 1 else names[0]


def _place(row: Row) -> tuple:
    """Classifiers of a study by method; what else there is stays in the order it was given."""
    setting = row.setting
    if setting is None or setting.dataset is None:
        return (0,)
    method = METHODS.index(setting.method) if setting.method in METHODS else len(METHODS)
    return 1, setting.dataset, method, setting.student, setting.rdms or 0, setting.ibm


def figures(rows: list[Row]) -> list[Figure]:
    """Every figure that some row has, data set by data set; a gap alone has a column of its own."""
    labels = list(dict.fromkeys(label for task in TASKS.values() for label in task.values()))
    known = {figure for row in rows for figure in row.values}
    # classification before retrieval, then by name
    first = {d: min(labels.index(m) for e, m in known if e == d) for d, _ in known}
    ordered = sorted(known, key=lambda f: (first[f[0]], f[0], labels.index(f[1])))
    return ordered + [(d, "") for d in sorted({d for r in rows for d in r.gaps} - first.keys())]


def millions(count: int) -> str:
    """``0.034 M``, with three significant digits."""
    return f"{count / 1e6:.3g} M"


def several(rows: list[Row]) -> bool:
    """Whether some row has more than one run."""
    return any(len(row.runs) > 1 for row in rows)


def notes(rows: list[Row]) -> list[str]:
    """What the marks of these rows' figures mean."""
    return [f"{MARK} {note}." for note in dict.fromkeys(n for row in rows for n in row.notes())]


def results_table(rows: list[Row], plain: list[Row | None], colours: dict[str, str]) -> Table:
    """Percentages, with the differences to each row's plain student beside them."""
    shown = figures(rows)
    taught = [Column("teacher", words=True)] if any(row.teachers for row in rows) else []
    sizes = [size for size in SIZES if any(size in row.parameters for row in rows)]
    counts = [Column("n")] if several(rows) else []
    columns = [
        Column("model", words=True),
        Column("method", words=True),
        *taught,
        *counts,
        *(Column(SIZES[size]) for size in sizes),
        *(Column(label, dataset) for dataset, label in shown),
    ]
    lines = [
        [
            Cell(row.name, style="name", colour=colour_of(row, colours)),
            row.method,
            *(row.teachers for _ in taught),
            *(str(len(row.runs)) for _ in counts),
            *(millions(row.parameters[s]) if s in row.parameters else "" for s in sizes),
            *(row.cell(figure, baseline) for figure in shown),
        ]
        for row, baseline in zip(rows, plain)
    ]
    return Table(columns, lines, "results")


def colour_of(row: Row, colours: dict[str, str]) -> str | None:
    """That of the first of a row's runs that has one: the row itself goes by what they share."""
    return next((colours[name] for name in (*row.names, row.name) if name in colours), None)


def records(rows: list[Row]) -> Table:
    """All figures, unrounded, for CSV; meant for one run a row."""
    shown, noted = figures(rows), bool(notes(rows))
    sizes = ["image", "text", "token_table"]
    head = ["model", "method", "teacher", "seed", *(f"{size}_parameters" for size in sizes)]
    head += [*(" ".join(figure).strip() for figure in shown), *(["notes"] if noted else [])]
    lines = [
        [
            row.name,
            row.method,
            row.teachers,
            " ".join(map(str, row.seeds)),
            *(str(row.parameters.get(size, "")) for size in sizes),
            *(f"{row.mean(f):.4f}" if f in row.values else row.gap(f[0]) for f in shown),
            *(["; ".join(row.notes())] if noted else []),
        ]
        for row in rows
    ]
    return Table(columns(*head, words=3), lines)
