"""Figures over seeds: mean and spread, and differences between settings that share their seeds."""

from collections.abc import Iterable, Mapping
from statistics import fmean, stdev
from typing import Any

Summary = dict[str, Any]


def summarise(values: Iterable[float]) -> Summary:
    """Mean and sample standard deviation."""
    values = list(values)
    spread = stdev(values) if len(values) > 1 else None
    return {"mean": fmean(values), "sd": spread, "n": len(values)}


def paired(mine: Mapping[int, float], other: Mapping[int, float]) -> Summary:
    """Difference of two settings over the seeds both have, and its standard error."""
    differences = [mine[seed] - other[seed] for seed in sorted(mine.keys() & other.keys())]
    n = len(differences)
    if not n:
        return {"mean": None, "se": None, "n": 0}
    error = stdev(differences) / n**0.5 if n > 1 else None
    return {"mean": fmean(differences), "se": error, "n": n}


def shown(summary: Summary) -> str:
    """``1.23 ± 0.45``: mean ± standard deviation, or a difference ± its standard error."""
    if summary["mean"] is None:
        return ""
    sign, spread = ("+", summary["se"]) if "se" in summary else ("", summary["sd"])
    return f"{summary['mean']:{sign}.2f}" + ("" if spread is None else f" ± {spread:.2f}")


def table(heads: list[str], rows: Iterable[list[str]], texts: int = 1) -> str:
    """A GitHub table whose first `texts` columns are texts, the others figures."""
    rule = [*["---"] * texts, *["---:"] * (len(heads) - texts)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, rule, *rows))
