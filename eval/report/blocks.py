"""A report as one list of blocks, rendered as an HTML page and as Markdown.

A heading opens a section, which ends at the next one. Markdown leaves out what it can't show
(plots, images), and headings with nothing below them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files

from eval.report.table import Html, Table, plain, swatch, tag
from eval.result import Query


@dataclass(frozen=True)
class Heading:
    """The title of a section (level 2; perhaps folded), or of a part of it (level 3)."""

    text: str
    level: int = 2
    folded: bool = False

    def html(self) -> Html:
        """Of a folded section the line that is left of it."""
        return tag("summary" if self.folded else f"h{self.level}", self.text)

    def markdown(self) -> str:
        """A heading."""
        return f"{'#' * self.level} {plain(self.text)}\n"


@dataclass(frozen=True)
class Paragraph:
    """Some sentences."""

    text: str

    def html(self) -> Html:
        """A paragraph."""
        return tag("p", self.text)

    def markdown(self) -> str:
        """A paragraph."""
        return f"{plain(self.text)}\n"


@dataclass(frozen=True)
class Notes:
    """A list in small print; folded under a title on a page, where it has one."""

    items: Sequence[str]
    title: str = ""

    def html(self) -> Html:
        """A list."""
        items = tag("ul", *(tag("li", item) for item in self.items), kind="notes")
        if not self.title:
            return items
        return tag("details", tag("summary", self.title), items, kind="runs")

    def markdown(self) -> str:
        """A list."""
        title = f"{plain(self.title)}:\n\n" if self.title else ""
        return title + "".join(f"- {plain(item)}\n" for item in self.items)


@dataclass(frozen=True)
class Plot:
    """A drawing (SVG), perhaps with its table beside it."""

    svg: Html
    table: Table | None = None

    def html(self) -> Html:
        """The drawing, and the table to its right."""
        plot = tag("div", self.svg, kind="plot")
        return tag("div", plot, self.table.html(), kind="side") if self.table else plot

    def markdown(self) -> str:
        """The table."""
        return self.table.markdown() if self.table else ""


Answer = tuple[str, str | None, Query]  # model, its colour, and what it retrieves


@dataclass(frozen=True)
class Retrieval:
    """Captions, each with the answers of several models."""

    cards: Sequence[Sequence[Answer]]

    def html(self) -> Html:
        """A card for each caption: its image, and a line of images for each model."""
        return tag("div", *map(_card, self.cards), kind="cards")

    def markdown(self) -> str:
        """Nothing: it is images."""
        return ""


def _card(answers: Sequence[Answer]) -> Html:
    query = answers[0][2]
    lines = (
        tag(
            "div",
            tag("span", swatch(colour), model, kind="who"),
            *(
                _image(found.image, f"rank {rank}", "hit" if found.hit else None)
                for rank, found in enumerate(answer.retrieved, 1)
            ),
            kind="answer",
        )
        for model, colour, answer in answers
    )
    caption = tag("div", _image(query.image, "the image"), tag("q", query.caption), kind="query")
    return tag("div", caption, *lines, kind="card")


def _image(png: str, alt: str, kind: str | None = None) -> Html:
    return tag("img", kind=kind, src=f"data:image/png;base64,{png}", alt=alt)


Block = Heading | Paragraph | Notes | Plot | Retrieval | Table


def page(title: str, blocks: Sequence[Block]) -> str:
    """A whole page, which needs no other file and runs no script."""
    head = tag(
        "head",
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Html((files("eval.report") / "report.css").read_text())),
    )
    sections = (
        tag("details" if heading.folded else "section", *(b.html() for b in (heading, *body)))
        for heading, body in _sections(blocks)
    )
    body = tag("body", tag("main", tag("h1", title), *sections))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def markdown(blocks: Sequence[Block]) -> str:
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


def _sections(blocks: Iterable[Block]) -> list[tuple[Heading, list[Block]]]:
    sections: list[tuple[Heading, list[Block]]] = []
    for block in blocks:
        if isinstance(block, Heading) and block.level == 2:
            sections.append((block, []))
        else:
            sections[-1][1].append(block)
    return sections
