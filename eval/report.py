"""Runs and results -> one self-contained HTML page, with Markdown and CSV beside it.

::

    python -m eval.report logs/teacher logs/bank logs/none logs/cifd -o report.html
    python -m eval.report logs/cifd results -o report.html

A run directory brings its curves (``metrics.jsonl``) and its results (``RUN/results``); any other
folder brings the results in it. Every figure comes from those files, and the same files give the
same bytes.
"""

import argparse
import html
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from eval import plots, tables
from eval.tables import Row
from training.errors import UsageError, cli

CSS = (Path(__file__).parent / "report.css").read_text()


@dataclass
class Source:
    """What one path brings: a run's configuration and metrics, and results."""

    path: Path
    config: dict | None = None
    finished: dict = field(default_factory=dict)
    metrics: list[dict] = field(default_factory=list)
    results: list[dict] = field(default_factory=list)
    gaps: list[dict] = field(default_factory=list)
    examples: list[dict] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's name, by which results call the run."""
        return self.path.resolve().name

    @property
    def method(self) -> str:
        """How the run trained."""
        return (self.config or {}).get("distill") or "none"


def read_source(path: Path) -> Source:
    """Read a run directory or a folder of results."""
    if not path.is_dir():
        raise UsageError(f"'{path}': no such folder; expected a run directory or a results folder")
    source = Source(path)
    results = path
    if (path / "config.json").is_file():
        source.config = json.loads((path / "config.json").read_text())
        results = path / "results"
    if (path / "metrics.jsonl").is_file():
        lines = (path / "metrics.jsonl").read_text().splitlines()
        source.metrics = [json.loads(line) for line in lines]
    if (path / "finished.json").is_file():
        source.finished = json.loads((path / "finished.json").read_text())
    source.results = _read_all(results)
    source.gaps = _read_all(results / "gaps")
    source.examples = _read_all(results / "examples")
    if not (source.metrics or source.results or source.gaps):
        raise UsageError(
            f"'{path}': holds neither metrics.jsonl nor results; evaluate the run first"
        )
    return source


def _read_all(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def rows(sources: list[Source]) -> list[Row]:
    """One row for each set of weights and precision, in the order of the sources."""
    found: dict[tuple, Row] = {}
    for source in sources:
        for result in source.results:
            provenance = result.get("provenance", {})
            who = result["model"], provenance.get("weights"), provenance.get("precision")
            row = found.setdefault(who, Row(result["model"]))
            if source.config:
                row.method = source.method
            tables.add_result(row, result)
    for gap in (gap for source in sources for gap in source.gaps):
        of_model = [row for row in found.values() if row.name == gap["model"]]
        for row in of_model or [found.setdefault((gap["model"],), Row(gap["model"]))]:
            row.gaps[gap["dataset"]] = gap["gap"]
    return list(found.values())


def colours(sources: list[Source]) -> dict[str, str]:
    """A colour for each run with a student; the teacher of the others is grey."""
    students = [s for s in sources if s.config and s.method != "rdm"]
    teachers = {Path(teacher).name for s in students for teacher in _teachers(s)}
    rest = iter(plots.PALETTE * len(students))
    return {s.name: plots.NEUTRAL if s.name in teachers else next(rest) for s in students}


def _teachers(source: Source) -> list[str]:
    """The run directories or names of a run's teachers."""
    given = (source.config or {}).get("distill_model") or []
    given = given.split(",") if isinstance(given, str) else given
    return [name.removeprefix("local-dir:").removesuffix("/student") for name in given]


def baseline(sources: list[Source], found: list[Row]) -> Row | None:
    """The student trained without distillation, if there is one that is nobody's teacher."""
    teachers = {Path(teacher).name for source in sources for teacher in _teachers(source)}
    plain = [row for row in found if row.method == "none" and row.name not in teachers]
    return plain[0] if plain else None


def curve(source: Source, kind: str, key: str) -> tuple[list[float], list[float]]:
    """Samples seen (in thousands) against a metric, where the run logged it."""
    lines = [line for line in source.metrics if line.get("kind") == kind and key in line]
    batch = (source.config or {}).get("batch_size") or 1
    x = [line.get("samples", line["step"] * batch) / 1000 for line in lines]
    return plots.finite(x, [line[key] for line in lines])


def contrastive_weight(config: dict) -> float:
    """What multiplies the mean of both directions' cross-entropy in a run's contrastive_loss."""
    method = config.get("distill")
    if method == "cifd":
        return 2 * config.get("lambda_cl", 0)
    return {"tinyclip": 2, "mobileclip": 2 * (1 - config.get("lambda_kd", 0))}.get(method, 1)


def training_section(sources: list[Source], colour: dict[str, str]) -> str:
    """Loss curves: what each method minimises, and what all of them can be compared by."""
    drawn = [s for s in sources if s.name in colour]
    objective = [(s.name, colour[s.name], *curve(s, "train", "loss")) for s in drawn]
    held_out = []
    for source in drawn:
        x, y = curve(source, "val", "contrastive_loss")
        weight = contrastive_weight(source.config or {})
        if x and weight:
            held_out.append((source.name, colour[source.name], x, [v / weight for v in y]))
    panels = [
        ("Training: each method's own objective", "total loss", objective),
        ("Held out: contrastive loss, unweighted", "cross-entropy (nats)", held_out),
    ]
    panels = [panel for panel in panels if any(line[2] for line in panel[2])]
    if not panels:
        return ""
    plot = plots.curves(panels, "thousand samples seen", log=True)
    return _section("Training", f'<div class="plot">{plot}</div>')


def bank_section(sources: list[Source]) -> str:
    """The rate-distortion curve and its figures, of every stage 1 among the sources."""
    parts = []
    for source in sources:
        last = _last_rates(source)
        if not last:
            continue
        plot = plots.rate_distortion(
            {
                m: [(r, v["bits"], v["distortion"]) for r, v in rates.items()]
                for m, rates in last.items()
            }
        )
        lines = "".join(
            f"<tr><td>{modality}</td><td>{rate:g}</td>"
            + "".join(
                f"<td>{v[key]:.{digits}f}</td>"
                for key, digits in (("bits", 1), ("distortion", 4), ("snr_db", 2))
            )
            + "</tr>"
            for modality, rates in last.items()
            for rate, v in sorted(rates.items(), reverse=True)
        )
        table = (
            "<table><thead><tr><th>modality</th><th>R</th><th>bits</th><th>distortion</th>"
            f"<th>SNR (dB)</th></tr></thead><tbody>{lines}</tbody></table>"
        )
        parts.append(f'<div class="side"><div class="plot">{plot}</div>{table}</div>')
    return _section("The bank", "".join(parts)) if parts else ""


def _last_rates(source: Source) -> dict[str, dict[float, dict[str, float]]]:
    """Modality -> R -> the last bits, distortion and SNR, of validation where there is one."""
    found: dict[str, dict[float, dict[str, float]]] = {}
    kinds = {line.get("kind") for line in source.metrics if "image/R" in " ".join(line)}
    for line in source.metrics:
        if line.get("kind") != ("val" if "val" in kinds else "train"):
            continue
        for key, value in line.items():
            match = re.fullmatch(r"(image|text)/R=([^/]+)/(bits|distortion|snr_db)", key)
            if match and value is not None:
                modality, rate, what = match.groups()
                found.setdefault(modality, {}).setdefault(float(rate), {})[what] = value
    return found


def examples_section(sources: list[Source], colour: dict[str, str]) -> str:
    """The same queries, answered by every model that was asked them."""
    answers: dict[tuple[str, str], list[tuple[str, dict]]] = {}
    for source in sources:
        for example in source.examples:
            for query in example["queries"]:
                who = query["caption"], query["image"]
                answers.setdefault(who, []).append((example["model"], query))
    cards = []
    for (caption, image), given in answers.items():
        lines = "".join(
            f'<div class="answer"><span class="who">{_swatch(colour.get(model))}'
            f"{html.escape(model)}</span>"
            + "".join(
                f'<img class="{"hit" if found["hit"] else ""}" src="{_data(found["image"])}" '
                f'alt="rank {rank}">'
                for rank, found in enumerate(query["retrieved"], 1)
            )
            + "</div>"
            for model, query in given
        )
        cards.append(
            f'<div class="card"><div class="query"><img src="{_data(image)}" alt="the image">'
            f"<q>{html.escape(caption)}</q></div>{lines}</div>"
        )
    if not cards:
        return ""
    note = (
        "<p>A caption, the image it was written for, and the five images each model finds "
        "nearest to it. A frame marks the right one.</p>"
    )
    return _section("Retrieved images", note + f'<div class="cards">{"".join(cards)}</div>')


def provenance_section(sources: list[Source]) -> str:
    """What the figures are figures of."""
    lines = []
    for result in (result for source in sources for result in source.results):
        p = result.get("provenance", {})
        held = ", ".join(f"{v:,} {k}" for k, v in p.get("held", {}).items())
        cells = (
            result["model"],
            result["dataset"],
            p.get("split", ""),
            held,
            p.get("protocol", ""),
            p.get("precision", ""),
            p.get("weights", "")[:12],
            p.get("data", "")[:12],
        )
        lines.append("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in cells) + "</tr>")
    heads = ("model", "data set", "split", "held", "protocol", "precision", "weights", "data")
    head = "".join(f"<th>{h}</th>" for h in heads)
    versions = {
        json.dumps(r["provenance"]["versions"], sort_keys=True)
        for source in sources
        for r in source.results
        if "versions" in r.get("provenance", {})
    }
    told = "".join(
        "<p>Versions: " + ", ".join(f"{k} {v}" for k, v in json.loads(v).items()) + "</p>"
        for v in sorted(versions)
    )
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    table = f'<table class="small">{body}</table>'
    return f"<details><summary>Provenance</summary>{table}{told}</details>"


def results_section(sources: list[Source], colour: dict[str, str]) -> str:
    """The table, and its first-place metrics as bars."""
    found = rows(sources)
    if not found:
        return ""
    plain = baseline(sources, found)
    table = tables.to_html(found, plain, lambda name: _swatch(colour.get(name)))
    counts = sorted({row.parameters["token_table"] for row in found if row.parameters})
    note = "Percent. Parameters leave out the token table"
    note += f" ({' and '.join(map(tables.millions, counts))})" if counts else ""
    note += f"; small figures are differences to <b>{html.escape(plain.name)}</b>" if plain else ""
    note += ". T→I: the image for a caption; I→T: a caption for the image."
    body = f'<div class="scroll">{table}</div><p>{note}</p>'
    first = [c for c in tables.columns(found) if c[1].endswith(("top-1", "R@1"))]
    drawn = [row for row in found if row.name in colour]
    if first and len(first) * len(drawn) <= 32:
        models = [(r.name, colour[r.name], [r.values.get(c) for c in first]) for r in drawn]
        groups = [f"{dataset}\n{metric}" for dataset, metric in first]
        body = f'<div class="plot">{plots.bars(groups, models)}</div>{body}'
    return _section("Results", body)


def page(sources: list[Source], title: str) -> str:
    """The whole page."""
    colour = colours(sources)
    sections = [
        results_section(sources, colour),
        bank_section(sources),
        training_section(sources, colour),
        examples_section(sources, colour),
        provenance_section(sources),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{CSS}</style></head><body><main>"
        f"<h1>{html.escape(title)}</h1>{_cost(sources, colour)}{''.join(sections)}"
        "</main></body></html>\n"
    )


def _cost(sources: list[Source], colour: dict[str, str]) -> str:
    """One line: how long each run took."""
    told = []
    for source in sources:
        seconds = source.finished.get("seconds")
        if seconds:
            told.append(
                f"{_swatch(colour.get(source.name))}{html.escape(source.name)} "
                f"<b>{seconds:.0f} s</b>"
            )
    return f'<p class="cost">Training time: {" · ".join(told)}</p>' if told else ""


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _swatch(colour: str | None) -> str:
    return f'<i class="swatch" style="background:{colour}"></i>' if colour else ""


def _data(png: str) -> str:
    return f"data:image/png;base64,{png}"


def main(argv: list[str]) -> None:
    """Entry point of ``python -m eval.report``."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, folders of results")
    parser.add_argument("-o", "--out", type=Path, default=Path("report.html"))
    parser.add_argument("--title", default="Controlled information flow for CLIP")
    args = parser.parse_args(argv)
    if args.out.suffix != ".html":
        raise UsageError(f"--out '{args.out}': expected a name that ends in .html")
    sources = [read_source(path) for path in args.runs]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(sources, args.title), encoding="utf-8")
    args.out.with_suffix(".md").write_text(tables.to_markdown(rows(sources)), encoding="utf-8")
    args.out.with_suffix(".csv").write_text(tables.to_csv(rows(sources)), encoding="utf-8")
    print(f"{args.out}: {len(sources)} runs")


if __name__ == "__main__":
    cli(main)
