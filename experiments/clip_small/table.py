"""The study's tables, from its kept results alone."""

import csv
import io
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from eval.cost import gpu_hours
from eval.tables import markdown
from experiments.clip_small.keep import figures, score
from experiments.clip_small.plan import DEFAULT, METHODS, MODELS, STUDENTS, Scale
from experiments.seeds import paired, summarise, told

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


def summaries(kept: Iterable[Kept], scale: Scale) -> list[dict[str, Any]]:
    """A row for each student and method, with the teachers first."""
    groups, rows = _of_students(kept), []
    for model in ("teacher", *STUDENTS):
        of_baseline = _by_seed(groups.get((model, BASELINE), {}))
        for method in ("teacher", *METHODS):
            runs = groups.get((model, method))
            if not runs:
                continue
            values = _by_seed(runs)
            row = {
                "student": model,
                "method": method,
                "seeds": sorted(runs),
                "figures": {k: summarise([v[k] for v in values.values()]) for k in SHOWN},
                "seconds": _seconds(runs.values()),
                "data": sorted({one["data"]["hash"] for one in runs.values()}),
                "commits": sorted({c for one in runs.values() for c in one["commits"]}),
                "commands": [c for _, one in sorted(runs.items()) for c in one["commands"]],
            }
            if model != "teacher":
                row["cost"] = costs(scale, method, model, runs[min(runs)]["data"]["usable"])
                row[f"minus_{BASELINE}"] = {
                    name: paired(_of(values, name), _of(of_baseline, name)) for name in COMPARED
                }
            rows.append(row)
    return rows


def parts(kept: Iterable[Kept]) -> list[dict[str, Any]]:
    """A row for each student and part of CIFD: what it brings, paired by seed."""
    groups, rows = _of_students(kept), []
    for model in STUDENTS:
        for part, (method, without) in PARTS.items():
            a, b = (_by_seed(groups.get((model, name), {})) for name in (method, without))
            if a.keys() & b.keys():
                row = {"student": model, "part": part, "method": method, "without": without}
                row["brings"] = {name: paired(_of(a, name), _of(b, name)) for name in SHOWN}
                rows.append(row)
    return rows


def _of_students(kept: Iterable[Kept]) -> dict[tuple[str, str], dict[int, Kept]]:
    """(student, method) → seed → what is kept of it."""
    groups: dict[tuple[str, str], dict[int, Kept]] = {}
    for one in kept:
        about = one["about"]
        if about["stage"] == "students":
            groups.setdefault((about["student"], about["method"]), {})[about["seed"]] = one
    return groups


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
    teachers = [f"{scale.models}-teacher"] * row.teachers
    flags = [
        f"--distill={row.distill}", f"--model={scale.models}-{model}", *row.flags, "--views=4",
        f"--batch-size={scale.batch}", f"--train-num-samples={scale.samples}", "--captions=all",
        f"--epochs={scale.student}", f"--rdm-epochs={scale.bank}",
        "--model-config", *(f"{MODELS}/{scale.models}-{name}.json" for name in ("teacher", model)),
    ]  # fmt: skip
    if row.rates:
        flags += ["--rates", *(f"{rate:g}" for rate in row.rates)]
    if teachers:
        flags.append("--distill-model=" + ",".join(teachers))
        flag = "--teacher-cache" if cached else "--distill-pretrained"
        flags.append(f"{flag}=" + ",".join("any" for _ in teachers))
    return flags


def _by_seed(runs: dict[int, Kept]) -> dict[int, dict[str, float]]:
    return {seed: figures(one) for seed, one in sorted(runs.items())}


def _of(values: dict[int, dict[str, float]], name: str) -> dict[int, float]:
    return {seed: value[name] for seed, value in values.items()}


def _seconds(runs: Iterable[Kept]) -> dict[str, float]:
    """Mean seconds of the student, and of what it needs beside its teachers."""
    runs = list(runs)
    own = fmean(one["seconds"][one["about"]["run"]] for one in runs)
    parts = {"student": own}
    for kind in ("cache", "bank"):
        spent = [
            sum(s for name, s in one["seconds"].items() if name.startswith(kind)) for one in runs
        ]
        parts[kind] = fmean(spent)
    return parts


def answers(kept: Iterable[Kept]) -> list[dict[str, Any]]:
    """A row for each answer to an open choice, on held-out training data, the defaults first."""
    groups: dict[tuple[str, str, str], dict[int, Kept]] = {}
    for one in kept:
        about = one["about"]
        if about["stage"] == "choices":
            key = about["question"], about["student"], about["answer"]
            groups.setdefault(key, {})[about["seed"]] = one
    default = {
        model: _judged(runs) for (question, model, _), runs in groups.items() if question == DEFAULT
    }
    rows = []
    for (question, model, answer), runs in groups.items():
        values = _by_seed(runs)
        banks = [one["taught_by"]["bank"] or {} for one in runs.values()]
        rates = {tuple(bank.get("rates", ())) for bank in banks}
        rows.append(
            {
                "question": question,
                "student": model,
                "answer": answer,
                "seeds": sorted(runs),
                "rates": [list(one) for one in sorted(rates)],
                "figures": {k: summarise([v[k] for v in values.values()]) for k in SHOWN},
                "score": summarise(list(_judged(runs).values())),
                f"minus_{DEFAULT}": paired(_judged(runs), default.get(model, {})),
            }
        )
    return sorted(rows, key=lambda row: (row["question"] != DEFAULT, row["question"]))


def _judged(runs: dict[int, Kept]) -> dict[int, float]:
    return {seed: score(one) for seed, one in runs.items()}


def to_markdown(
    rows: list[dict], brought: list[dict], found: list[dict], tuned: dict | None
) -> str:
    """The tables as GitHub Markdown, with what their figures mean."""
    lines = [["student", "method", "n"]]
    for name, head in SHOWN.items():
        lines[0] += [head, f"− {BASELINE}"] if name in COMPARED else [head]
    lines[0] += ["min", "cost, live", "cost, cached"]
    lines.append(["---", "---", *["---:"] * (len(lines[0]) - 2)])
    for row in rows:
        line = [row["student"], row["method"], str(len(row["seeds"]))]
        for name in SHOWN:
            line.append(told(row["figures"][name]))
            if name in COMPARED:
                line.append(_difference(row, name))
        line.append(f"{row['seconds']['student'] / 60:.1f}")
        cost = row.get("cost")
        line += [f"{cost['live']:.2f}", f"{cost['cached']:.2f}"] if cost else ["", ""]
        lines.append(line)
    text = ["# CIFAR-100 and Flickr8k\n"]
    if rows:
        text.append(
            "\nPercent on test data: zero-shot top-1, and recall at 1, 5 and 10 both ways (their "
            "mean; at 1 alone). Mean ± sample standard deviation over n seeds; "
            f"− {BASELINE}: the paired difference by seed ± its standard error. Gap: as many "
            "training samples minus test. min: wall minutes of a student's training from the "
            "cache. Cost: counted training cost beside the teacher's own, × plain CLIP, with a "
            "live teacher and with the cache (included). kd and tinyclip minimise one loss up to "
            "a factor of two, which AdamW cancels."
            "\n\n" + markdown(lines)
        )
    if tuned:
        weights = ", ".join(f"{method} {value:g}" for method, value in tuned["weights"].items())
        text.append(
            f"\nTuned on held-out training pairs (student gap10, seed 0): learning rate "
            f"{tuned['lr']:g} for all; weights: {weights}. kd, fd, tinyclip and none have none.\n"
        )
    if brought:
        lines = [["student", "part", "methods", *SHOWN.values()]]
        lines.append(["---"] * 3 + ["---:"] * (len(lines[0]) - 3))
        for row in brought:
            methods = f"{row['method']} − {row['without']}"
            brings = [told(row["brings"][name]) for name in SHOWN]
            lines.append([row["student"], row["part"], methods, *brings])
        text.append(
            "\n## What each part of CIFD brings\n\nOn test data; paired differences by seed ± "
            "their standard error. Each method has its own tuned λ_CL.\n\n" + markdown(lines)
        )
    if found:
        lines = [["question", "student", "answer", "n", "score", "− default", *SHOWN.values()]]
        lines.append(["---"] * 3 + ["---:"] * (len(lines[0]) - 3))
        for row in found:
            line = [row["question"], row["student"], row["answer"], str(len(row["seeds"]))]
            difference = told(row[f"minus_{DEFAULT}"]) if row["question"] != DEFAULT else ""
            line += [told(row["score"]), difference]
            line += [told(row["figures"][k]) for k in SHOWN]
            lines.append(line)
        text.append(
            "\n## Open choices of cifd3\n\nOn held-out training pairs, not test; score: the mean "
            "of top-1 and mean recall; − default: its paired difference by seed ± its standard "
            "error.\n\n" + markdown(lines)
        )
    return "".join(text)


def to_csv(kept: Iterable[Kept]) -> str:
    """Every run's figures, unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = ("stage", "question", "answer", "student", "method", "seed", "weight", "lr")
    names: list[str] = []
    lines = []
    for one in kept:
        values = figures(one)
        names = names or list(values)
        about = [one["about"].get(head, "") for head in heads]
        lines.append([*about, *(f"{values[name]:.4f}" for name in names)])
    writer.writerows([[*heads, *names], *lines])
    return out.getvalue()


def _difference(row: dict, name: str) -> str:
    value = row.get(f"minus_{BASELINE}", {}).get(name)
    return "" if value is None or row["method"] == BASELINE else told(value)
