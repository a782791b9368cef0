"""A report as one list of blocks, rendered as an HTML page and as Markdown.

A heading opens a section, which ends at the next one. Markdown leaves out what it can't show
(plots, images), and headings with nothing below them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from eval.report.table import TEMPLATES, Block, Table, plain
from eval.result import Query


@dataclass(frozen=True)
class Heading(Block):
    """The title of a section (level 2; perhaps folded), or of a part of it (level 3)."""

    text: str
    level: int = 2
    folded: bool = False

    def markdown(self) -> str:
        return f"{'#' * self.level} {plain(self.text)}\n"


@dataclass(frozen=True)
class Paragraph(Block):
    """Some sentences."""

    text: str

    def markdown(self) -> str:
        return f"{plain(self.text)}\n"


@dataclass(frozen=True)
class Notes(Block):
    """A list in small print; folded under a title on a page, where it has one."""

    items: Sequence[str]
    title: str = ""

    def markdown(self) -> str:
        title = f"{plain(self.title)}:\n\n" if self.title else ""
        return title + "".join(f"- {plain(item)}\n" for item in self.items)


@dataclass(frozen=True)
class Plot(Block):
    """A drawing (SVG), perhaps with its table beside it."""

    svg: Markup
    table: Table | None = None

    def markdown(self) -> str:
        return self.table.markdown() if self.table else ""


Answer = tuple[str, str | None, Query]  # model, its colour, and what it retrieves


@dataclass(frozen=True)
class Retrieval(Block):
    """Captions, each with the answers of several models."""

    cards: Sequence[Sequence[Answer]]


def page(title: str, blocks: Iterable[Block]) -> str:
    """A whole page, which needs no other file and runs no script."""
    sections: list[tuple[Heading, list[Block]]] = []
    for block in blocks:
        if isinstance(block, Heading) and block.level == 2:
            sections.append((block, []))
        else:
            sections[-1][1].append(block)
    return TEMPLATES.get_template("page.html.j2").render(title=title, sections=sections)


def markdown(blocks: Iterable[Block]) -> str:
    """The same as GitHub Markdown."""
    parts: list[str] = []
    headings: list[Heading] = []
    for block in blocks:
        if isinstance(block, Heading):
            headings = [*(h for h in headings if h.level < block.level), block]
        elif text := block.markdown():
            parts += [*(heading.markdown() for heading in headings), text]
            headings = []
    return "\n".join(parts)
