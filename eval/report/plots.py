"""Plots as SVG text that depends on nothing but the numbers."""

import io
import re
from collections.abc import Callable, Sequence
from functools import wraps

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from markupsafe import Markup
from matplotlib import ticker

from training.tuning import table as tuning

#: colours that stay apart for colour-blind readers (Okabe and Ito, 2008), and a grey
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
NEUTRAL = "#7a828c"
SOFT, INK = "#4a525c", "#1f2630"
Curve = tuple[str, str, Sequence[float], Sequence[float]]  # label, colour, x, y
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
        # the page's own font, and a width that follows the page
        svg = re.sub(r"font-family: [^;\"']+(?:'[^']*'[^;\"]*)*", "font-family: inherit", svg)
        svg = re.sub(r"(font: [\d. a-z]*\d+px )[^;\"]+", r"\1sans-serif", svg)
        sized = r'<svg ([^>]*?)width="[^"]+" height="[^"]+"|<svg '
        return Markup(re.sub(sized, r"<svg \1", svg, count=1))

    return svg_of


@_drawn
def curves(panels: Sequence[tuple[str, str, Sequence[Curve]]], xlabel: str) -> plt.Figure:
    """Panels side by side: (title, y label, curves), logarithmic where all values are positive."""
    size = (4.6 * max(2, len(panels)), 3.1)  # the page makes all plots as wide as itself
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, (title, ylabel, lines) in zip(axes[0], panels):
        for label, colour, x, y in lines:
            axis.plot(x, y, color=colour, label=label, marker="o" if len(x) == 1 else "")
        axis.set(title=title, ylabel=ylabel, xlabel=xlabel)
        if all(v > 0 for *_, y in lines for v in y):
            _log_axis(axis)
        axis.legend(fontsize=9)
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
        axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=9, color=SOFT)
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
    # labels of one modality to the upper right of its points, of the other to the lower left
    sides = (((7, 5), "left"), ((-7, -13), "right"))
    styles = zip(modalities.items(), PALETTE, "os", sides)
    for (modality, points), colour, marker, (offset, align) in styles:
        rates, bits, distortion = zip(*sorted(points))
        axis.plot(bits, distortion, color=colour, marker=marker, label=f"{modality} RDMs")
        for rate, x, y in zip(rates, bits, distortion):
            _annotate(axis, f"R = {rate:g}", (x, y), offset, align, colour)
    axis.set(xlabel="rate (bits per embedding)", ylabel="distortion  E‖X − X̂‖²")
    if all(p[2] > 0 for points in modalities.values() for p in points):
        _log_axis(axis)
    axis.margins(x=0.14, y=0.12)
    axis.legend()
    return figure


@_drawn
def against_rate(lines: Sequence[Measured]) -> plt.Figure:
    """Percentages against R: (label, rates, values, deviations, the teacher's value)."""
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for (label, rates, values, spread, teacher), colour in zip(lines, PALETTE):
        axis.errorbar(rates, values, yerr=spread, color=colour, marker="o", capsize=3, label=label)
        for rate, value in zip(rates, values):
            _annotate(axis, f"{value:.1f}", (rate, value), (0, 7), "center", colour)
        if teacher is not None:
            style = {"color": colour, "linestyle": (0, (4, 3)), "linewidth": 1.2}
            axis.axhline(teacher, label=f"teacher, {label}: {teacher:.1f}", **style)
    axis.set_xscale("log")
    rates = sorted({rate for line in lines for rate in line[1]})
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.set(xlabel="R", ylabel="percent")
    axis.margins(x=0.08, y=0.16)
    figure.legend(fontsize=9, ncols=2, loc="outside lower center")
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
            axis.scatter(x, y, s=13, color=colour, marker=marker, alpha=0.8, linewidths=0)
        axis.set(title=title, xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[["left", "bottom"]].set_visible(False)
    handles = [
        plt.Line2D([], [], color=colour, marker=marker, linestyle="", label=name)
        for (colour, marker), name in zip(kinds, classes)
    ]
    longest = max(map(len, classes))
    columns = max(1, min(len(classes), int(size[0] / (0.5 + 0.08 * longest))))  # inches
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)
    return figure


#: The differences of a study of `training.tune`.
study = _drawn(tuning.figure)


def _annotate(axis, text: str, point, offset: tuple[int, int], align: str, colour: str) -> None:
    style = {"horizontalalignment": align, "color": colour, "size": 9}
    axis.annotate(text, point, offset, textcoords="offset points", **style)


def _log_axis(axis) -> None:
    """A logarithmic y axis with plain numbers."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())
