"""What the banks did: rate and distortion, accuracy against R, and maps of embeddings."""

import html
import re
import statistics
from collections import defaultdict
from pathlib import Path

from eval import plots
from eval.sections import html_table, section
from eval.sources import Setting, Source, setting_of
from eval.tables import TASKS, markdown

#: What is drawn and tabulated of a data set, of the metrics that it has.
SHOWN = ("acc1", "image_retrieval_recall@1", "text_retrieval_recall@1")
MAPS = 4


def to_html(sources: list[Source]) -> str:
    """The section, or nothing."""
    parts = []
    for source in sources:
        last = last_rates(source)
        if last:
            curves = {
                modality: [(r, v["bits"], v["distortion"]) for r, v in rates.items()]
                for modality, rates in last.items()
            }
            table = html_table(*_rates_table(last))
            plot = plots.rate_distortion(curves, f"{source.name}: what the assistants keep")
            parts.append(f'<div class="side"><div class="plot">{plot}</div>{table}</div>')
        parts += map(_measured_html, source.banks)
    parts += [_classifier_html(*found) for found in classifier_banks(sources).items()]
    return section("The bank", "".join(parts)) if parts else ""


def to_markdown(sources: list[Source]) -> list[str]:
    """A heading and a table for each bank and data set."""
    parts = []
    for source in sources:
        last = last_rates(source)
        if last:
            heads, lines = _rates_table(last)
            parts.append(_markdown(f"The bank: {source.name}", heads, lines))
        for bank in source.banks:
            heads, lines = _measured_table(bank)
            parts.append(_markdown(f"The bank on {bank['dataset']}: {bank['model']}", heads, lines))
    for name, found in classifier_banks(sources).items():
        parts.append(_markdown(f"The RDMs of {name}", *_classifier_table(found)))
    return parts


def _markdown(title: str, heads, lines) -> str:
    right = ["---", *["---:"] * (len(heads) - 1)]
    return f"## {title}\n\n{markdown([list(heads), right, *map(list, lines)])}"


def last_rates(source: Source) -> dict[str, dict[float, dict[str, float]]]:
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


def _rates_table(last):
    digits = (("bits", 1), ("distortion", 4), ("snr_db", 2))
    lines = [
        (modality, f"{rate:g}", *(f"{v[key]:.{d}f}" if key in v else "" for key, d in digits))
        for modality, rates in last.items()
        for rate, v in sorted(rates.items(), reverse=True)
    ]
    return ("modality", "R", "bits", "distortion", "SNR (dB)"), lines


def _measured_table(bank: dict):
    """Teacher and assistants of `eval.bank` on one data set."""
    labels = {k: v for k, v in TASKS[bank["task"]].items() if k in bank["teacher"]["metrics"]}
    labels = {k: v for k, v in labels.items() if bank["teacher"]["metrics"][k] is not None}
    bits = [f"bits per {m}" for m in bank["assistants"][0]["bits"]]
    lines = []
    shown = [(f"R = {a['rate']:g}", a) for a in _by_rate(bank)[::-1]]
    shown = [("teacher", bank["teacher"]), *shown]
    if "mean" in bank:  # not in results of older versions
        shown.append(("mean of these", bank["mean"]))
    for name, one in shown:
        rates = [f"{v:.1f}" for v in one.get("bits", {}).values()] or [""] * len(bits)
        lines.append((name, *rates, *(f"{100 * one['metrics'][k]:.1f}" for k in labels)))
    return ("", *bits, *labels.values()), lines


def _by_rate(bank: dict) -> list[dict]:
    return sorted(bank["assistants"], key=lambda a: a["rate"])


def _measured_html(bank: dict) -> str:
    found, teacher = _by_rate(bank), bank["teacher"]["metrics"]
    rates = [a["rate"] for a in found]
    lines = []
    for key in SHOWN:
        if teacher.get(key) is not None:
            values = [100 * a["metrics"][key] for a in found]
            lines.append((TASKS[bank["task"]][key], rates, values, None, 100 * teacher[key]))
    title = f"{bank['model']} on {bank['dataset']}: what the assistants still know"
    plot = f'<div class="plot">{plots.against_rate(title, lines)}</div>'
    table = f'<div class="scroll">{html_table(*_measured_table(bank))}</div>'
    return f'<div class="side">{plot}{table}</div>' + (_maps_html(bank) if "map" in bank else "")


def _maps_html(bank: dict) -> str:
    """The embeddings of ten classes, of the teacher and of assistants from rich to poor."""
    accuracy = {"teacher": bank["teacher"]["metrics"]["acc1"]}
    accuracy |= {f"{a['rate']:g}": a["metrics"]["acc1"] for a in _by_rate(bank)[::-1]}
    rates = [name for name in accuracy if name != "teacher"]
    if len(rates) > MAPS - 1:  # the richest, the poorest and the middle
        rates = [rates[0], rates[len(rates) // 2], rates[-1]]
    panels = [
        (
            f"{'Teacher' if name == 'teacher' else f'R = {name}'}, {100 * accuracy[name]:.1f} %",
            bank["map"]["points"][name],
        )
        for name in ("teacher", *rates)
    ]
    plot = plots.maps(panels, bank["map"]["labels"], bank["map"]["classes"])
    kind = "zero-shot accuracy" if bank["task"] == "zeroshot_classification" else "accuracy"
    note = (
        f"t-SNE of image embeddings of {len(bank['map']['classes'])} classes of "
        f"{html.escape(bank['dataset'])}, with the {kind} on the whole set (Figure 9)."
    )
    return f'<div class="plot">{plot}</div><p>{note}</p>'


def classifier_banks(sources: list[Source]) -> dict[str, dict]:
    """What banks -> accuracies by R over seeds, and the teacher's own (Figure 5).

    Banks are one where they differ by their seed alone.
    """
    results = [r for s in sources for r in s.results if r["task"] == "classification"]
    banks: dict[Setting, list[dict]] = {}
    for result in results:
        if result.get("role") == "rdm" and result.get("metrics"):
            setting, _ = setting_of(Source(Path()), result)
            banks.setdefault(setting, []).append(result)
    found = {}
    for setting, of_bank in banks.items():
        teacher, dataset = setting.teachers[0], setting.dataset
        name = f"{teacher} on {dataset}"
        if sum((s.teachers, s.dataset) == (setting.teachers, dataset) for s in banks) > 1:
            name += f" ({', '.join(sorted({_run_name(r) for r in of_bank}))})"
        rates: dict[float, dict] = defaultdict(dict)
        for result in of_bank:
            rates[result["rate"]][result.get("seed")] = 100 * result["metrics"]["acc1"]
        found[name] = {
            "rates": rates,
            "teacher": {
                r.get("seed"): 100 * r["metrics"]["acc1"]
                for r in results
                if (r["method"], r["dataset"], r["student"]) == ("none", dataset, teacher)
                and r.get("metrics")
                and _taught(r, of_bank)
            },
        }
    return found


def _taught(teacher: dict, bank: list[dict]) -> bool:
    """Whether the bank's RDMs are of this run's weights; older results don't tell its weights."""
    weights = teacher["provenance"].get("weights")
    return weights is None or any(weights in r["provenance"]["teachers"] for r in bank)


def _run_name(result: dict) -> str:
    return result.get("provenance", {}).get("settings", {}).get("name") or "a bank"


def _classifier_table(bank: dict):
    named = [("teacher", bank["teacher"])] if bank["teacher"] else [("teacher (no result)", {})]
    named += [(f"R = {rate:g}", seeds) for rate, seeds in sorted(bank["rates"].items())[::-1]]
    lines = [(name, str(len(seeds)), _mean(list(seeds.values()))) for name, seeds in named]
    return ("", "n", "top-1"), lines


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def _classifier_html(name: str, bank: dict) -> str:
    rates = sorted(bank["rates"])
    values = [list(bank["rates"][rate].values()) for rate in rates]
    spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    teacher = statistics.fmean(bank["teacher"].values()) if bank["teacher"] else None
    line = ("top-1", rates, list(map(statistics.fmean, values)), spread, teacher)
    plot = plots.against_rate(f"Figure 5: RDMs of {name}", [line])
    table = html_table(*_classifier_table(bank))
    return f'<div class="side"><div class="plot">{plot}</div>{table}</div>'
