"""What a study has found: a table, a figure, and a flag file of each row's best weights."""

import json
import shlex
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cifd_clip.files import write_json, write_text, writing
from training.engine.environment import environment
from training.engine.flags import spelled
from training.engine.run import read_run
from training.intervals import paired
from training.tuning.plan import Plan, Row, row_flags

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = 1  # of table.json
OURS = ("number", "values", "worker", "process")  # what is kept of a trial beside its figures


def write_table(plan: Plan, studies: dict[str, tuple[Any, Any]]) -> str:
    """Write ``table.json``, ``table.md``, ``difference.png`` and ``best/ROW.args``.

    Args:
        plan: the study, finished.
        studies: of each row, Optuna's study of its trials and that of its new seeds.

    Returns:
        The table as Markdown.
    """
    records = [record(plan, row, *studies[row.name]) for row in plan.rows]
    baseline = next(r for r in records if r["row"] == plan.against)
    for entry in records:
        difference = None if entry is baseline else paired(entry["scores"], baseline["scores"])
        entry["difference"] = difference and difference._asdict()
        entry["shown"] = "" if difference is None else str(difference)
    for row, entry in zip(plan.rows, records):
        file = plan.folder / "best" / f"{row.name}.args"
        write_text(file, flag_file(row_flags(row, entry["best"]), plan.name))
    content = {"against": plan.against, "rows": records, "settings": plan.settings}
    content |= {"data": data(plan), "environment": environment()}
    content = json.loads(json.dumps(content))
    write_json(plan.folder / "table.json", content, FORMAT)
    heads, *rows = lines(content)
    marks = ["---", *["---:"] * (len(heads) - 2), "---"]
    table = "".join(f"| {' | '.join(line)} |\n" for line in (heads, marks, *rows))
    text = f"# {plan.folder.name}\n\n{explanation(content)}\n\n{table}"
    write_text(plan.folder / "table.md", text)
    if len(records) > 1:
        with writing(plan.folder / "difference.png") as file:
            figure(content).savefig(file, format="png", dpi=150)
    return text


def flag_file(flags: list[str], study: str) -> str:
    """What ``@FILE`` on a command line reads."""
    return "".join(f"{line}\n" for line in [*map(shlex.quote, flags), f"# of the study {study}"])


def record(plan: Plan, row: Row, trials: Any, final: Any) -> dict[str, Any]:
    """Everything about a row: its trials, its best weights, and what new seeds gave."""
    finished = sorted(
        (t for t in trials.get_trials() if t.state.name in ("COMPLETE", "PRUNED")),
        key=lambda trial: trial.user_attrs["number"],
    )
    scores = [t.value if t.state.name == "COMPLETE" else None for t in finished]
    runs = {t.user_attrs["number"]: t for t in final.get_trials() if t.state.name == "COMPLETE"}
    own = ({k: v for k, v in t.user_attrs.items() if k not in OURS} for t in runs.values())
    figures = [f for f in own if f]  # a run that has diverged has none
    best = plan.best(row, trials)
    return {
        "row": row.name,
        "flags": list(row.flags),
        "best": best,
        "on_edge": [w.name for w in row.weights if w.on_edge(best[w.name])],
        "importance": importance(trials) if len({*scores} - {None}) > 3 else {},
        "trials": [{"values": t.params, "score": s} for t, s in zip(finished, scores)],
        "scores": {plan.seed + 1 + n: runs[n].value for n in sorted(runs)},
        "figures": {n: 100 * fmean(f[n] for f in figures) for n in (figures or [{}])[0]},
    }


def figure_of(metrics: dict[str, float]) -> float:
    """What stands for a data set's zero-shot metrics, as a fraction: mean recall, or top-1."""
    recalls = [value for name, value in metrics.items() if "_retrieval_recall" in name]
    return fmean(recalls) if recalls else metrics["acc1"]


def importance(trials: Any) -> dict[str, float]:
    """Each weight's share of the trials' variance, by Optuna."""
    import optuna

    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(trials, evaluator=evaluator)


def data(plan: Plan) -> dict[str, Any]:
    """The fingerprint of the training data, from one of the runs."""
    return read_run(plan.folder / "runs" / f"{plan.rows[0].name}-s00", "data.json")


def lines(content: dict[str, Any]) -> list[list[str]]:
    """Heads and cells of the table that a ``table.json`` holds."""
    names = list(dict.fromkeys(name for row in content["rows"] for name in row["figures"]))
    heads = ["row", "n", "score", f"− {content['against']}", *names, "trials", "best weights"]
    return [heads] + [
        [
            r["row"],
            str(len(r["scores"])),
            f"{fmean(r['scores'].values()):.2f}",
            r["shown"],
            *(f"{r['figures'][n]:.2f}" if n in r["figures"] else "" for n in names),
            str(len(r["trials"])),
            ", ".join(_weight(r, name) for name in r["best"]) or "none",
        ]
        for r in content["rows"]
    ]


def explanation(content: dict[str, Any]) -> str:
    """What the table means."""
    pruned, margin = content["settings"]["prune"], content["settings"].get("margin")
    tuned = any(row["trials"] for row in content["rows"])
    return (
        "Score: the mean of the figures, percent, over n new seeds; "
        f"− {content['against']}: the paired difference by seed ± half of its 95 % t-interval."
        + " A row with weights had as many trials of them as every other; held-out training "
        "samples chose the best. (edge): it lies at an end of the span that was tried. In "
        "brackets: the weight's share of the variance over trials (fANOVA)."
        * tuned
        + f" Defaults stayed where no trial was ahead of them by more than {margin} points."
        * bool(margin)
        + " Trials that fell behind were ended early." * pruned
    )


def _weight(record: dict[str, Any], name: str) -> str:
    """A row's best value of a weight, and what the trials say of it."""
    edge, share = " (edge)" * (name in record["on_edge"]), record["importance"].get(name)
    return f"{spelled(name)} {record['best'][name]:g}{edge}" + (
        "" if share is None else f" [{100 * share:.0f} %]"
    )


def figure(content: dict[str, Any]) -> "Figure":
    """The differences to the row that all are compared with, and their intervals."""
    from matplotlib.figure import Figure

    shown = [r for r in reversed(content["rows"]) if r["difference"]]
    figure = Figure(figsize=(6, 1 + 0.35 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, entry in enumerate(shown):
        mean, half, _ = entry["difference"].values()
        axes.errorbar(mean, place, xerr=half or 0.0, fmt="o", color="#1f5fa8", capsize=3)
    axes.axvline(0, color="0.6", linewidth=1)
    axes.set_yticks(range(len(shown)), [entry["row"] for entry in shown])
    against = content["against"]
    axes.set_xlabel(f"difference to {against}, points of the score (95 % interval)")
    return figure
