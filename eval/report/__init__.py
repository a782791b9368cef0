"""Runs and results as one HTML page that needs no other file, with Markdown and CSV beside it.

  python -m eval.report logs/teacher logs/bank logs/none logs/cifd -o report.html
  python -m eval.report results/cifar100 -o cifar100.html

A run directory brings its curves and its results (RUN/results), a study of training.tune its table
and figure; any other folder the results in it and in its runs/. The paper's tables that some result
belongs to stand beside ours; runs that differ by their seed alone are one row. Written: OUT.html,
OUT.md, OUT.csv (a line for each run) and, where the paper's tables appear, OUT.paper.csv. The same
files give the same bytes.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from training.engine.flags import CommandLine
from training.errors import UsageError


def parse(argv: Sequence[str]) -> Namespace:
    """The command line."""
    usage = "python -m eval.report RUN [...] [-o OUT.html] [--title TEXT]"
    parser = CommandLine("eval.report", __doc__, usage)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="runs, studies, folders of results")
    add("-o", "--out", type=Path, default=Path("report.html"), metavar="FILE", help="the page")
    add("--title", default="Controlled information flow", metavar="TEXT", help="of the page")
    add(
        "--no-examples",
        action="store_true",
        help="leave out retrieval's examples, which show test images: look up whether their "
        "licence lets a page of them be passed on",
    )
    args = parser.parse_args(argv)
    if args.out.suffix != ".html":
        raise UsageError(f"--out '{args.out}': expected a name that ends in .html")
    return args


def main(argv: list[str]) -> None:
    """Entry point of ``python -m eval.report``."""
    args = parse(argv)

    from cifd_clip.files import write_text
    from eval.report import blocks, page, paper
    from eval.report.rows import records, rows_of
    from eval.report.runs import read_sources

    sources = read_sources(args.runs)
    if args.no_examples:
        sources = [replace(source, examples=[]) for source in sources]
    rows = rows_of(sources)
    placed = paper.place(rows)
    report = page.blocks(sources, rows, placed)
    texts = {
        ".html": blocks.page(args.title, report),
        ".md": blocks.markdown(report),
        ".csv": records(rows_of(sources, pooled=False)).csv(),
        **({".paper.csv": paper.records(placed).csv()} if placed else {}),
    }
    for suffix, text in texts.items():
        write_text(args.out.with_suffix(suffix), text)
    numbers = ", ".join(table.number for table in placed)
    tables = f"; the paper's tables {numbers}" if placed else ""
    print(f"{args.out}: {len(sources)} runs and folders{tables}")
