"""Tables that render themselves as HTML, Markdown and CSV, and the escaping of all three.

Names, captions and reasons come from outside. They are plain text in every table and block of a
report, and nothing shows them but `tag` (HTML), `plain` (Markdown) and `harmless` (CSV).
"""

import csv
import io
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby


class Html(str):
    """Markup; any other text is escaped by `tag`."""


def tag(name: str, *children: str, **attributes: str | int | None) -> Html:
    """``<name attributes>children</name>``; attributes of None are left out, ``kind`` is class."""
    given = "".join(
        f' {"class" if key == "kind" else key}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value not in (None, "")
    )
    inner = "".join(child if isinstance(child, Html) else escape(child) for child in children)
    return Html(f"<{name}{given}>" if name == "img" else f"<{name}{given}>{inner}</{name}>")


def plain(text: str) -> str:
    r"""Text as Markdown that shows it: no link, image, HTML, emphasis, code or end of a cell."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*\[\]<>|~]|(?<!\w)_|_(?!\w)|&(?=#?\w+;))", r"\\\1", line)


def harmless(text: str) -> str:
    """Text as a spreadsheet shows it: only a number may begin as a formula does."""
    number = re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", text)
    return f"'{text}" if re.match(r"\s*[=+\-@]", text) and not number else text


@dataclass(frozen=True)
class Column:
    """A column's label, perhaps under one shared with its neighbours; of words, or figures."""

    label: str
    group: str = ""
    words: bool = False

    def __str__(self) -> str:
        return f"{self.group} {self.label}".strip()


@dataclass(frozen=True)
class Cell:
    """What stands in a cell.

    Attributes:
        text: the figure or the words.
        small: in small print behind it: a deviation, a model.
        difference: a signed figure beside it, coloured by its sign.
        style: ``name``, ``gap`` (no figure, and why), or a class of the style sheet.
        colour: of a square before it, by which plots know the row.
    """

    text: str
    small: str = ""
    difference: str = ""
    style: str = ""
    colour: str | None = None

    def __str__(self) -> str:
        return f"{self.text} {self.small}".strip()


def columns(*labels: str, words: int = 1) -> list[Column]:
    """Columns of these labels, the first ones of words."""
    return [Column(label, words=place < words) for place, label in enumerate(labels)]


def mean(values: Sequence[float], digits: int, mark: str = "") -> Cell:
    """``46.7``, and ``± 0.2`` (their sample standard deviation) of several values."""
    spread = f"± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return Cell(f"{statistics.fmean(values):.{digits}f}{mark}", spread)


@dataclass(frozen=True)
class Table:
    """Columns, and rows of cells; a cell may be given as mere text."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell | str]]
    style: str = ""

    def html(self) -> Html:
        """A table whose neighbouring gaps of one reason share a cell."""
        labels = (tag("th", c.label, kind="words" if c.words else None) for c in self.columns)
        heads = [tag("tr", *labels)]
        if any(column.group for column in self.columns):
            groups = groupby(column.group for column in self.columns)
            upper = (
                tag("th", name, kind="group", colspan=len(list(some))) for name, some in groups
            )
            heads.insert(0, tag("tr", *upper))
        body = (tag("tr", *self._html_cells(row)) for row in self._cells())
        table = tag("table", tag("thead", *heads), tag("tbody", *body), kind=self.style)
        return tag("div", table, kind="scroll")

    def _cells(self) -> list[list[Cell]]:
        return [[c if isinstance(c, Cell) else Cell(c) for c in row] for row in self.rows]

    def _html_cells(self, row: list[Cell]) -> Iterable[Html]:
        pairs = list(zip(row, self.columns, strict=True))
        for _, group in groupby(pairs, key=lambda p: p[0].text if p[0].style == "gap" else id(p)):
            (cell, column), *more = group
            kind = f"{cell.style} {'words' if column.words else ''}".strip()
            yield tag("td", *_html_parts(cell), kind=kind, colspan=1 + len(more) if more else None)

    def markdown(self) -> str:
        """A GitHub table."""
        lines = [[plain(str(column)) for column in self.columns]]
        lines.append(["---" if column.words else "---:" for column in self.columns])
        for row in self._cells():
            beside = (f" ({cell.difference})" if cell.difference else "" for cell in row)
            lines.append([plain(str(cell)) + text for cell, text in zip(row, beside)])
        return markdown(lines)

    def csv(self) -> str:
        """Comma-separated values."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([harmless(str(column)) for column in self.columns])
        writer.writerows([[harmless(str(cell)) for cell in row] for row in self._cells()])
        return out.getvalue()


def _html_parts(cell: Cell) -> Iterable[str]:
    yield swatch(cell.colour)
    yield cell.text
    if cell.small:
        yield tag("small", f" {cell.small}")
    if cell.difference:
        sign = {"+": "up", "-": "down"}[cell.difference[0]]
        kind = sign if float(cell.difference) else "same"
        yield tag("span", cell.difference, kind=kind)


def swatch(colour: str | None) -> Html:
    """A square of a run's colour."""
    return tag("i", kind="swatch", style=f"background:{colour}") if colour else Html()


def markdown(lines: Iterable[Sequence[str]]) -> str:
    """Lines of cells, which are Markdown already, as a GitHub table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
