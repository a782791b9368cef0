"""Runs and results -> one self-contained HTML page, with Markdown and CSV beside it.

::

    python -m eval.report logs/teacher logs/bank logs/none logs/cifd -o report.html
    python -m eval.report results/cifar100 -o cifar100.html

A run directory brings its curves (``metrics.jsonl``) and its results (``RUN/results``); any other
folder brings the results in it and in its ``runs/``. The paper's tables that some result belongs to
stand beside ours; runs that differ by their seed alone are one row. Every figure comes from those
files, and the same files give the same bytes. Written: OUT.html, OUT.md, OUT.csv (a line for each
run) and, where the paper's tables appear, OUT.paper.csv.
"""

import argparse
import html
from pathlib import Path

from eval import bank_section, paper, sections, tables
from eval.sources import Source, read_source, rows
from training.errors import UsageError, cli

CSS = (Path(__file__).parent / "report.css").read_text()


def page(sources: list[Source], title: str) -> str:
    """The whole page."""
    colour = sections.colours(sources)
    body = [
        sections.paper_section(sources),
        sections.results_section(sources, colour),
        bank_section.to_html(sources),
        sections.training_section(sources, colour),
        sections.examples_section(sources, colour),
        sections.provenance_section(sources),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{CSS}</style></head><body><main>"
        f"<h1>{html.escape(title)}</h1>{sections.cost(sources, colour)}{''.join(body)}"
        "</main></body></html>\n"
    )


def markdown(sources: list[Source]) -> str:
    """Our results, what the banks did, and the paper's tables."""
    found = rows(sources)
    parts = [tables.to_markdown(found)] if found else []
    parts += bank_section.to_markdown(sources)
    parts += map(paper.to_markdown, paper.place(found))
    return "\n".join(parts)


def main(argv: list[str]) -> None:
    """Entry point of ``python -m eval.report``."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, folders of results")
    parser.add_argument("-o", "--out", type=Path, default=Path("report.html"))
    parser.add_argument("--title", default="Controlled information flow")
    args = parser.parse_args(argv)
    if args.out.suffix != ".html":
        raise UsageError(f"--out '{args.out}': expected a name that ends in .html")
    sources = [source for path in args.runs for source in read_source(path)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    placed = paper.place(rows(sources))
    written = {
        ".html": page(sources, args.title),
        ".md": markdown(sources),
        ".csv": tables.to_csv(rows(sources, pooled=False)),
        **({".paper.csv": paper.to_csv(placed)} if placed else {}),
    }
    for suffix, text in written.items():
        args.out.with_suffix(suffix).write_text(text, encoding="utf-8")
    numbers = ", ".join(table.number for table in placed)
    told = f"; the paper's tables {numbers}" if placed else ""
    print(f"{args.out}: {len(sources)} runs and folders{told}")


if __name__ == "__main__":
    cli(main)
