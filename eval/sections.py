"""The sections of the report's page, from what the sources bring."""

import html
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from eval import paper, plots, tables
from eval.sources import Source, rows
from eval.tables import Row

Colours = dict[str, str]  # a run's name -> its colour in every plot


def colours(sources: list[Source]) -> Colours:
    """A colour for each run with a student; the teacher of the others is grey."""
    students = [s for s in sources if s.config and s.method != "rdm"]
    teachers = {Path(teacher).name for s in students for teacher in s.teachers}
    rest = iter(plots.PALETTE * len(students))
    return {s.name: plots.NEUTRAL if s.name in teachers else next(rest) for s in students}


def row_colour(row: Row, colour: Colours) -> str | None:
    """That of the first of a row's runs that has one: the row itself goes by what they share."""
    return next((colour[name] for name in (*row.names, row.name) if name in colour), None)


def baseline(sources: list[Source], found: list[Row]) -> Row | None:
    """The student trained without distillation, if there is one that is nobody's teacher."""
    teachers = {Path(teacher).name for source in sources for teacher in source.teachers}
    teachers |= {name for row in found if row.setting for name in row.setting.teachers}
    plain = [
        row
        for row in found
        if row.method == "none" and not teachers & {row.name, *row.names, row.setting.student}
    ]
    return plain[0] if plain else None


def paper_section(sources: list[Source]) -> str:
    """The paper's tables that some result belongs to."""
    found = rows(sources)
    placed = paper.place(found)
    if not placed:
        return ""
    note = (
        "Percent; grey is printed. Ours beneath is the mean over n seeds ± their sample standard "
        "deviation, the small figure ours minus the printed one. A run finds its row by its "
        "configuration."
    )
    rest = paper.unplaced(found, placed)
    outside = f"<p>In none of these rows: {html.escape(', '.join(rest))}.</p>" if rest else ""
    body = "".join(map(paper.to_html, placed))
    return section("The paper's tables", f"<p>{note}</p>{body}{outside}")


def results_section(sources: list[Source], colour: Colours) -> str:
    """The table, and its first-place metrics as bars."""
    found = rows(sources)
    if not found:
        return ""
    plain = baseline(sources, found)
    table = tables.to_html(found, plain, lambda row: swatch(row_colour(row, colour)))
    counts = {(row.parameters or {}).get("token_table") for row in found} - {None}
    note = "Percent."
    if counts:
        note += " Parameters leave out the token table"
        note += f" ({' and '.join(map(tables.millions, sorted(counts)))})."
    if tables.several(found):
        note += " Of n seeds: mean ± sample standard deviation."
    if plain:
        note += f" Small figures are differences to <b>{html.escape(_called(plain))}</b>."
    labels = " ".join(label for _, label in tables.columns(found))
    note += " T→I: the image for a caption; I→T: a caption for the image." * ("→" in labels)
    note += "".join(f" {html.escape(told)}" for told in tables.notes(found))
    body = f'<div class="scroll">{table}</div><p>{note}</p>'
    first = [c for c in tables.columns(found) if c[1].endswith(("top-1", "R@1"))]
    drawn = [(row, of_row) for row in found if (of_row := row_colour(row, colour))]
    if first and drawn and len(first) * len(drawn) <= 32:
        models = [
            (row.name, of_row, [row.mean(c) if c in row.values else None for c in first])
            for row, of_row in drawn
        ]
        groups = [f"{dataset}\n{metric}" for dataset, metric in first]
        body = f'<div class="plot">{plots.bars(groups, models)}</div>{body}'
    return section("Results", body)


def _called(row: Row) -> str:
    return row.name if row.method in row.name else f"{row.name} ({row.method})"


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
    return {"tinyclip": 2, "mobileclip": 1 - config.get("lambda_kd", 0)}.get(method, 1)


def training_section(sources: list[Source], colour: Colours) -> str:
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
    return section("Training", f'<div class="plot">{plot}</div>')


def examples_section(sources: list[Source], colour: Colours) -> str:
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
            f'<div class="answer"><span class="who">{swatch(colour.get(model))}'
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
    return section("Retrieved images", note + f'<div class="cards">{"".join(cards)}</div>')


def _classifier(result: dict) -> str:
    """A result of `training.classify` in two words; an RDM goes by its teacher."""
    return f"{result['student'] or result['teacher']} {result['method']}"


def _data_and_commit(provenance: dict) -> tuple[str, str]:
    """Fingerprint and commit; `training.classify` has one per split, and a whole environment."""
    data = provenance.get("data", "")
    if isinstance(data, dict):
        data = data.get("test") or data["train"]
    commit = provenance.get("commit") or provenance.get("environment", {}).get("commit")
    return str(data), commit or ""


def provenance_section(sources: list[Source]) -> str:
    """What the figures are figures of."""
    results = [result for source in sources for result in [*source.results, *source.banks]]
    if not results:
        return ""
    heads = ("model", "data set", "seed", "split", "held", "protocol", "precision", "weights")
    lines = []
    for result in results:
        p = result.get("provenance", {})
        held = ", ".join(f"{v:,} {k}" for k, v in (p.get("held") or {}).items())
        role = f" R={result['rate']:g}" if result.get("role") == "rdm" else ""
        lines.append(
            (
                (result.get("model") or _classifier(result)) + role,
                result["dataset"],
                result.get("seed", ""),
                *(p.get("split", ""), held, p.get("protocol", ""), p.get("precision", "")),
                *(text[:12] for text in (p.get("weights", ""), *_data_and_commit(p))),
            )
        )
    listed = html_table((*heads, "data", "commit"), lines, "small")
    versions = {
        json.dumps(r["provenance"]["versions"], sort_keys=True)
        for r in results
        if "versions" in r.get("provenance", {})
    }
    told = "".join(
        "<p>Versions: " + ", ".join(f"{k} {v}" for k, v in json.loads(v).items()) + "</p>"
        for v in sorted(versions)
    )
    return f"<details><summary>Provenance</summary>{listed}{told}</details>"


def cost(sources: list[Source], colour: Colours) -> str:
    """One line: how long each run took."""
    told = [
        f"{swatch(colour.get(s.name))}{html.escape(s.name)} <b>{s.finished['seconds']:.0f} s</b>"
        for s in sources
        if s.finished.get("seconds")
    ]
    return f'<p class="cost">Training time: {" · ".join(told)}</p>' if told else ""


def section(title: str, body: str) -> str:
    """One card of the page."""
    return f"<section><h2>{title}</h2>{body}</section>"


def html_table(heads: Iterable[str], lines: Iterable[Iterable], kind: str = "") -> str:
    """Cells of text as a table."""
    tag: Callable = lambda name, cells: "".join(  # noqa: E731
        f"<{name}>{html.escape(str(c))}</{name}>" for c in cells
    )
    body = "".join(f"<tr>{tag('td', line)}</tr>" for line in lines)
    return (
        f'<table class="{kind}"><thead><tr>{tag("th", heads)}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def swatch(colour: str | None) -> str:
    """A square of a run's colour."""
    return f'<i class="swatch" style="background:{colour}"></i>' if colour else ""


def _data(png: str) -> str:
    return f"data:image/png;base64,{png}"
