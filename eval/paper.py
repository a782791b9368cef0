"""The paper's tables, as printed, with our figures in the places they belong to.

``paper_tables.json`` holds the printed figures and says of every cell which setting it is of; a run
finds its row by its own configuration (`eval.sources.Setting`), never by its name. A table appears
when one of our results belongs to it. Rows and figures that we lack are named.
"""

import csv
import io
import json
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from html import escape
from importlib.resources import files
from itertools import groupby

from eval.tables import MARK, Row, difference, markdown


@dataclass(frozen=True)
class Ours:
    """Our figure for a cell, in percent."""

    mean: float
    deviation: float | None
    runs: int
    printed: float | None
    notes: tuple[str, ...] = ()
    """What sets it apart from the printed figure besides the method."""

    @property
    def difference(self) -> float | None:
        """Ours minus the printed figure, in points."""
        return None if self.printed is None else self.mean - self.printed

    def __str__(self) -> str:
        return f"{self.marked}{self.spread}"

    @property
    def marked(self) -> str:
        """The mean, with a mark where the table has a note about it."""
        return f"{self.mean:.2f}{MARK if self.notes else ''}"

    @property
    def spread(self) -> str:
        """`` ± 0.20``, of two runs and more."""
        return "" if self.deviation is None else f" ± {self.deviation:.2f}"


@dataclass
class Line:
    """One line of a table: a printed row, or ours beneath it; text where there is no figure."""

    label: str
    model: str
    who: str
    cells: list[float | Ours | str | None]


@dataclass
class Table:
    """One of the paper's tables with our lines in it."""

    number: str
    title: str
    columns: list[str]
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    """Whose figures ours are."""


@cache
def printed() -> dict:
    """The paper's tables and where they are from."""
    return json.loads((files("eval") / "paper_tables.json").read_text())


def place(rows: list[Row]) -> list[Table]:
    """The tables that some of these rows belong to."""
    tables = [_filled(table, rows) for table in printed()["tables"]]
    return [table for table in tables if any(_is_ours(line) for line in table.lines)]


def _is_ours(line: Line) -> bool:
    return any(isinstance(cell, Ours) for cell in line.cells)


def _filled(table: dict, rows: list[Row]) -> Table:
    made = Table(table["number"], table["title"], [c["label"] for c in table["columns"]])
    ours: list[list[Line]] = []
    used: dict[int, Row] = {}
    for row in table["rows"]:
        made.lines.append(Line(row["label"], row.get("model", ""), "printed", row["printed"]))
        if "delta" in row:
            lines = _deltas(row, *(ours[i] for i in row["delta"]))
        else:
            lines, found = _our_lines(table, row, rows)
            used |= {id(one): one for one in found}
        ours.append(lines)
        made.lines += lines
    lacking = [
        " ".join(filter(None, (row["label"], row.get("model"))))
        for row, lines in zip(table["rows"], ours)
        if not lines and "delta" not in row and _cells(table, row)
    ]
    cells = (cell for line in made.lines for cell in line.cells if isinstance(cell, Ours))
    apart = dict.fromkeys(note for cell in cells for note in cell.notes)
    made.notes = [*table["notes"], *(f"{MARK} {note}." for note in apart)]
    if lacking:
        made.notes.append("No result of ours: " + "; ".join(dict.fromkeys(lacking)) + ".")
    made.runs = [_told(row) for row in used.values()]
    return made


def _cells(table: dict, row: dict) -> dict[int, dict]:
    """Column number -> the setting a printed cell is of, where it is one of a method we have."""
    if "is" not in row:
        return {}
    wanted = {}
    for i, column in enumerate(table["columns"]):
        if "is" in column:
            wanted[i] = _resolved({**table["is"], **column["is"], **row["is"]})
    return wanted


def _resolved(cell: dict) -> dict:
    """A cell ``of`` the teacher or the student of its column is of a model that trained alone."""
    if "of" not in cell:
        return cell
    alone = {k: v for k, v in cell.items() if k not in ("of", "teachers")}
    of = cell["teachers"][0] if cell["of"] == "teacher" else cell["student"]
    return {**alone, "method": "none", "student": of}


def _our_lines(table: dict, row: dict, rows: list[Row]) -> tuple[list[Line], list[Row]]:
    """Our lines under a printed row, one for each setting of ours that is this row's."""
    cells = _cells(table, row)
    of_cell = {i: [r for r in rows if _matches(r.setting, cell)] for i, cell in cells.items()}
    lines, used = [], []
    for place_ in range(max(map(len, of_cell.values()), default=0)):
        line: list = [None] * len(table["columns"])
        mine = []
        for i, found in of_cell.items():
            if place_ < len(found):
                column = cells[i]["dataset"], cells[i]["metric"]
                line[i] = _figure(found[place_], column, row["printed"][i])
                mine.append(found[place_])
        if not any(isinstance(cell, Ours) for cell in line):
            continue
        used += mine
        lines.append(Line(row["label"], row.get("model", ""), _who(line, mine), line))
    return lines, used


def _figure(row: Row, column: tuple[str, str], beside: float | None) -> Ours | str:
    values = row.values.get(column)
    if not values:
        return f"gap: {row.gaps[column[0]]}" if column[0] in row.gaps else "gap: not evaluated"
    deviation = statistics.stdev(values) if len(values) > 1 else None
    subset = row.setting.subset
    few = [f"Trained on {subset:,} of the training images"] if subset else []
    notes = *few, *row.notes(column[0])
    return Ours(statistics.fmean(values), deviation, len(values), beside, notes)


def _who(cells: list, rows: list[Row]) -> str:
    """``ours, n = 3``; the least and the most where cells differ."""
    counts = sorted({cell.runs for cell in cells if isinstance(cell, Ours)})
    names = list(dict.fromkeys(row.name for row in rows))
    named = f": {names[0]}" if len(names) == 1 else ""
    return f"ours, n = {'–'.join(map(str, counts[:: len(counts) - 1 or 1]))}{named}"


def _deltas(row: dict, of: list[Line], to: list[Line]) -> list[Line]:
    """Our difference of two rows, where both have lines of ours."""
    lines = []
    for a, b in zip(of, to):
        cells = [
            Ours(x.mean - y.mean, None, min(x.runs, y.runs), beside, (*x.notes, *y.notes))
            if isinstance(x, Ours) and isinstance(y, Ours)
            else None
            for x, y, beside in zip(a.cells, b.cells, row["printed"])
        ]
        lines.append(Line(row["label"], row["model"], _who(cells, []), cells))
    return [line for line in lines if _is_ours(line)]


def _matches(setting, cell: dict) -> bool:
    """Whether a setting is what a cell asks for; a cell is silent about what it does not name."""
    if setting is None or setting.dataset not in (None, cell["dataset"]):
        return False
    for name in ("method", "student", "rdms", "ibm"):
        wanted = cell.get(name)
        wanted = wanted if isinstance(wanted, list) else [wanted]
        if name in cell and _plain(getattr(setting, name)) not in map(_plain, wanted):
            return False
    teachers = cell.get("teachers")
    return teachers is None or (
        len(teachers) == len(setting.teachers)
        and all(_same_teacher(a, b) for a, b in zip(setting.teachers, teachers))
    )


def _same_teacher(ours: str, wanted: str) -> bool:
    """The architecture, and the weights where both sides name them."""
    (a, ours_tag), (b, wanted_tag) = (
        ours.split(":", 1) if ":" in ours else (ours, ""),
        (wanted.split(":", 1) if ":" in wanted else (wanted, "")),
    )
    return _plain(a) == _plain(b) and (not ours_tag or not wanted_tag or ours_tag == wanted_tag)


def _plain(name):
    """Spelling apart: ``WRN-40-2`` is ``wrn_40_2``; OpenCLIP names an activation in some names."""
    if not isinstance(name, str):
        return name
    return name.lower().replace("-quickgelu", "").replace("-", "").replace("_", "")


def _told(row: Row) -> str:
    """Whose figures these are."""
    setting, seeds = row.setting, row.seeds
    parts = [f"{row.name}, {setting}"]
    if setting.teachers:
        parts.append(f"teacher {', '.join(setting.teachers)}")
    if seeds:
        parts.append(f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")
    if setting.subset:
        parts.append(f"{setting.subset:,} of the training images")
    return "; ".join(filter(None, [*parts, row.trained]))


def unplaced(rows: Iterable[Row], tables: list[Table]) -> list[str]:
    """Rows of ours that are in none of the tables."""
    placed = {run for table in tables for run in table.runs}
    return [row.name for row in rows if row.setting and _told(row) not in placed]


def _text(cell: float | Ours | str | None, own_line: bool) -> str:
    if cell is None:
        return "" if own_line else "—"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Ours):
        beside = "" if cell.difference is None else f" ({cell.difference:+.2f})"
        return f"{cell}{beside}"
    return f"{cell:.2f}"


def to_markdown(table: Table) -> str:
    """A heading, a GitHub table, and the notes."""
    head = ["method", "model", "", *table.columns]
    lines = [head, ["---", "---", "---", *["---:"] * len(table.columns)]]
    for line in table.lines:
        own = line.who != "printed"
        cells = [_text(cell, own) for cell in line.cells]
        lines.append(["" if own else line.label, "" if own else line.model, line.who, *cells])
    told = [*table.notes, *(f"Ours: {run}." for run in table.runs)]
    notes = "".join(f"- {note}\n" for note in told)
    return f"## Table {table.number}. {table.title}\n\n{markdown(lines)}\n{notes}"


def to_html(table: Table) -> str:
    """The table, its notes, and whose figures ours are."""
    body = ""
    for line in table.lines:
        own = line.who != "printed"
        first = escape(line.who if own else line.label)
        if line.model and not own:
            first += f' <small class="soft">{escape(line.model)}</small>'
        kind = "ours" if own else "printed"
        body += f'<tr class="{kind}"><td>{first}</td>{_html_cells(line.cells, own)}</tr>'
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    runs = "".join(f"<li>{escape(run)}</li>" for run in table.runs)
    return (
        f"<h3>Table {table.number}. {escape(table.title)}</h3>"
        f'<div class="scroll"><table class="paper"><thead>{_html_head(table.columns)}</thead>'
        f'<tbody>{body}</tbody></table></div><ul class="notes">{notes}</ul>'
        f'<details class="runs"><summary>Our runs</summary><ul class="notes">{runs}</ul></details>'
    )


def _html_head(columns: list[str]) -> str:
    """``IN top-1``, ``IN top-5``: a group with two columns; other labels as they are."""
    split = [re.fullmatch(r"(.+) (top-\d|R@\d+)", label) for label in columns]
    leaves = "".join(f"<th>{escape(m[2] if m else c)}</th>" for m, c in zip(split, columns))
    groups = [(name, len(list(some))) for name, some in groupby(m[1] if m else "" for m in split)]
    over = "".join(f'<th class="group" colspan="{n}">{escape(name)}</th>' for name, n in groups)
    upper = f"<tr><th></th>{over}</tr>" if any(name for name, _ in groups) else ""
    return f"{upper}<tr><th></th>{leaves}</tr>"


def _html_cells(cells: list, own_line: bool) -> str:
    """Cells; neighbours that lack a figure for the same reason share one."""
    made = ""
    for cell, some in groupby(cells, key=lambda c: c if isinstance(c, str) else id(c)):
        some = list(some)
        if isinstance(cell, str):
            made += f'<td class="gap" colspan="{len(some)}">{escape(cell)}</td>'
            continue
        for one in some:
            if isinstance(one, Ours):
                beside = "" if one.difference is None else difference(one.difference, 2)
                spread = f'<small class="soft">{one.spread}</small>' if one.spread else ""
                made += f"<td>{one.marked}{spread}{beside}</td>"
            else:
                made += f"<td>{_text(one, own_line)}</td>"
    return made


def to_csv(tables: list[Table]) -> str:
    """Every cell with a figure of ours or of the paper, one a line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow("table method model column printed ours sd n difference notes".split())
    for table in tables:
        for line in table.lines:
            for column, cell in zip(table.columns, line.cells):
                where = [table.number, line.label, line.model, column]
                if isinstance(cell, Ours):
                    figures = cell.mean, cell.deviation, cell.difference
                    mean, spread, apart = ("" if v is None else f"{v:.4f}" for v in figures)
                    paper = "" if cell.printed is None else cell.printed
                    notes = "; ".join(dict.fromkeys(cell.notes))
                    writer.writerow([*where, paper, mean, spread, cell.runs, apart, notes])
                elif isinstance(cell, str):
                    writer.writerow([*where, "", cell, "", "", "", ""])
                elif line.who == "printed" and cell is not None:
                    writer.writerow([*where, cell, "", "", "", "", ""])
    return out.getvalue()
