"""Figures over seeds: mean and spread, and differences between settings that share their seeds."""

from statistics import fmean, stdev
from typing import Any

Summary = dict[str, Any]


def summarise(values: list[float]) -> Summary:
    """Mean and sample standard deviation."""
    spread = stdev(values) if len(values) > 1 else None
    return {"mean": fmean(values), "sd": spread, "n": len(values)}


def paired(mine: dict[int, float], other: dict[int, float]) -> Summary:
    """Difference of two settings over the seeds both have, and its standard error."""
    differences = [mine[seed] - other[seed] for seed in sorted(mine.keys() & other.keys())]
    n = len(differences)
    if not n:
        return {"mean": None, "se": None, "n": 0}
    error = stdev(differences) / n**0.5 if n > 1 else None
    return {"mean": fmean(differences), "se": error, "n": n}


def told(summary: Summary) -> str:
    """``1.23 ± 0.45``: mean ± standard deviation, or a difference ± its standard error."""
    if summary["mean"] is None:
        return ""
    sign, spread = ("+", summary["se"]) if "se" in summary else ("", summary["sd"])
    return f"{summary['mean']:{sign}.2f}" + ("" if spread is None else f" ± {spread:.2f}")
