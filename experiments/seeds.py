"""Tables of figures over seeds."""

from collections.abc import Iterable
from statistics import fmean, stdev

from eval.report.table import markdown


def spread(values: Iterable[float]) -> str:
    """``1.23 ± 0.45``: mean ± sample standard deviation."""
    values = list(values)
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def table(heads: list[str], rows: Iterable[list[str]]) -> str:
    """A GitHub table whose first column is texts, the others figures."""
    return markdown([heads, ["---", *["---:"] * (len(heads) - 1)], *rows])
