"""The paper's tables, as printed, with our figures in the places they belong to.

``paper_tables.json`` holds the printed figures and says of every cell which setting it is of; a run
finds its row by its own configuration (`eval.report.runs.Setting`), never by its name. A table
appears when one of our results belongs to it. Rows and figures that we lack are named.
"""

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from itertools import zip_longest
from typing import Any

from eval.report.blocks import Heading, Notes
from eval.report.rows import MARK, Figure, Row
from eval.report.runs import Setting
from eval.report.table import Block, Cell, Column, Table, columns, mean


@dataclass(frozen=True)
class Ours:
    """Our figures for a cell, of some runs, in percent, beside the printed one.

    The difference of two rows is that of their means, and has no row. ``notes`` are what sets ours
    apart from the printed one besides the method.
    """

    values: Sequence[float]
    runs: int
    printed: float | None
    notes: tuple[str, ...] = ()
    row: Row | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def difference(self) -> float | None:
        return None if self.printed is None else self.mean - self.printed

    @property
    def cell(self) -> Cell:
        """``47.00† ± 0.20``, with the difference to the printed figure."""
        cell = mean(self.values, 2, MARK if self.notes else "")
        apart = "" if self.difference is None else f"{self.difference:+.2f}"
        return replace(cell, difference=apart, style="ours")


@dataclass
class Line:
    """One line of a table: a printed row, or ours beneath it; text where there is no figure."""

    label: str
    model: str
    cells: list[float | Ours | str | None]

    @property
    def ours(self) -> list[Ours]:
        return [cell for cell in self.cells if isinstance(cell, Ours)]

    @property
    def who(self) -> str:
        """``printed``, or ``ours, n = 3: cifd``; the least and the most runs where cells differ."""
        if not self.ours:
            return "printed"
        counts = sorted({cell.runs for cell in self.ours})
        names = {cell.row.name for cell in self.ours if cell.row}
        named = f": {names.pop()}" if len(names) == 1 else ""
        return f"ours, n = {'–'.join(map(str, counts[:: len(counts) - 1 or 1]))}{named}"


@dataclass
class PaperTable:
    """One of the paper's tables with our lines in it, and ``runs``: whose figures ours are."""

    number: str
    title: str
    columns: list[str]
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)


@cache
def printed() -> dict[str, Any]:
    """The paper's tables and where they are from."""
    return json.loads((files("eval.report") / "paper_tables.json").read_text())


def place(rows: list[Row]) -> list[PaperTable]:
    """The tables that some of these rows belong to."""
    tables = [_filled(table, rows) for table in printed()["tables"]]
    return [table for table in tables if any(line.ours for line in table.lines)]


def unplaced(rows: Iterable[Row], tables: list[PaperTable]) -> list[str]:
    """Rows of ours that are in none of the tables."""
    placed = {run for table in tables for run in table.runs}
    return [row.name for row in rows if row.setting and _description(row) not in placed]


def _filled(table: dict[str, Any], rows: list[Row]) -> PaperTable:
    """A table with our lines, and notes on what we lack."""
    filled = PaperTable(table["number"], table["title"], [c["label"] for c in table["columns"]])
    ours: list[list[Line]] = []
    lacking = []
    for row in table["rows"]:
        row = {"model": "", **row}
        if "delta" in row:
            ours.append(_differences(row, *(ours[i] for i in row["delta"])))
        else:
            ours.append(_our_lines(table, row, rows))
            if not ours[-1] and _settings(table, row):
                lacking.append(f"{row['label']} {row['model']}".strip())
        filled.lines += [Line(row["label"], row["model"], row["printed"]), *ours[-1]]
    cells = [cell for line in filled.lines for cell in line.ours]
    apart = dict.fromkeys(note for cell in cells for note in cell.notes)
    filled.notes = [*table["notes"], *(f"{MARK} {note}." for note in apart)]
    if lacking:
        filled.notes.append("No result of ours: " + "; ".join(dict.fromkeys(lacking)) + ".")
    filled.runs = list(dict.fromkeys(_description(cell.row) for cell in cells if cell.row))
    return filled


def _settings(table: dict[str, Any], row: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Column number → the setting a printed cell is of, where it is one of a method we have."""
    return {
        i: _resolved({**table["is"], **column["is"], **row["is"]})
        for i, column in enumerate(table["columns"])
        if "is" in column and "is" in row
    }


def _resolved(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell ``of`` the teacher or the student of its column is of a model that trained alone."""
    if "of" not in cell:
        return cell
    alone = {k: v for k, v in cell.items() if k not in ("of", "teachers")}
    of = cell["teachers"][0] if cell["of"] == "teacher" else cell["student"]
    return {**alone, "method": "none", "student": of}


def _our_lines(table: dict[str, Any], row: dict[str, Any], rows: list[Row]) -> list[Line]:
    """Our lines under a printed row, one for each setting of ours that is this row's."""
    settings = _settings(table, row)
    of_cells = ([r for r in rows if _matches(r.setting, one)] for one in settings.values())
    lines = []
    for of_line in zip_longest(*of_cells):
        line = Line(row["label"], row["model"], [None] * len(table["columns"]))
        for (i, setting), ours in zip(settings.items(), of_line):
            if ours:
                figure = setting["dataset"], setting["metric"]
                line.cells[i] = _figure(ours, figure, row["printed"][i])
        lines.append(line)
    return [line for line in lines if line.ours]


def _figure(row: Row, figure: Figure, beside: float | None) -> Ours | str:
    values = row.values.get(figure)
    if not values:
        return row.gap(figure[0]).text or "gap: not evaluated"
    subset = row.setting.subset
    few = [f"Trained on {subset:,} of the training images"] if subset else []
    notes = *few, *row.notes(figure[0])
    return Ours(values, len(values), beside, notes, row)


def _differences(row: dict[str, Any], of: list[Line], to: list[Line]) -> list[Line]:
    """Our difference of two rows, where both have lines of ours."""
    lines = []
    for a, b in zip(of, to):
        cells = [
            Ours([x.mean - y.mean], min(x.runs, y.runs), beside, (*x.notes, *y.notes))
            if isinstance(x, Ours) and isinstance(y, Ours)
            else None
            for x, y, beside in zip(a.cells, b.cells, row["printed"])
        ]
        lines.append(Line(row["label"], row["model"], cells))
    return [line for line in lines if line.ours]


def _matches(setting: Setting | None, cell: dict[str, Any]) -> bool:
    """Whether a setting is what a cell is of.

    A cell is silent about what may be anything; about RDMs and IBM it is where there are none.
    """
    if setting is None or setting.dataset not in (None, cell["dataset"]):
        return False
    silent = {} if setting.method == "cifd" else {"rdms": 0, "ibm": False}
    cell = {**silent, **cell}
    for name in cell.keys() & {"method", "student", "rdms", "ibm"}:
        options = cell[name] if isinstance(cell[name], list) else [cell[name]]
        if _spelling(getattr(setting, name)) not in map(_spelling, options):
            return False
    teachers = cell.get("teachers", setting.teachers)
    same = map(_same_teacher, setting.teachers, teachers)
    return len(teachers) == len(setting.teachers) and all(same)


def _same_teacher(ours: str, printed: str) -> bool:
    """The architecture, and the weights where both sides name them."""
    (a, _, our_weights), (b, _, weights) = ours.partition(":"), printed.partition(":")
    return _spelling(a) == _spelling(b) and (not our_weights or weights in ("", our_weights))


def _spelling(name: Any) -> Any:
    """Spelling apart: ``WRN-40-2`` is ``wrn_40_2``; OpenCLIP names an activation in some names."""
    if not isinstance(name, str):
        return name
    return name.lower().replace("-quickgelu", "").replace("-", "").replace("_", "")


def _description(row: Row) -> str:
    setting, seeds = row.setting, row.seeds
    parts = [f"{row.name}, {setting}"]
    if setting.teachers:
        parts.append(f"teacher {', '.join(setting.teachers)}")
    if seeds:
        parts.append(f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")
    if setting.subset:
        parts.append(f"{setting.subset:,} of the training images")
    return "; ".join(filter(None, [*parts, row.trained]))


def blocks(table: PaperTable) -> list[Block]:
    """A heading, the table, its notes, and whose figures ours are."""
    split = [re.fullmatch(r"(.+) (top-\d|R@\d+)", label) for label in table.columns]
    pairs = zip(split, table.columns)
    heads = [Column(match[2], match[1]) if match else Column(label) for match, label in pairs]
    return [
        Heading(f"Table {table.number}. {table.title}", 3),
        Table([Column("method", words=True), *heads], list(map(_cells, table.lines)), "paper"),
        *([Notes(table.notes)] if table.notes else []),
        Notes(table.runs, "Our runs"),
    ]


def _cells(line: Line) -> list[Cell]:
    """A line's cells; one that is not printed is a dash, one that we have no setting of empty."""
    style, empty = ("ours", "") if line.ours else ("printed", "—")
    model = f"· {line.model}" if line.model else ""
    cells = [Cell(line.who, style=style) if line.ours else Cell(line.label, model, style=style)]
    for cell in line.cells:
        if isinstance(cell, Ours):
            cells.append(cell.cell)
        elif isinstance(cell, str):
            cells.append(Cell(cell, style="gap"))
        else:
            cells.append(Cell(empty if cell is None else f"{cell:.2f}", style=style))
    return cells


def records(tables: list[PaperTable]) -> Table:
    """Every cell with a figure of ours or of the paper, one a line, for CSV."""
    head = "table method model column printed ours sd n difference notes".split()
    lines = []
    for table in tables:
        for line in table.lines:
            for column, cell in zip(table.columns, line.cells):
                where = [table.number, line.label, line.model, column]
                if isinstance(cell, Ours):
                    paper = "" if cell.printed is None else str(cell.printed)
                    ours = mean(cell.values, 4)
                    apart = "" if cell.difference is None else f"{cell.difference:.4f}"
                    notes = "; ".join(dict.fromkeys(cell.notes))
                    spread = ours.small.removeprefix("± ")
                    lines.append([*where, paper, ours.text, spread, str(cell.runs), apart, notes])
                elif isinstance(cell, str):
                    lines.append([*where, "", cell, "", "", "", ""])
                elif not line.ours and cell is not None:
                    lines.append([*where, str(cell), "", "", "", "", ""])
    return Table(columns(*head, words=4), lines)
