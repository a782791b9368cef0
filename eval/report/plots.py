"""Plots as SVG text that depends on nothing but the numbers."""

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import wraps

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from markupsafe import Markup
from matplotlib import ticker
from matplotlib.textpath import TextPath

from training.tuning import table as tuning

#: colours that stay apart for colour-blind readers (Okabe and Ito, 2008), and a grey
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
NEUTRAL = "#7a828c"
SOFT, INK = "#4a525c", "#1f2630"
INCH = 98  # pixels
TEXT = 9  # points, of what stands in a plot
Curve = tuple[str, str, Sequence[float], Sequence[float]]  # label, colour, x, y
Text = tuple[float, float, str, str]  # x, y, text, colour
Measured = tuple[str, Sequence[float], Sequence[float], Sequence[float] | None, float | None]


def _drawn(draw: Callable[..., plt.Figure]) -> Callable[..., Markup]:
    """A function that draws a figure, as one that gives its SVG."""

    @wraps(draw)
    def svg_of(*args, **options) -> Markup:
        buffer = io.StringIO()
        with plt.style.context("eval.report.plots"):
            figure = draw(*args, **options)
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            plt.close(figure)
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :]
        # the page's own font, and a width that follows a narrow page: text is as large in all plots
        svg = re.sub(r"font-family: [^;\"']+(?:'[^']*'[^;\"]*)*", "font-family: inherit", svg)
        svg = re.sub(r"(font: [\d. a-z]*\d+px )[^;\"]+", r"\1sans-serif", svg)
        sized = r'<svg ([^>]*?)width="[^"]+" height="[^"]+"|<svg '
        width = f"max-width: {INCH * figure.get_figwidth():.0f}px"
        return Markup(re.sub(sized, rf'<svg style="{width}" \1', svg, count=1))

    return svg_of


@_drawn
def curves(panels: Sequence[tuple[str, str, Sequence[Curve]]], xlabel: str) -> plt.Figure:
    """Panels side by side: (title, y label, curves), logarithmic where all values are positive."""
    size = (4.6 * len(panels), 3.1)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, (title, ylabel, lines) in zip(axes[0], panels):
        for label, colour, x, y in lines:
            axis.plot(x, y, color=colour, label=label, marker="o" if len(x) == 1 else "")
        axis.set(title=title, ylabel=ylabel, xlabel=xlabel)
        axis.locator_params(axis="x", nbins=6)
        if all(v > 0 for *_, y in lines for v in y):
            _log_axis(axis)
    _legend(figure, axes[0])
    return figure


@_drawn
def bars(
    groups: Sequence[str], models: Sequence[tuple[str, str, Sequence[float | None]]]
) -> plt.Figure:
    """Percentages of models (label, colour, a value for each group) as bars side by side."""
    figure, axis = plt.subplots(figsize=(11, 2.9), layout="constrained")
    axis.grid(False)
    width = 0.82 / len(models)
    for place, (label, colour, values) in enumerate(models):
        offset = (place - (len(models) - 1) / 2) * width
        shown = [(i + offset, v) for i, v in enumerate(values) if v is not None]
        x, heights = zip(*shown) if shown else ((), ())
        bars = axis.bar(x, heights, 0.9 * width, color=colour, label=label)
        axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=TEXT, color=SOFT)
    axis.set_xticks(range(len(groups)), groups)
    largest = max((v for *_, values in models for v in values if v is not None), default=0)
    axis.set(ylim=(0, 1.1 * largest or 1), ylabel="percent")
    axis.tick_params(axis="x", length=0, labelcolor=INK)
    axis.legend(ncols=len(models), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return figure


@_drawn
def rate_distortion(modalities: dict[str, list[tuple[float, float, float]]]) -> plt.Figure:
    """Rate-distortion curves: modality → (R, bits, distortion), each point labelled with its R."""
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    texts: list[Text] = []
    for (modality, points), colour, marker in zip(modalities.items(), PALETTE, "os"):
        rates, bits, distortion = zip(*sorted(points))
        axis.plot(bits, distortion, color=colour, marker=marker, label=f"{modality} RDMs")
        texts += [(x, y, f"R = {r:g}", colour) for r, x, y in zip(rates, bits, distortion)]
    axis.set(xlabel="rate (bits per embedding)", ylabel="distortion  E‖X − X̂‖²")
    if all(p[2] > 0 for points in modalities.values() for p in points):
        _log_axis(axis)
    axis.margins(x=0.14, y=0.14)
    _legend(figure, [axis])
    _label(axis, texts)
    return figure


@_drawn
def against_rate(lines: Sequence[Measured]) -> plt.Figure:
    """Percentages against R: (label, rates, values, deviations, the teacher's value)."""
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    texts: list[Text] = []
    for (label, rates, values, spread, teacher), colour in zip(lines, PALETTE):
        axis.errorbar(rates, values, yerr=spread, color=colour, marker="o", capsize=3, label=label)
        texts += [(rate, value, f"{value:.1f}", colour) for rate, value in zip(rates, values)]
        if teacher is not None:
            style = {"color": colour, "linestyle": (0, (4, 3)), "linewidth": 1.2}
            axis.axhline(teacher, label=f"teacher, {label}: {teacher:.1f}", **style)
    axis.set_xscale("log")
    rates = sorted({rate for line in lines for rate in line[1]})
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.set(xlabel="R", ylabel="percent")
    axis.margins(x=0.08, y=0.16)
    _legend(figure, [axis])
    _label(axis, texts)
    return figure


@_drawn
def maps(
    panels: Sequence[tuple[str, Sequence[Sequence[float]]]],
    labels: Sequence[int],
    classes: Sequence[str],
) -> plt.Figure:
    """Scatter plots side by side of (title, points (N, 2)); classes by colour and marker."""
    kinds = [(PALETTE[i % 5], "o^"[i // 5 % 2]) for i in range(len(classes))]
    size = (2.9 * len(panels), 3.5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, (title, points) in zip(axes[0], panels):
        for number, (colour, marker) in enumerate(kinds):
            mine = [p for p, label in zip(points, labels) if label == number]
            x, y = zip(*mine) if mine else ((), ())
            style = {"color": colour, "marker": marker, "alpha": 0.8, "linewidths": 0}
            axis.scatter(x, y, s=13, label=classes[number], **style)
        axis.set(title=title, xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[["left", "bottom"]].set_visible(False)
    _legend(figure, axes[0], markerscale=1.6)
    return figure


#: The differences of a study of `training.tune`.
study = _drawn(tuning.figure)


def _legend(figure: plt.Figure, axes: Iterable[plt.Axes], **style) -> None:
    """What some axes show, each name once, in as many columns as the figure is wide enough for."""
    pairs = (pair for axis in axes for pair in zip(*axis.get_legend_handles_labels()))
    handles = {name: handle for handle, name in pairs}
    longest = max(TextPath((0, 0), name, TEXT).get_extents().width for name in handles) / 72
    lines = math.ceil(len(handles) / max(1, figure.get_figwidth() // (longest + 0.7)))  # inches
    columns = math.ceil(len(handles) / lines)
    style |= {"loc": "outside lower center", "ncols": columns, "fontsize": TEXT}
    figure.legend(handles.values(), handles.keys(), **style)


def _label(axis: plt.Axes, texts: Sequence[Text]) -> None:
    """Texts beside their points, clear of the lines of an axis that is otherwise complete."""
    axis.figure.draw_without_rendering()  # gives the axis its place
    points = 72 / axis.figure.dpi
    lines = [points * line.get_transform().transform(line.get_xydata()) for line in axis.lines]
    at = points * axis.transData.transform([text[:2] for text in texts])
    for (x, y, text, colour), offset in zip(texts, beside(at, [len(t[2]) for t in texts], lines)):
        style = {"ha": "center", "va": "center", "color": colour, "size": TEXT}
        axis.annotate(text, (x, y), offset, textcoords="offset points", **style)


def beside(points: np.ndarray, lengths: Sequence[int], lines: Sequence[np.ndarray]) -> np.ndarray:
    """Where texts stand that are clear of lines and of each other: of eight places the clearest.

    Args:
        points: (N, 2) of the texts, in typographic points, as all lengths here.
        lengths: of the texts, in characters.
        lines: (M, 2) corners of each.

    Returns:
        (N, 2), from each point to the middle of its text.
    """
    along = np.linspace(0, 1, 50)[:, None, None]
    drawn = [(line[:-1] + along * np.diff(line, axis=0)).reshape(-1, 2) for line in lines]
    taken, offsets = np.concatenate([points, *drawn]), []
    for point, length in zip(points, lengths):
        half = 0.3 * TEXT * length
        box = np.stack(np.meshgrid(np.linspace(-half, half, 9), (-4, 0, 4)), -1).reshape(-1, 2)
        across = 0.75 * half + 8
        places = np.array([(x, y) for y in (12, 0, -12) for x in (-across, 0, across) if x or y])
        gaps = np.linalg.norm((point + places[:, None] + box)[:, :, None] - taken, axis=-1)
        offsets.append(places[gaps.min(axis=(1, 2)).argmax()])
        taken = np.concatenate([taken, point + offsets[-1] + box])
    return np.array(offsets)


def _log_axis(axis) -> None:
    """A logarithmic y axis with plain numbers."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())
