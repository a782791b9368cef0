"""Tables of figures over seeds."""

from collections.abc import Iterable
from statistics import fmean, stdev


def spread(values: Iterable[float]) -> str:
    """``1.23 ± 0.45``: mean ± sample standard deviation."""
    values = list(values)
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def table(heads: list[str], rows: Iterable[list[str]], texts: int = 1) -> str:
    """A GitHub table whose first `texts` columns are texts, the others figures."""
    rule = [*["---"] * texts, *["---:"] * (len(heads) - texts)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, rule, *rows))
