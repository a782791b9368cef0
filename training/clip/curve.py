"""What a bank's RDMs keep of their teacher by rate, and the rate at which they keep so much."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from sklearn.isotonic import isotonic_regression
from torch import Tensor

from cifd_clip import RDMBank
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
def teacher_accuracy(images: Tensor | None, texts: Tensor | None, among: int) -> float | None:
    """The teacher's top-1 on held-out pairs (N, T): what `measure` is of its RDMs."""
    if images is None or texts is None:
        return None
    groups = _groups(images, texts, among)
    return sum(top1_hits(image, text, same) for image, text, same in groups) / len(images)


@torch.no_grad()
def measure(bank: RDMBank, images: Tensor | None, texts: Tensor | None, among: int) -> list[Point]:
    """What each rate's RDMs keep, on held-out pairs (N, T).

    Args:
        bank: in evaluation mode: rounding in place of noise, as in stage 2.
        images, texts: unit teacher embeddings, as far as the teacher has them.
        among: captions that each image chooses from.
    """
    hits = torch.zeros(len(bank.rates), dtype=torch.float64)
    report: dict[str, Tensor] = {}
    there = {"image": images, "text": texts}
    count, pairs = len(there[bank.modalities[0]]), bank.modalities == MODALITIES
    if pairs:
        for image, text, same in _groups(images, texts, among):
            spaces = zip(bank.image.reconstruct(image), bank.text.reconstruct(text))
            for k, (x, y) in enumerate(spaces):
                hits[k] += top1_hits(x, y, same)
    for start in range(0, count, among):
        few = {m: None if x is None else x[start : start + among] for m, x in there.items()}
        for name, value in bank(*few.values(), None)[1].items():
            size = len(few[bank.modalities[0]])
            report[name] = report.get(name, 0) + value.double().cpu() * size
    accuracy = (hits / count).tolist()
    means = {name: (value / count).tolist() for name, value in report.items()}
    return [
        Point(
            rate,
            accuracy[k] if pairs else None,
            {m: means[f"{m}/bits"][k] for m in bank.modalities},
            {m: means[f"{m}/distortion"][k] for m in bank.modalities},
        )
        for k, rate in enumerate(bank.rates)
    ]


def _groups(images: Tensor, texts: Tensor, among: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pairs that are asked together, and which of their captions are the same to the teacher."""
    for image, text in zip(images.split(among), texts.split(among)):
        yield image, text, torch.cdist(text, text, compute_mode=EXACT) < 1e-3


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
