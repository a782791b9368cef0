"""Results as one table: rows are settings, columns are metrics of data sets."""

import csv
import io
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from typing import Any, NamedTuple

TASKS = {
    "classification": {"acc1": "top-1", "acc5": "top-5"},
    "zeroshot_classification": {"acc1": "top-1", "acc5": "top-5"},
    "zeroshot_retrieval": {
        f"{way}_retrieval_recall@{k}": f"{sign} R@{k}"
        for way, sign in (("image", "T→I"), ("text", "I→T"))
        for k in (1, 5, 10)
    },
}
SIZES = {"image": "image tower", "text": "text tower", "model": "parameters"}
#: What a result says of its test set, unless that differs from the published one.
WHOLE, UNPUBLISHED = "whole", "no published protocol"
MARK = "†"  # of a figure that is not of what its name promises: a note below says why
Column = tuple[str, str]  # data set (with its split where that is not "test"), metric's label


class Run(NamedTuple):
    """One of the runs of a row."""

    name: str
    seed: int | None
    weights: str


@dataclass
class Row:
    """One setting: its figures in percent over its runs, and the reasons of its gaps.

    Attributes:
        setting: what the runs are runs of (`eval.sources.Setting`), where that is known.
        precision: of the evaluation.
        runs: whose figures these are.
        values: the runs' figures, in the order of the runs that have them.
        gaps: reasons by data set.
        parts: how data sets differ from the published ones: ``5 images of 50000``.
        trained: how long and on what, in words.
    """

    name: str
    method: str = ""
    setting: Any = None
    precision: str | None = None
    parameters: dict[str, int] | None = None
    runs: list[Run] = field(default_factory=list)
    values: dict[Column, list[float]] = field(default_factory=dict)
    gaps: dict[str, str] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    trained: str = ""

    @property
    def names(self) -> list[str]:
        """Names of the runs, each once."""
        return list(dict.fromkeys(run.name for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs that have one."""
        return sorted(run.seed for run in self.runs if run.seed is not None)

    def mean(self, column: Column) -> float:
        """The mean over runs."""
        return statistics.fmean(self.values[column])

    def figure(self, column: Column, digits: int = 1) -> str:
        """``46.7``, or mean and sample standard deviation over runs: ``46.7 ± 0.2``.

        Where only some of the row's runs have the figure, it says how many.
        """
        values = self.values[column]
        text = f"{self.mean(column):.{digits}f}{MARK if column[0] in self.parts else ''}"
        if len(values) > 1:
            text += f" ± {statistics.stdev(values):.{digits}f}"
        return text if len(values) == len(self.runs) else f"{text} (n = {len(values)})"

    def notes(self, dataset: str | None = None) -> list[str]:
        """What is to be said below a table of the figures on this data set, or on all."""
        return [
            f"Not the published {name}: {told}"
            for name, told in self.parts.items()
            if dataset in (None, name)
        ]


def common_name(names: list[str]) -> str:
    """What the names of several seeds' runs share: ``cifd-seed0``, ``cifd-seed1`` → ``cifd``."""
    if len(names) < 2:
        return "".join(names)
    stems = {re.sub(r"[-_. ]*(seed|s)?[-_=]?\d+$", "", name) for name in names}
    return stems.pop() if len(stems) == 1 else names[0]


def shortfall(provenance: dict) -> str:
    """How a result's test set differs from the published one; nothing where it doesn't."""
    told = provenance.get("protocol", "")
    return "" if told in (WHOLE, UNPUBLISHED) else told


def add_result(row: Row, result: dict, run: Run | None = None) -> None:
    """Add a result file's metrics to its row, as those of a run of it."""
    provenance = result.get("provenance", {})
    run = run or Run(row.name, None, "")
    row.runs += [] if run in row.runs else [run]
    split, name = provenance.get("split", "test"), result["dataset"]
    dataset = name if split == "test" else f"{name} ({split})"
    kinds = {dataset: "metrics", f"{name} (held out)": "holdout_metrics"}
    for images, key in {**kinds, f"{name} (train)": "train_metrics"}.items():
        for metric, label in TASKS.get(result["task"], {}).items():
            if (value := (result.get(key) or {}).get(metric)) is not None:
                row.values.setdefault((images, label), []).append(100 * value)
    if told := shortfall(provenance):
        row.parts[dataset] = told
    if not result.get("metrics"):
        row.gaps[name] = "the test split was not looked at"
    sizes = provenance.get("parameters")
    row.parameters = {"model": sizes} if isinstance(sizes, int) else sizes or row.parameters


def columns(rows: list[Row]) -> list[Column]:
    """Every column that some row has, data set by data set; a gap alone has a column of its own."""
    labels = list(dict.fromkeys(label for task in TASKS.values() for label in task.values()))
    found = {column for row in rows for column in row.values}
    # classification before retrieval, then by name
    first = {d: min(labels.index(m) for e, m in found if e == d) for d, _ in found}
    ordered = sorted(found, key=lambda c: (first[c[0]], c[0], labels.index(c[1])))
    return ordered + [(d, "") for d in sorted({d for r in rows for d in r.gaps} - first.keys())]


def sizes(rows: list[Row]) -> list[str]:
    """The parameter counts that some row has."""
    return [size for size in SIZES if any(size in (row.parameters or {}) for row in rows)]


def cell(row: Row, column: Column) -> str:
    """One decimal, the reason of a gap, or nothing."""
    if column in row.values:
        return row.figure(column)
    return f"gap: {row.gaps[column[0]]}" if column[0] in row.gaps else ""


def millions(count: int) -> str:
    """``0.034 M``, with three significant digits."""
    return f"{count / 1e6:.3g} M"


def several(rows: list[Row]) -> bool:
    """Whether some row has more than one run."""
    return any(len(row.runs) > 1 for row in rows)


def to_csv(rows: list[Row]) -> str:
    """All figures, unrounded, columns in a fixed order; meant for one run a row."""
    cols = columns(rows)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    counts = ["image", "text", "token_table", *(["model"] if "model" in sizes(rows) else [])]
    head = ["model", "method", "seed", *(f"{s}_parameters" for s in counts)]
    noted = ["notes"] if notes(rows) else []
    writer.writerow([*head, *(" ".join(c).strip() for c in cols), *noted])
    for row in rows:
        seeds = " ".join(map(str, row.seeds))
        found = [(row.parameters or {}).get(size, "") for size in counts]
        values = [f"{row.mean(c):.4f}" if c in row.values else cell(row, c) for c in cols]
        told = ["; ".join(row.notes()) for _ in noted]
        writer.writerow([row.name, row.method, seeds, *found, *values, *told])
    return out.getvalue()


def to_markdown(rows: list[Row]) -> str:
    """A GitHub table in percent, and its notes."""
    cols, shown, many = columns(rows), sizes(rows), several(rows)
    head = ["model", "method", *(["n"] if many else []), *(SIZES[s] for s in shown)]
    lines = [[*head, *(" ".join(c).strip() for c in cols)]]
    lines.append(["---", "---", *["---:"] * (len(lines[0]) - 2)])
    for row in rows:
        counts = [_size(row, size) for size in shown]
        runs = [str(len(row.runs))] if many else []
        lines.append([row.name, row.method, *runs, *counts, *(cell(row, c) for c in cols)])
    return markdown(lines) + "".join(f"\n{note}\n" for note in notes(rows))


def notes(rows: list[Row]) -> list[str]:
    """What the marks of these rows' figures mean."""
    return [f"{MARK} {note}." for note in dict.fromkeys(n for row in rows for n in row.notes())]


def markdown(lines: list[list[str]]) -> str:
    """Lines of cells as a GitHub table."""
    return "".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |\n" for line in lines)


def to_html(rows: list[Row], baseline: Row | None, swatch: Callable[[Row], str]) -> str:
    """The table with differences to a baseline row under the figures of the other students.

    Args:
        swatch: a row -> the HTML of its colour in the plots.
    """
    cols, shown, many = columns(rows), sizes(rows), several(rows)
    spans: list[list] = []
    for dataset, _ in cols:
        if not spans or spans[-1][0] != dataset:
            spans.append([dataset, 0])
        spans[-1][1] += 1
    groups = "".join(f'<th colspan="{n}" class="group">{escape(d)}</th>' for d, n in spans)
    heads = "".join(f"<th>{escape(label)}</th>" for _, label in cols)
    counts = "".join(f"<th>{'' if s == 'model' else s}</th>" for s in shown)
    over = f'<th colspan="{len(shown)}" class="group">parameters</th>' if shown else ""
    body = "".join(_html_row(row, cols, shown, many, baseline, swatch) for row in rows)
    return (
        '<table class="results"><thead>'
        f'<tr><th colspan="{2 + many}"></th>{over}{groups}</tr>'
        f"<tr><th>model</th><th>method</th>{'<th>n</th>' * many}{counts}{heads}</tr>"
        f"</thead><tbody>{body}</tbody></table>"
    )


def _size(row: Row, size: str) -> str:
    counts = row.parameters or {}
    return millions(counts[size]) if size in counts else ""


def _html_row(row: Row, cols, shown, many: bool, baseline: Row | None, swatch) -> str:
    cells = [f'<td class="name">{swatch(row)}{escape(row.name)}</td>']
    cells.append(f"<td>{escape(row.method)}</td>")
    cells += [f"<td>{len(row.runs)}</td>"] * many
    cells += [f"<td>{_size(row, size)}</td>" for size in shown]
    told = set()
    for column in cols:
        if column not in row.values:
            dataset = column[0]
            if dataset not in told:
                width = sum(d == dataset and (d, m) not in row.values for d, m in cols)
                text = escape(cell(row, column))
                cells.append(f'<td class="gap" colspan="{width}">{text}</td>')
            told.add(dataset)
            continue
        extra = ""
        if (
            baseline
            and row is not baseline
            and _same_student(row, baseline)
            and column in baseline.values
        ):
            extra = difference(row.mean(column) - baseline.mean(column))
        cells.append(f"<td>{cell(row, column)}{extra}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _same_student(row: Row, other: Row) -> bool:
    students = [one.setting.student if one.setting else one.name for one in (row, other)]
    return students[0] == students[1] and row.parameters == other.parameters


def difference(points: float, digits: int = 1) -> str:
    """A signed difference as HTML, coloured by its sign."""
    sign = "up" if points > 0 else "down" if points < 0 else "same"
    return f'<span class="{sign}">{points:+.{digits}f}</span>'
