"""Runs and results → one self-contained HTML page, with Markdown and CSV beside it.

Every figure comes from the files that are read (`runs`), and the same files give the same bytes.
The report is one list of blocks (`page`, `paper`, `banks`), rendered twice (`blocks`, `table`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.engine.flags import Parser, construct
from training.errors import UsageError

DESCRIPTION = """\
Runs and results as one HTML page that needs no other file, with Markdown and CSV beside it.

  python -m eval.report logs/teacher logs/bank logs/none logs/cifd -o report.html
  python -m eval.report results/cifar100 -o cifar100.html

A run directory brings its curves and its results (RUN/results); any other folder the results in it
and in its runs/. The paper's tables that some result belongs to stand beside ours; runs that
differ by their seed alone are one row. Written: OUT.html, OUT.md, OUT.csv (a line for each run)
and, where the paper's tables appear, OUT.paper.csv."""


@dataclass(frozen=True)
class Config:
    """The command line."""

    runs: tuple[str, ...] = ()
    out: str = "report.html"
    title: str = "Controlled information flow"


def parse(argv: Sequence[str]) -> Config:
    """What a command line says.

    Raises:
        UsageError: a flag is wrong.
    """
    usage = "eval.report RUN [...] [-o OUT.html] [--title TEXT]"
    parser = Parser("eval.report", DESCRIPTION, usage)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run directories, and folders of results")
    add("-o", "--out", metavar="OUT.html", help=f"the page [{Config.out}]")
    add("--title", metavar="TEXT", help=f"of the page [{Config.title}]")
    config = construct(Config, parser.given(argv))
    if not config.out.endswith(".html"):
        raise UsageError(f"--out '{config.out}': expected a name that ends in .html")
    return config


def main(argv: list[str]) -> None:
    """Entry point of ``python -m eval.report``."""
    config = parse(argv)

    from cifd_clip.files import write_text
    from eval.report import blocks, page, paper
    from eval.report.rows import records, rows
    from eval.report.runs import read_sources

    sources = read_sources(map(Path, config.runs))
    report = page.blocks(sources)
    placed = paper.place(rows(sources))
    texts = {
        ".html": blocks.page(config.title, report),
        ".md": blocks.markdown(report),
        ".csv": records(rows(sources, pooled=False)).csv(),
        **({".paper.csv": paper.records(placed).csv()} if placed else {}),
    }
    for suffix, text in texts.items():
        write_text(Path(config.out).with_suffix(suffix), text)
    numbers = ", ".join(table.number for table in placed)
    tables = f"; the paper's tables {numbers}" if placed else ""
    print(f"{config.out}: {len(sources)} runs and folders{tables}")
