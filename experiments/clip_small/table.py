"""The study's tables, from its kept results alone."""

import csv
import io
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from eval.cost import gpu_hours
from experiments.clip_small.keep import figures, score
from experiments.clip_small.plan import DEFAULT, METHODS, MODELS, STUDENTS, Scale
from experiments.seeds import Summary, paired, shown, summarise
from experiments.seeds import table as markdown

BASELINE = "clipkd"
#: Figure → its head; differences to the baseline are shown of the first two.
SHOWN = {
    "top1": "CIFAR-100 top-1",
    "recall": "Flickr8k mean recall",
    "R@1": "Flickr8k R@1",
    "gap_top1": "gap top-1",
    "gap_recall": "gap recall",
}
COMPARED = ("top1", "recall")
#: Part of CIFD → a method with it, and one that differs in it alone.
PARTS = {
    "contrastive term": ("cifd0-noibm", "fd"),
    "IBM, without RDMs": ("cifd0", "cifd0-noibm"),
    "first RDM": ("cifd1", "cifd0"),
    "two more RDMs": ("cifd3", "cifd1"),
    "three RDMs, without IBM": ("cifd3-noibm", "cifd0-noibm"),
    "IBM, with three RDMs": ("cifd3", "cifd3-noibm"),
}

Kept = dict[str, Any]
BySeed = dict[int, Kept]  # what is kept of the runs of one setting


def grouped(kept: Iterable[Kept], stage: str, *names: str) -> dict[tuple, BySeed]:
    """The kept results of a stage by what `names` say of them, then by seed."""
    groups: dict[tuple, BySeed] = {}
    for one in kept:
        about = one["about"]
        if about["stage"] == stage:
            groups.setdefault(tuple(about[name] for name in names), {})[about["seed"]] = one
    return groups


def column(runs: BySeed, name: str) -> dict[int, float]:
    """One figure, or the score, of each seed."""
    if name == "score":
        return {seed: score(one) for seed, one in runs.items()}
    return {seed: figures(one)[name] for seed, one in sorted(runs.items())}


def spreads(runs: BySeed) -> dict[str, Summary]:
    """Mean and spread of every figure."""
    return {name: summarise(column(runs, name).values()) for name in SHOWN}


def differences(mine: BySeed, other: BySeed, names: Iterable[str]) -> dict[str, Summary]:
    """Paired differences of figures."""
    return {name: paired(column(mine, name), column(other, name)) for name in names}


def summaries(kept: Iterable[Kept], scale: Scale) -> list[dict[str, Any]]:
    """A row for each student and method, with the teachers first."""
    groups, rows = grouped(kept, "students", "student", "method"), []
    for model in ("teacher", *STUDENTS):
        for method in ("teacher", *METHODS):
            runs = groups.get((model, method))
            if not runs:
                continue
            row = {
                "student": model,
                "method": method,
                "seeds": sorted(runs),
                "figures": spreads(runs),
                "seconds": _seconds(runs.values()),
                "data": sorted({one["data"]["hash"] for one in runs.values()}),
                "commits": sorted({c for one in runs.values() for c in one["commits"]}),
                "commands": [c for _, one in sorted(runs.items()) for c in one["commands"]],
            }
            if model != "teacher":
                row["cost"] = costs(scale, method, model, runs[min(runs)]["data"]["usable"])
                baseline = groups.get((model, BASELINE), {})
                row[f"minus_{BASELINE}"] = differences(runs, baseline, COMPARED)
            rows.append(row)
    return rows


def parts(kept: Iterable[Kept]) -> list[dict[str, Any]]:
    """A row for each student and part of CIFD: what it brings, paired by seed."""
    groups, rows = grouped(kept, "students", "student", "method"), []
    for model in STUDENTS:
        for part, (method, without) in PARTS.items():
            mine, other = (groups.get((model, name), {}) for name in (method, without))
            if mine.keys() & other.keys():
                row = {"student": model, "part": part, "method": method, "without": without}
                rows.append(row | {"brings": differences(mine, other, SHOWN)})
    return rows


def answers(kept: Iterable[Kept]) -> list[dict[str, Any]]:
    """A row for each answer to an open choice, on held-out training data, the defaults first."""
    groups, rows = grouped(kept, "choices", "question", "student", "answer"), []
    default = {model: runs for (question, model, _), runs in groups.items() if question == DEFAULT}
    for (question, model, answer), runs in groups.items():
        banks = [one["taught_by"]["bank"] or {} for one in runs.values()]
        rates = {tuple(bank.get("rates", ())) for bank in banks}
        row = {"question": question, "student": model, "answer": answer, "seeds": sorted(runs)}
        row |= {"rates": sorted(map(list, rates)), "figures": spreads(runs)}
        row["score"] = summarise(column(runs, "score").values())
        row |= {
            f"minus_{DEFAULT}": differences(runs, default.get(model, {}), ["score"])["score"],
        }
        rows.append(row)
    return sorted(rows, key=lambda row: (row["question"] != DEFAULT, row["question"]))


def costs(scale: Scale, method: str, model: str, pairs: int) -> dict[str, float]:
    """Counted training cost beside the teacher's own, relative to plain CLIP's.

    ``live``: every teacher runs on every batch; ``cached``: each runs once on four views of the
    data (``pairs`` training pairs), that pass included. Stage 1 of CIFD is counted in both.
    """

    def hours(method: str, cached: bool) -> float:
        flags = [*_recipe(scale, method, model, cached), f"--dataset-samples={pairs}"]
        return sum(gpu_hours(flags).values())

    plain = hours("none", False)
    return {way: hours(method, way == "cached") / plain for way in ("live", "cached")}


def _recipe(scale: Scale, method: str, model: str, cached: bool) -> list[str]:
    """A method as one command line of `training.main`."""
    row = METHODS[method]
    flags = [
        f"--distill={row.distill}", f"--model={scale.models}-{model}", *row.flags, "--views=4",
        f"--batch-size={scale.batch}", f"--train-num-samples={scale.samples}", "--captions=all",
        f"--epochs={scale.student}", f"--rdm-epochs={scale.bank}",
        "--model-config", *(f"{MODELS}/{scale.models}-{name}.json" for name in ("teacher", model)),
    ]  # fmt: skip
    if row.rates:
        flags += ["--rates", *(f"{rate:g}" for rate in row.rates)]
    if row.teachers:
        flags.append("--distill-model=" + ",".join([f"{scale.models}-teacher"] * row.teachers))
        flag = "--teacher-cache" if cached else "--distill-pretrained"
        flags.append(f"{flag}=" + ",".join(["any"] * row.teachers))
    return flags


def _seconds(runs: Iterable[Kept]) -> dict[str, float]:
    """Mean seconds of the student, and of what it needs beside its teachers."""
    runs = list(runs)
    seconds = {"student": fmean(one["seconds"][one["about"]["run"]] for one in runs)}
    for kind in ("cache", "bank"):
        seconds[kind] = fmean(
            sum(s for name, s in one["seconds"].items() if name.startswith(kind)) for one in runs
        )
    return seconds


# -- as text ---------------------------------------------------------------------------------------


def to_markdown(
    rows: list[dict], brought: list[dict], chosen: list[dict], tuned: dict | None
) -> str:
    """The tables as GitHub Markdown, with what their figures mean."""
    text = "# CIFAR-100 and Flickr8k\n"
    if rows:
        text += (
            "\nPercent on test data: zero-shot top-1, and recall at 1, 5 and 10 both ways (their "
            "mean; at 1 alone). Mean ± sample standard deviation over n seeds; "
            f"− {BASELINE}: the paired difference by seed ± its standard error. Gap: as many "
            "training samples minus test. min: wall minutes of a student's training from the "
            "cache. Cost: counted training cost beside the teacher's own, × plain CLIP, with a "
            "live teacher and with the cache (included). kd and tinyclip minimise one loss up to "
            "a factor of two, which AdamW cancels.\n\n" + _students_table(rows)
        )
    if tuned:
        weights = ", ".join(f"{method} {value:g}" for method, value in tuned["weights"].items())
        text += (
            f"\nTuned on held-out training pairs (student gap10, seed 0): learning rate "
            f"{tuned['lr']:g} for all; weights: {weights}. kd, fd, tinyclip and none have none.\n"
        )
    if brought:
        lines = []
        for row in brought:
            methods = f"{row['method']} − {row['without']}"
            lines.append([row["student"], row["part"], methods, *_cells(row["brings"])])
        text += (
            "\n## What each part of CIFD brings\n\nOn test data; paired differences by seed ± "
            "their standard error. Each method has its own tuned λ_CL.\n\n"
        ) + markdown(["student", "part", "methods", *SHOWN.values()], lines, texts=3)
    if chosen:
        lines = []
        for row in chosen:
            over = shown(row[f"minus_{DEFAULT}"]) if row["question"] != DEFAULT else ""
            line = [row["question"], row["student"], row["answer"], str(len(row["seeds"]))]
            lines.append([*line, shown(row["score"]), over, *_cells(row["figures"])])
        heads = ["question", "student", "answer", "n", "score", "− default", *SHOWN.values()]
        text += (
            "\n## Open choices of cifd3\n\nOn held-out training pairs, not test; score: the mean "
            "of top-1 and mean recall; − default: its paired difference by seed ± its standard "
            "error.\n\n"
        ) + markdown(heads, lines, texts=3)
    return text


def _cells(summaries: dict[str, Summary]) -> list[str]:
    return [shown(summaries[name]) for name in SHOWN]


def _students_table(rows: list[dict]) -> str:
    heads = ["student", "method", "n"]
    for name, head in SHOWN.items():
        heads += [head, f"− {BASELINE}"] if name in COMPARED else [head]
    lines = []
    for row in rows:
        line = [row["student"], row["method"], str(len(row["seeds"]))]
        minus = {} if row["method"] == BASELINE else row.get(f"minus_{BASELINE}", {})
        for name in SHOWN:
            line.append(shown(row["figures"][name]))
            if name in COMPARED:
                line.append(shown(minus[name]) if name in minus else "")
        cost = row.get("cost", {})
        line.append(f"{row['seconds']['student'] / 60:.1f}")
        line += [f"{cost[way]:.2f}" if cost else "" for way in ("live", "cached")]
        lines.append(line)
    return markdown([*heads, "min", "cost, live", "cost, cached"], lines, texts=2)


def to_csv(kept: Iterable[Kept]) -> str:
    """Every run's figures, unrounded."""
    heads = ("stage", "question", "answer", "student", "method", "seed", "weight", "lr")
    lines = [
        {name: one["about"].get(name, "") for name in heads}
        | {name: f"{value:.4f}" for name, value in figures(one).items()}
        for one in kept
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, lines[0] if lines else heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()
