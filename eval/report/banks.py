"""What the banks keep: rate and distortion, accuracy against R, and maps of embeddings."""

import re
import statistics
from collections import defaultdict
from dataclasses import dataclass

from eval.report import plots
from eval.report.blocks import Heading, Paragraph, Plot
from eval.report.rows import TASKS
from eval.report.runs import Setting, Source, classifier_setting
from eval.report.table import Block, Table, columns, mean
from training.engine.result import BankResult, EmbeddingMap, Metrics, Reconstruction, Result

#: What is drawn of a data set, of the metrics that it has.
DRAWN = ("acc1", "image_retrieval_recall@1", "text_retrieval_recall@1")
MAPS = 4
#: Logged of each RDM: name → digits.
LOGGED = {"bits": 1, "distortion": 4, "snr_db": 2}


def blocks(sources: list[Source]) -> list[Block]:
    """What stage 1 logged, what was measured on data sets, and RDMs of classifiers over seeds."""
    section = []
    for source in sources:
        if last := last_rates(source):
            section += [Heading(f"The bank: {source.name}", 3), _rate_distortion(last)]
        for bank in source.banks:
            section += _measured(bank)
    for name, bank in classifier_banks(sources).items():
        section += [Heading(f"Figure 5: RDMs of {name}", 3), _over_seeds(bank)]
    return section


def last_rates(source: Source) -> dict[str, dict[float, dict[str, float]]]:
    """Modality → R → the last of `LOGGED`, of validation where there is one."""
    last: dict[str, dict[float, dict[str, float]]] = {}
    lines = [line for line in source.metrics if any(key.startswith("image/R") for key in line)]
    kind = "val" if any(line["kind"] == "val" for line in lines) else "train"
    for line in (line for line in lines if line["kind"] == kind):
        for key, value in line.items():
            match = re.fullmatch(rf"(image|text)/R=([^/]+)/({'|'.join(LOGGED)})", key)
            if match and value is not None:
                modality, rate, name = match.groups()
                last.setdefault(modality, {}).setdefault(float(rate), {})[name] = value
    return last


def _rate_distortion(last: dict[str, dict[float, dict[str, float]]]) -> Plot:
    curves = {
        modality: [(rate, v["bits"], v["distortion"]) for rate, v in rates.items()]
        for modality, rates in last.items()
    }
    lines = [
        [modality, f"{rate:g}", *(f"{v[k]:.{d}f}" if k in v else "" for k, d in LOGGED.items())]
        for modality, rates in last.items()
        for rate, v in sorted(rates.items(), reverse=True)
    ]
    heads = columns("modality", "R", "bits", "distortion", "SNR (dB)")
    return Plot(plots.rate_distortion(curves), Table(heads, lines, "small"))


def _measured(bank: BankResult) -> list[Block]:
    """Teacher and assistants of `eval.bank` on one data set."""
    by_rate = sorted(bank.assistants, key=lambda one: one.rate)
    labels = {k: v for k, v in TASKS[bank.task].items() if bank.teacher.get(k) is not None}
    lines = [
        (
            labels[key],
            [one.rate for one in by_rate],
            [100 * one.metrics[key] for one in by_rate],
            None,
            100 * bank.teacher[key],
        )
        for key in DRAWN
        if key in labels
    ]
    section = [
        Heading(f"The bank on {bank.dataset}: {bank.model}", 3),
        Plot(plots.against_rate(lines), _measured_table(bank, by_rate[::-1], labels)),
    ]
    return section + (_maps(bank, bank.map, by_rate[::-1]) if bank.map else [])


def _measured_table(
    bank: BankResult, by_rate: list[Reconstruction], labels: dict[str, str]
) -> Table:
    modalities = list(by_rate[0].bits)

    def line(name: str, metrics: Metrics, bits: dict[str, float] | None = None) -> list[str]:
        rates = (f"{bits[m]:.1f}" if bits else "" for m in modalities)
        return [name, *rates, *(f"{100 * metrics[key]:.1f}" for key in labels)]

    lines = [line("teacher", bank.teacher)]
    lines += [line(f"R = {one.rate:g}", one.metrics, one.bits) for one in by_rate]
    lines += [line("mean of these", bank.mean)] if bank.mean else []
    heads = columns("", *(f"bits per {m}" for m in modalities), *labels.values())
    return Table(heads, lines, "small")


def _maps(bank: BankResult, points: EmbeddingMap, by_rate: list[Reconstruction]) -> list[Block]:
    """The embeddings of some classes, of the teacher and of assistants from rich to poor."""
    if len(by_rate) > MAPS - 1:  # the richest, the poorest and the middle
        by_rate = [by_rate[0], by_rate[len(by_rate) // 2], by_rate[-1]]
    panels = [(f"Teacher, {100 * bank.teacher['acc1']:.1f} %", points.points["teacher"])]
    for one in by_rate:
        title = f"R = {one.rate:g}, {100 * one.metrics['acc1']:.1f} %"
        panels.append((title, points.points[f"{one.rate:g}"]))
    kind = "zero-shot accuracy" if bank.task == "zeroshot_classification" else "accuracy"
    note = (
        f"t-SNE of image embeddings of {len(points.classes)} classes of {bank.dataset}, with the "
        f"{kind} on the whole set (Figure 9)."
    )
    return [Plot(plots.maps(panels, points.labels, points.classes)), Paragraph(note)]


@dataclass(frozen=True)
class ClassifierBank:
    """The RDMs of a classifier over seeds: top-1 in percent by R and seed, and the teacher's."""

    rates: dict[float, dict[int | None, float]]
    teacher: dict[int | None, float]


def classifier_banks(sources: list[Source]) -> dict[str, ClassifierBank]:
    """Banks of `training.classify`, one where they differ by their seed alone.

    They go by the teacher's name, with the runs' where that does not tell two of them apart.
    """
    results = [r for s in sources for r in s.results if r.training and r.metrics]
    banks: dict[Setting, list[Result]] = defaultdict(list)
    for result in results:
        if result.training.role == "rdm":
            banks[classifier_setting(result)].append(result)
    by_name = {}
    for setting, of_bank in banks.items():
        name = f"{setting.teachers[0]} on {setting.dataset}"
        if sum((s.teachers, s.dataset) == (setting.teachers, setting.dataset) for s in banks) > 1:
            name += f" ({', '.join(sorted({result.model for result in of_bank}))})"
        rates: dict[float, dict[int | None, float]] = defaultdict(dict)
        for result in of_bank:
            rates[result.training.rate][result.provenance.seed] = 100 * result.metrics["acc1"]
        teachers = [result for result in results if _taught(result, setting, of_bank)]
        teacher = {r.provenance.seed: 100 * r.metrics["acc1"] for r in teachers}
        by_name[name] = ClassifierBank(dict(rates), teacher)
    return by_name


def _taught(result: Result, setting: Setting, bank: list[Result]) -> bool:
    """Whether a result is of the bank's teacher: by its weights, where both are recorded."""
    training, weights = result.training, result.provenance.weights
    plain = training.method == "none" and training.student == setting.teachers[0]
    same = weights is None or any(weights in one.provenance.teachers for one in bank)
    return plain and result.dataset == setting.dataset and same


def _over_seeds(bank: ClassifierBank) -> Plot:
    rates = sorted(bank.rates)
    values = [list(bank.rates[rate].values()) for rate in rates]
    spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    teacher = list(bank.teacher.values())
    own = statistics.fmean(teacher) if teacher else None
    line = ("top-1", rates, [statistics.fmean(v) for v in values], spread, own)
    named = [("teacher" if teacher else "teacher (no result)", teacher)]
    named += [(f"R = {rate:g}", v) for rate, v in zip(rates[::-1], values[::-1])]
    lines = [[name, str(len(v)), mean(v, 2) if v else ""] for name, v in named]
    cells = Table(columns("", "n", "top-1"), lines, "small")
    return Plot(plots.against_rate([line]), cells)
