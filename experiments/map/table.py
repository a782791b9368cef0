"""The map's table and figure, from the tables of its studies alone."""

from pathlib import Path
from statistics import fmean
from typing import Any

from cifd_clip.files import read_json, write_text, writing
from experiments.seeds import table as markdown
from experiments.study import write_result
from training.intervals import Difference, paired
from training.tuning import table as tuning

Scores = dict[str, dict[tuple[str, str], float]]  # of each row, by (subset, seed)


def write_map(logs: Path, results: Path, cells: list[str], subsets: tuple[str, ...]) -> str:
    """Keep the studies' records; write ``table.md`` and ``map.png`` of the cells that are there.

    Returns:
        The table as Markdown.
    """
    scores: dict[str, Scores] = {}
    for cell in cells:
        for subset in subsets:
            path = logs / f"{cell}-{subset}" / "table.json"
            kept = results / "runs" / f"{cell}-{subset}.json"
            if path.is_file() and not kept.is_file():
                write_result(kept, read_json(path, tuning.FORMAT))
            if kept.is_file():
                record = read_json(kept)
                against = record["against"]
                for row in record["rows"]:
                    own = scores.setdefault(cell, {}).setdefault(row["row"], {})
                    own |= {(subset, seed): value for seed, value in row["scores"].items()}
    if not scores:
        return "no study of the map has ended yet"
    text = to_markdown(scores, against)
    write_text(results / "table.md", text)
    draw(scores, against, results / "map.png")
    return text


def differences(cell: Scores, against: str) -> dict[str, Difference]:
    """Of each row to the row that all are compared with, over subsets and seeds."""
    base = cell[against]
    return {row: paired(scores, base) for row, scores in cell.items() if row != against}


def to_markdown(scores: dict[str, Scores], against: str) -> str:
    """A column for each cell: the baseline's score, the others' differences to it."""
    rows = list(dict.fromkeys(row for cell in scores.values() for row in cell))
    by_cell = {name: differences(cell, against) for name, cell in scores.items()}
    lines = [[against, *(f"{fmean(cell[against].values()):.2f}" for cell in scores.values())]]
    lines += [
        [row, *(str(d[row]) if row in d else "" for d in by_cell.values())]
        for row in rows
        if row != against
    ]
    return (
        "# What each term brings\n\nScore: the mean of zero-shot top-1 (CIFAR-100) and mean "
        f"recall (Flickr8k), percent, on test data. First line: {against} under its best weights; "
        "others: the paired difference over subsets and seeds ± half of its 95 % t-interval. "
        "Cells: student and labelled images.\n\n" + markdown(["", *scores], lines)
    )


def draw(scores: dict[str, Scores], against: str, path: Path) -> None:
    """The differences with their intervals, a panel for each cell."""
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys(r for cell in scores.values() for r in cell if r != against))[::-1]
    figure = Figure(figsize=(2.2 + 2.4 * len(scores), 1 + 0.3 * len(rows)), layout="constrained")
    panels: Any = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    for axes, (name, cell) in zip(panels, scores.items()):
        for row, difference in differences(cell, against).items():
            style = {"fmt": "o", "color": "#1f5fa8", "capsize": 3, "markersize": 4}
            axes.errorbar(difference.mean, rows.index(row), xerr=difference.half or 0.0, **style)
        axes.axvline(0, color="0.6", linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.set_yticks(range(len(rows)), rows)
    figure.supxlabel(f"difference to tuned {against}, points of the score (95 % interval)")
    with writing(path) as file:
        figure.savefig(file, format="png", dpi=150)
