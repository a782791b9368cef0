"""Tables, which render themselves as HTML, Markdown and CSV, and the escaping of all three.

Names, captions and reasons come from outside. They are plain text in every table and block of a
report, and nothing shows them but the page's templates (which escape), `plain` (Markdown)
and `harmless` (CSV).
"""

import csv
import io
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Environment(
    loader=PackageLoader("eval.report", ""),
    undefined=StrictUndefined,
    autoescape=True,
    keep_trailing_newline=True,
)


#: Pixels for a table on a page 1300 wide, and of a character of its figures and of small print.
PAGE, FIGURE, SMALL = 1080, 8.9, 7.6
#: Characters after which words, and a gap's reason, may be broken (report.css).
WORDS, GAP = 24, 14


class Block:
    """A part of a report; ``blocks.html.j2`` has a macro under the name of each kind."""

    def html(self) -> Markup:
        return getattr(TEMPLATES.get_template("blocks.html.j2").module, type(self).__name__)(self)

    def markdown(self) -> str:
        return ""  # of what Markdown can't show


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

    @property
    def sign(self) -> str:
        """``up``, ``down`` or ``same``."""
        if not float(self.difference):
            return "same"
        return {"+": "up", "-": "down"}[self.difference[0]]


def columns(*labels: str, words: int = 1) -> list[Column]:
    """Columns of these labels, the first ones of words."""
    return [Column(label, words=place < words) for place, label in enumerate(labels)]


def mean(values: Sequence[float], digits: int, mark: str = "") -> Cell:
    """``46.7``, and ``± 0.2`` (their sample standard deviation) of several values."""
    spread = f"± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return Cell(f"{statistics.fmean(values):.{digits}f}{mark}", spread)


@dataclass(frozen=True)
class Table(Block):
    """Columns, and rows of cells; a cell may be given as mere text."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell | str]]
    style: str = ""

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The labels above the columns' own, and how many columns each is of."""
        groups = [(name, len(list(own))) for name, own in groupby(c.group for c in self.columns)]
        return groups if any(name for name, _ in groups) else []

    def parts(self, width: int = PAGE) -> list["Table"]:
        """Itself where a page is wide enough for it; else tables of some of its groups each.

        The first has the columns without a group; the others have their first.
        """
        parts = [[i for i, column in enumerate(self.columns) if not column.group]]
        grouped = [i for i, column in enumerate(self.columns) if column.group]
        for _, group in groupby(grouped, key=lambda i: self.columns[i].group):
            own = list(group)
            if sum(map(self._width, parts[-1] + own)) > width:
                parts.append([0])
            parts[-1] += own
        tables = ([[row[i] for i in part] for row in (self.columns, *self.rows)] for part in parts)
        return [Table(head, rows, self.style) for head, *rows in tables]

    def _width(self, column: int) -> float:
        """About how many pixels wide a page draws a column: words and gaps are broken."""
        head, cells = self.columns[column], [row[column] for row in self.cells()]
        most = WORDS if head.words else None
        texts = (len(cell.text[: GAP if cell.style == "gap" else most]) for cell in cells)
        widths = (FIGURE * text + SMALL * len(cell.small) for text, cell in zip(texts, cells))
        return 20 + max(SMALL * len(head.label), *widths)

    def cells(self) -> list[list[Cell]]:
        return [[c if isinstance(c, Cell) else Cell(c) for c in row] for row in self.rows]

    def merged(self) -> Iterable[list[tuple[Cell, str, int]]]:
        """Rows of (cell, its classes, its width): neighbouring gaps of one reason are one cell."""
        for row in self.cells():
            pairs = list(zip(row, self.columns, strict=True))
            alike = groupby(pairs, key=lambda p: p[0].text if p[0].style == "gap" else id(p))
            runs = [list(run) for _, run in alike]
            yield [
                (cell, f"{cell.style} {'words' if column.words else ''}".strip(), len(run))
                for run in runs
                for cell, column in run[:1]
            ]

    def markdown(self) -> str:
        lines = [[plain(str(column)) for column in self.columns]]
        lines.append(["---" if column.words else "---:" for column in self.columns])
        for row in self.cells():
            beside = (f" ({cell.difference})" if cell.difference else "" for cell in row)
            lines.append([plain(str(cell)) + text for cell, text in zip(row, beside)])
        return markdown(lines)

    def csv(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([harmless(str(column)) for column in self.columns])
        writer.writerows([[harmless(str(cell)) for cell in row] for row in self.cells()])
        return out.getvalue()


def markdown(lines: Iterable[Sequence[str]]) -> str:
    """Lines of cells, which are Markdown already, as a GitHub table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
