"""Results as one table: rows are models, columns are metrics of data sets."""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape

TASKS = {
    "zeroshot_classification": {"acc1": "top-1", "acc5": "top-5"},
    "zeroshot_retrieval": {
        f"{way}_retrieval_recall@{k}": f"{sign} R@{k}"
        for way, sign in (("image", "T→I"), ("text", "I→T"))
        for k in (1, 5, 10)
    },
}
Column = tuple[str, str]  # data set (with its split where that is not "test"), metric's label


@dataclass
class Row:
    """One model: its figures in percent, and the reasons of its gaps by data set."""

    name: str
    method: str = ""
    parameters: dict[str, int] | None = None
    values: dict[Column, float] = field(default_factory=dict)
    gaps: dict[str, str] = field(default_factory=dict)


def add_result(row: Row, result: dict) -> None:
    """Add a result file's metrics to its model's row."""
    split = result.get("provenance", {}).get("split", "test")
    dataset = result["dataset"] if split == "test" else f"{result['dataset']} ({split})"
    for key, label in TASKS.get(result["task"], {}).items():
        value = result["metrics"].get(key)
        if value is not None:
            row.values[dataset, label] = 100 * value
    row.parameters = result.get("provenance", {}).get("parameters", row.parameters)


def columns(rows: list[Row]) -> list[Column]:
    """Every column that some row has, data set by data set; a gap alone has a column of its own."""
    labels = [label for task in TASKS.values() for label in task.values()]
    found = {column for row in rows for column in row.values}
    # classification before retrieval, then by name
    first = {d: min(labels.index(m) for e, m in found if e == d) for d, _ in found}
    ordered = sorted(found, key=lambda c: (first[c[0]], c[0], labels.index(c[1])))
    return ordered + [(d, "") for d in sorted({d for r in rows for d in r.gaps} - first.keys())]


def cell(row: Row, column: Column) -> str:
    """One decimal, the reason of a gap, or nothing."""
    if column in row.values:
        return f"{row.values[column]:.1f}"
    return f"gap: {row.gaps[column[0]]}" if column[0] in row.gaps else ""


def millions(count: int) -> str:
    """``0.034 M``, with three significant digits."""
    return f"{count / 1e6:.3g} M"


def to_csv(rows: list[Row]) -> str:
    """All figures, unrounded, columns in a fixed order."""
    cols = columns(rows)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    sizes = ("image", "text", "token_table")
    writer.writerow(
        [
            "model",
            "method",
            *(f"{s}_parameters" for s in sizes),
            *(" ".join(c).strip() for c in cols),
        ]
    )
    for row in rows:
        counts = [(row.parameters or {}).get(size, "") for size in sizes]
        values = [f"{row.values[c]:.4f}" if c in row.values else cell(row, c) for c in cols]
        writer.writerow([row.name, row.method, *counts, *values])
    return out.getvalue()


def to_markdown(rows: list[Row]) -> str:
    """A GitHub table in percent."""
    cols = columns(rows)
    head = ["model", "method", "image tower", "text tower", *(" ".join(c).strip() for c in cols)]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for row in rows:
        sizes = row.parameters or {}
        counts = [millions(sizes[s]) if s in sizes else "" for s in ("image", "text")]
        lines.append([row.name, row.method, *counts, *(cell(row, c) for c in cols)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_html(rows: list[Row], baseline: Row | None, swatch: Callable[[str], str]) -> str:
    """The table with differences to a baseline row under the figures of the other students.

    Args:
        swatch: a row's name -> the HTML of its colour in the plots.
    """
    cols = columns(rows)
    spans: list[list] = []
    for dataset, _ in cols:
        if not spans or spans[-1][0] != dataset:
            spans.append([dataset, 0])
        spans[-1][1] += 1
    groups = "".join(f'<th colspan="{n}" class="group">{escape(d)}</th>' for d, n in spans)
    heads = "".join(f"<th>{escape(label)}</th>" for _, label in cols)
    body = "".join(_html_row(row, cols, baseline, swatch) for row in rows)
    return (
        '<table class="results"><thead>'
        f'<tr><th colspan="2"></th><th colspan="2" class="group">parameters</th>{groups}</tr>'
        f"<tr><th>model</th><th>method</th><th>image</th><th>text</th>{heads}</tr>"
        f"</thead><tbody>{body}</tbody></table>"
    )


def _html_row(row: Row, cols: list[Column], baseline: Row | None, swatch) -> str:
    sizes = row.parameters or {}
    cells = [f'<td class="name">{swatch(row.name)}{escape(row.name)}</td>']
    cells.append(f"<td>{escape(row.method)}</td>")
    for size in ("image", "text"):
        cells.append(f"<td>{millions(sizes[size]) if size in sizes else ''}</td>")
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
        comparable = baseline and row is not baseline and row.parameters == baseline.parameters
        if comparable and column in baseline.values:
            difference = row.values[column] - baseline.values[column]
            sign = "up" if difference > 0 else "down" if difference < 0 else "same"
            extra = f'<span class="{sign}">{difference:+.1f}</span>'
        cells.append(f"<td>{cell(row, column)}{extra}</td>")
    return f"<tr>{''.join(cells)}</tr>"
