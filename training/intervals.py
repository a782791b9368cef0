"""How sure a difference is: 95 % intervals of Student's t over runs that share their seeds."""

from collections.abc import Mapping
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.stats import t


class Difference(NamedTuple):
    """A mean of paired differences."""

    mean: float
    half: float | None
    """Half of the 95 % interval; None for a single pair."""
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" + ("" if self.half is None else f" ± {self.half:.2f}")


def paired(mine: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """The difference of two settings over the seeds that both have; None if they share none."""
    differences = [mine[seed] - other[seed] for seed in sorted(mine.keys() & other.keys())]
    n = len(differences)
    if not n:
        return None
    half = float(t.ppf(0.975, n - 1)) * stdev(differences) / n**0.5 if n > 1 else None
    return Difference(fmean(differences), half, n)
