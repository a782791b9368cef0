"""The map's tables and figure, from the tables of its studies alone."""

from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from cifd_clip.files import read_json, write_text, writing
from experiments.seeds import table as markdown
from experiments.study import write_result
from training.intervals import Difference, paired
from training.tuning import table as tuning

Scores = dict[str, dict[tuple[str, str], float]]  # of each row, by (subset, seed)


class Cell(NamedTuple):
    """A cell that is whole.

    Attributes:
        against: the row that the others are compared with.
        scores: on test data, of every row.
        trials: held-out scores of every row that was tuned.
        kept: scores of the teacher, of its RDMs and of the mean of all, in their students' place.
    """

    against: str
    scores: Scores
    trials: dict[str, list[float]]
    kept: dict[str, float]

    def differences(self) -> dict[str, Difference]:
        """Of each row to the one that all are compared with, over subsets and seeds."""
        base = self.scores[self.against]
        return {row: paired(own, base) for row, own in self.scores.items() if row != self.against}


def write_map(logs: Path, results: Path, cells: list[str], subsets: tuple[str, ...]) -> str:
    """Keep the studies' records; write ``table.md`` and ``map.png`` of the cells that are whole.

    Returns:
        The tables as Markdown.
    """
    whole = {}
    for cell in cells:
        records = {}
        for subset in subsets:
            path = logs / f"{cell}-{subset}" / "table.json"
            kept = results / "runs" / f"{cell}-{subset}.json"
            if path.is_file() and not kept.is_file():
                write_result(kept, read_json(path, tuning.FORMAT))
            if kept.is_file():
                records[subset] = read_json(kept)
        if len(records) == len(subsets):
            data = f"{cell.rpartition('-')[2]}{subsets[0]}"
            whole[cell] = read_cell(
                records, keep_bank(logs / f"kept-{data}", results / "bank", data)
            )
    if not whole:
        return "no cell of the map is whole yet"
    text = to_markdown(whole)
    write_text(results / "table.md", text)
    draw(whole, results / "map.png")
    return text


def keep_bank(measured: Path, kept: Path, data: str) -> dict[str, float]:
    """Keep what eval.bank measured, a file for each data set; the scores of who was a teacher."""
    for path in sorted(measured.glob("bank/*.json")):
        one = read_json(path)
        if not (target := kept / f"{data}-{one['dataset']}.json").is_file():
            write_result(target, one | {"map": None})  # of points, which no table has
    scores: dict[str, list[float]] = {}
    for path in sorted(kept.glob(f"{data}-*.json")):
        one = read_json(path)
        rates = {f"R = {rdm['rate']:g}": rdm["metrics"] for rdm in one["assistants"]}
        for who, metrics in {"teacher": one["teacher"], **rates, "mean": one["mean"]}.items():
            scores.setdefault(who, []).append(100 * tuning.figure_of(metrics))
    return {who: fmean(parts) for who, parts in scores.items()}


def read_cell(records: dict[str, dict[str, Any]], kept: dict[str, float]) -> Cell:
    """A cell from the record of each of its subsets."""
    cell = Cell(next(iter(records.values()))["against"], {}, {}, kept)
    for subset, record in records.items():
        for row in record["rows"]:
            pairs = {(subset, seed): score for seed, score in row["scores"].items()}
            cell.scores.setdefault(row["row"], {}).update(pairs)
            if row["trials"]:
                cell.trials[row["row"]] = [trial["score"] for trial in row["trials"]]
    return cell


def to_markdown(cells: dict[str, Cell]) -> str:
    """Tables with a column for each cell: differences, held-out trials, what RDMs keep."""
    (against,) = {cell.against for cell in cells.values()}

    def table(figures: Callable[[Cell], dict[str, str]]) -> str:
        columns = [figures(cell) for cell in cells.values()]
        rows = dict.fromkeys(row for column in columns for row in column)
        return markdown(["", *cells], [[row, *(c.get(row, "") for c in columns)] for row in rows])

    def differences(cell: Cell) -> dict[str, str]:
        base = {against: f"{fmean(cell.scores[against].values()):.2f}"}
        return base | {row: str(found) for row, found in cell.differences().items()}

    def subsets(cell: Cell) -> dict[str, str]:
        parts: dict[str, list[str]] = {}
        for row, own in cell.scores.items():
            for subset in sorted({subset for subset, _ in own} if row != against else ()):
                pairs = {key: score for key, score in own.items() if key[0] == subset}
                found = paired(pairs, cell.scores[against])
                parts.setdefault(row, []).append(f"{found.mean:+.2f}")
        return {row: ", ".join(means) for row, means in parts.items()}

    def trials(cell: Cell) -> dict[str, str]:
        return {row: f"{median(own):.1f} ({max(own):.1f})" for row, own in cell.trials.items()}

    def teachers(cell: Cell) -> dict[str, str]:
        return {who: f"{score:.1f}" for who, score in cell.kept.items()}

    return (
        "# What each term brings\n\nScore: the mean of zero-shot top-1 (CIFAR-100) and mean "
        f"recall (Flickr8k), percent, on test data. First line: {against} under its best weights; "
        "others: the paired difference over subsets and seeds ± half of its 95 % t-interval. "
        "Cells: student and labelled images.\n\n"
        + table(differences)
        + "\nThe intervals take all pairs of subset and seed for independent; two subsets say "
        "little of a third. The mean difference on each:\n\n"
        + table(subsets)
        + "\nAll this is of the weights that were chosen, not of the choice. What that was made "
        "from: held-out recall of each row's trials, the median and in brackets the best.\n\n"
        + table(trials)
        + "\nThe score of who teaches, on the same test data: the teacher, each of its RDMs and "
        "the mean of them all, the one point that squared errors to all of them amount to "
        "(docs/paper.md).\n\n" + table(teachers)
    )


def draw(cells: dict[str, Cell], path: Path) -> None:
    """The differences with their intervals, a panel for each cell."""
    from matplotlib.figure import Figure

    by_cell = {name: cell.differences() for name, cell in cells.items()}
    (against,) = {cell.against for cell in cells.values()}
    rows = list(dict.fromkeys(row for own in by_cell.values() for row in own))[::-1]
    figure = Figure(figsize=(2.2 + 2.4 * len(cells), 1 + 0.3 * len(rows)), layout="constrained")
    panels: Any = figure.subplots(1, len(cells), sharey=True, squeeze=False)[0]
    for axes, (name, own) in zip(panels, by_cell.items()):
        for row, difference in own.items():
            style = {"fmt": "o", "color": "#1f5fa8", "capsize": 3, "markersize": 4}
            axes.errorbar(difference.mean, rows.index(row), xerr=difference.half or 0.0, **style)
        axes.axvline(0, color="0.6", linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.set_yticks(range(len(rows)), rows)
    figure.supxlabel(f"difference to tuned {against}, points (95 % interval)", fontsize=9)
    with writing(path) as file:
        figure.savefig(file, format="png", dpi=150)
