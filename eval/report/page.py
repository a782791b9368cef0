"""What a report says, as one list of blocks, from what the sources bring."""

import json
import math

from eval.report import banks, paper, plots
from eval.report.blocks import Heading, Paragraph, Plot, Retrieval
from eval.report.paper import PaperTable
from eval.report.rows import Row, colour_of, figures, millions, notes, results_table, several
from eval.report.runs import Source
from eval.report.table import Block, Column, Table, columns
from training.clip.config import Config
from training.engine.result import BankResult, Result
from training.tuning import table as tuning

Colours = dict[str, str]  # a run's name → its colour in every plot
BARS = 32  # more than these are no picture


def blocks(sources: list[Source], rows: list[Row], placed: list[PaperTable]) -> list[Block]:
    """The whole report, of the sources, a row for each setting, and the paper's tables of these."""
    colours, of_banks = run_colours(sources), banks.blocks(sources)
    return [
        *paper_section(rows, placed),
        *results_section(sources, rows, colours),
        *study_section(sources),
        *([Heading("The bank"), *of_banks] if of_banks else []),
        *training_section(sources, colours),
        *examples_section(sources, colours),
        *provenance_section(sources),
    ]


def run_colours(sources: list[Source]) -> Colours:
    """A colour for each run with a student; the teacher of the others is grey."""
    students = [s for s in sources if s.config and s.method != "rdm"]
    teachers = {teacher for s in students for teacher in s.teachers}
    rest = iter(plots.PALETTE * len(students))
    return {s.name: plots.NEUTRAL if s.name in teachers else next(rest) for s in students}


def paper_section(rows: list[Row], placed: list[PaperTable]) -> list[Block]:
    """The paper's tables that some result belongs to."""
    if not placed:
        return []
    note = (
        "Percent; grey is printed. Ours beneath is the mean over n seeds ± their sample standard "
        "deviation; the signed figure is ours minus the printed one. A run finds its row by its "
        "configuration."
    )
    outside = paper.unplaced(rows, placed)
    rest = [Paragraph(f"In none of these rows: {', '.join(outside)}.")] if outside else []
    tables = [block for table in placed for block in paper.blocks(table)]
    return [Heading("The paper's tables"), Paragraph(note), *tables, *rest]


def baselines(sources: list[Source], rows: list[Row]) -> list[Row | None]:
    """Of each row the same student without distillation, rather one that is nobody's teacher."""
    teachers = {name for source in sources for name in source.teachers}
    teachers |= {name for row in rows if row.setting for name in row.setting.teachers}
    plain = [row for row in rows if row.method == "none"]
    plain.sort(key=lambda row: bool(teachers & {row.name, *row.names, row.setting.student}))
    found = [next((one for one in plain if one.student == row.student), None) for row in rows]
    return [None if one is row else one for one, row in zip(found, rows)]


def results_section(sources: list[Source], rows: list[Row], colours: Colours) -> list[Block]:
    """The table, and its first-place metrics as bars."""
    if not rows:
        return []
    plain = baselines(sources, rows)
    section: list[Block] = [Heading("Results")]
    first = [figure for figure in figures(rows) if figure[1].endswith(("top-1", "R@1"))]
    drawn = [(row, colour) for row in rows if (colour := colour_of(row, colours))]
    if first and drawn and len(first) * len(drawn) <= BARS:
        models = [
            (row.name, colour, [row.mean(f) if f in row.values else None for f in first])
            for row, colour in drawn
        ]
        section.append(Plot(plots.bars(["\n".join(figure) for figure in first], models)))
    section += results_table(rows, plain, colours).parts()
    return [*section, Paragraph(" ".join(_explanations(rows, plain)))]


def _explanations(rows: list[Row], plain: list[Row | None]) -> list[str]:
    sentences = ["Percent."]
    counts = {r.parameters["token_table"] for r in rows if "token_table" in r.parameters}
    if counts:
        tables = " and ".join(map(millions, sorted(counts)))
        sentences.append(f"Parameters leave out the token table ({tables}).")
    if several(rows):
        sentences.append("Of n seeds: mean ± sample standard deviation.")
    if names := dict.fromkeys(row.name for row in plain if row):
        same = "the same student without distillation"
        sentences.append(f"Signed figures are differences to {same} ({', '.join(names)}).")
    if any("→" in label for _, label in figures(rows)):
        sentences.append("T→I: the image for a caption; I→T: a caption for the image.")
    return sentences + notes(rows)


def study_section(sources: list[Source]) -> list[Block]:
    """The tables of studies of `training.tune`, each with its figure."""
    section: list[Block] = []
    for source in sources:
        if study := source.study:
            heads, *rows = tuning.lines(study)
            heads = [Column(head, words=head in (heads[0], heads[-1])) for head in heads]
            table = Table(heads, rows, "small")
            drawn = [Plot(plots.study(study))] if len(rows) > 1 else []
            about = f"{tuning.explanation(study)} Commit {study['environment']['commit']}."
            section += [Heading(source.name, 3), *drawn, table, Paragraph(about)]
    return [Heading("Equal tuning"), *section] if section else []


def curve(source: Source, kind: str, key: str) -> tuple[list[float], list[float]]:
    """Samples seen (in thousands) against a metric, where the run logged it."""
    batch = source.config["global_batch"] if source.config else 1
    points = [
        (line.get("samples", line["step"] * batch) / 1000, line[key])
        for line in source.metrics
        if line["kind"] == kind and line.get(key) is not None and math.isfinite(line[key])
    ]
    return [x for x, _ in points], [y for _, y in points]


def contrastive_weight(config: Config) -> float:
    """What multiplies the mean of both directions' cross-entropy in a run's contrastive_loss."""
    if config.distill == "cifd":
        return 2 * config.options["lambda_cl"]
    if config.distill == "mobileclip":
        return 1 - config.options["lambda_kd"]
    return 2 if config.distill == "tinyclip" else 1


def training_section(sources: list[Source], colours: Colours) -> list[Block]:
    """Loss curves: what each method minimises, and what all can be compared by; and the time."""
    drawn = [s for s in sources if s.name in colours]
    objective = [(s.name, colours[s.name], *curve(s, "train", "loss")) for s in drawn]
    held_out = []
    for source in drawn:
        x, y = curve(source, "val", "contrastive_loss")
        if x and (weight := contrastive_weight(source.clip)):
            held_out.append((source.name, colours[source.name], x, [v / weight for v in y]))
    panels = [
        ("Training: each method's own objective", "total loss", objective),
        ("Held out: contrastive loss, unweighted", "cross-entropy (nats)", held_out),
    ]
    panels = [panel for panel in panels if any(line[2] for line in panel[2])]
    section = []
    if panels:
        section.append(Plot(plots.curves(panels, "thousand samples seen")))
    if times := [f"{s.name} {s.finished['seconds']:.0f} s" for s in sources if s.finished]:
        section.append(Paragraph(f"Training time: {', '.join(times)}."))
    return [Heading("Training"), *section] if section else []


def examples_section(sources: list[Source], colours: Colours) -> list[Block]:
    """The same captions, answered by every model that was evaluated on them."""
    cards: dict[tuple[str, str], list] = {}
    for source in sources:
        for examples in source.examples:
            for query in examples.queries:
                answer = examples.model, colours.get(examples.model), query
                cards.setdefault((query.caption, query.image), []).append(answer)
    return [Heading("Retrieved images"), Retrieval(list(cards.values()))] if cards else []


def provenance_section(sources: list[Source]) -> list[Block]:
    """Which weights, data and versions each figure is of."""
    results = [result for source in sources for result in [*source.results, *source.banks]]
    if not results:
        return []
    heads = "model,data set,split,seed,held,protocol,precision,weights,data,commit".split(",")
    versions = {json.dumps(r.provenance.versions, sort_keys=True) for r in results}
    return [
        Heading("Provenance", folded=True),
        Table(columns(*heads, words=len(heads)), list(map(_provenance, results)), "small"),
        *(
            Paragraph("Versions: " + ", ".join(f"{k} {v}" for k, v in json.loads(each).items()))
            for each in sorted(versions - {"{}"})
        ),
    ]


def _provenance(result: Result | BankResult) -> list[str]:
    p, training = result.provenance, isinstance(result, Result) and result.training
    rate = f", R = {training.rate:g}" if training and training.rate is not None else ""
    data = p.data.get(result.split) or next(iter(p.data.values()), "")
    return [
        result.model + rate,
        result.dataset,
        result.split,
        "" if p.seed is None else str(p.seed),
        ", ".join(f"{v:,} {k}" for k, v in p.held.items()),
        p.protocol,
        p.precision,
        *(text[:12] for text in (p.weights or "", data, p.commit or "")),
    ]
