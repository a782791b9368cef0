"""What a bank's RDMs keep of their teacher by rate, and the rate at which they keep so much."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from sklearn.isotonic import isotonic_regression
from torch import Tensor

from cifd_clip import Features, RDMBank
from cifd_clip.artefact import MODALITIES
from training.errors import UsageError

EXACT = "donot_use_mm_for_euclid_dist"


class Point(NamedTuple):
    """What the RDMs of one rate keep."""

    rate: float
    accuracy: float | None
    """Top-1 of held-out captions among N, both embeddings reconstructed; None without captions, or
    images."""
    bits: dict[str, float]
    distortion: dict[str, float]


@torch.no_grad()
def teacher_accuracy(pairs: Features, among: int) -> float | None:
    """The teacher's top-1 on held-out pairs (N, T): what `measure` is of its RDMs."""
    if pairs.modalities != MODALITIES:
        return None
    groups = _groups(pairs, among)
    return sum(top1_hits(g.image, g.text, _same(g.text)) for g in groups) / len(pairs.image)


@torch.no_grad()
def measure(bank: RDMBank, pairs: Features, among: int) -> list[Point]:
    """What each rate's RDMs keep, on held-out pairs (N, T).

    Args:
        bank: in evaluation mode: rounding in place of noise, as in stage 2.
        pairs: unit teacher embeddings.
        among: captions that each image chooses from.
    """
    hits = torch.zeros(len(bank.rates), dtype=torch.float64)
    report: dict[str, Tensor] = {}
    for few in _groups(pairs, among):
        if both := few.modalities == MODALITIES:
            spaces = zip(bank.image.reconstruct(few.image), bank.text.reconstruct(few.text))
            same = _same(few.text)
            for k, (x, y) in enumerate(spaces):
                hits[k] += top1_hits(x, y, same)
        size = len(getattr(few, few.modalities[0]))
        for name, value in bank(few.image, few.text, None)[1].items():
            report[name] = report.get(name, 0) + value.double().cpu() * size
    count = len(getattr(pairs, pairs.modalities[0]))
    accuracy = (hits / count).tolist()
    means = {name: (value / count).tolist() for name, value in report.items()}
    return [
        Point(
            rate,
            accuracy[k] if both else None,
            {m: means[f"{m}/bits"][k] for m in bank.modalities},
            {m: means[f"{m}/distortion"][k] for m in bank.modalities},
        )
        for k, rate in enumerate(bank.rates)
    ]


def _groups(pairs: Features, among: int) -> Iterator[Features]:
    """Pairs that are asked together."""
    for start in range(0, len(getattr(pairs, pairs.modalities[0])), among):
        yield pairs.map(lambda x: x[start : start + among])  # noqa: B023


def _same(texts: Tensor) -> Tensor:
    """(N, N) which captions (N, T) are the same to the teacher."""
    return torch.cdist(texts, texts, compute_mode=EXACT) < 1e-3


def top1_hits(images: Tensor, texts: Tensor, same: Tensor) -> int:
    """How many images (N, T) have their own caption (N, T) nearest.

    Args:
        same: (N, N) captions that are equal in the teacher's space count as one's own. A tie with
            another caption is a miss, so that what maps everything to one point knows nothing.
    """
    scores = images.double() @ texts.double().T
    own = scores.masked_fill(~same, -torch.inf).amax(dim=1)
    other = scores.masked_fill(same, -torch.inf).amax(dim=1)
    return int((own > other + 1e-9).sum())


def rates_for(
    wanted: list[float], sweep: list[float], measured: list[float], flag: str = "--shares"
) -> list[float]:
    """The rate of each wanted value: read off the monotone curve, three significant digits.

    Args:
        wanted: shares of the teacher's accuracy, or bits.
        sweep: ascending rates.
        measured: what they keep, noise included.
        flag: that wants it.

    Raises:
        UsageError: a value is outside of what the sweep reaches.
    """
    fitted, x = isotonic_regression(measured), np.log(sweep)
    rates = []
    for value in wanted:
        if value > fitted[-1]:
            raise UsageError(
                f"{flag} {value:g} can't be reached: the largest rate, R = {sweep[-1]:g}, keeps "
                f"{fitted[-1]:.3f}; extend --sweep upwards, raise --steps, or ask for less"
            )
        if value < fitted[0]:
            raise UsageError(
                f"{flag} {value:g} can't be reached: the smallest rate, R = {sweep[0]:g}, still "
                f"keeps {fitted[0]:.3f}; extend --sweep downwards, or ask for more"
            )
        i = max(1, int(np.searchsorted(fitted, value)))
        step = fitted[i] - fitted[i - 1]
        part = (value - fitted[i - 1]) / step if step else 0.0
        rates.append(float(f"{math.exp(x[i - 1] + part * (x[i] - x[i - 1])):.3g}"))
    return rates
