"""What is kept of a run: its figures, and everything they depend on."""

from pathlib import Path
from typing import Any

from cifd_clip.files import read_json
from experiments.clip_small.plan import Plan
from experiments.study import Run, Study, curve, read_result, write_result
from training.engine.run import read_run
from training.errors import Failure


def keep_result(plan: Plan, study: Study, run: Run) -> None:
    """Write the kept result of a finished evaluation, unless it is there.

    Raises:
        Failure: the evaluation left no result of a data set, or several.
    """
    kept = study.kept(run).get("result.json")
    if kept is None or kept.is_file():
        return
    trained = plan.by_name[run.about["run"]]
    directory = study.logs / trained.name
    environments = read_run(directory, "environment.json")["starts"]
    finished = {name: study.logs / name / "finished.json" for name in plan.chain(trained.name)}
    content = {
        "flags": run.depends,
        "about": run.about,
        "commands": [study.spelled(one) for one in (trained, run)],
        "commits": sorted({str(entry["commit"]) for entry in environments}),
        "environment": environments[-1],
        "data": read_run(directory, "data.json"),
        "taught_by": read_run(directory, "teachers.json"),
        "seconds": {name: read_json(path)["seconds"] for name, path in finished.items()},
        "curve": curve(directory, ("step", "loss")),
        "results": evaluated(directory / "results", run),
    }
    write_result(kept, content)


def evaluated(folder: Path, run: Run) -> dict[str, dict[str, Any]]:
    """Data set → the result of an evaluation on it."""
    start = run.flags.index("--datasets") + 1
    split = next(flag for flag in run.flags if flag.startswith("--split="))[8:]
    wanted = [flag for flag in run.flags[start:] if not flag.startswith("--")]
    by_dataset: dict[str, list[dict]] = {name: [] for name in wanted}
    for result in map(read_result, sorted(folder.glob("*.json"))):
        if result["split"] == split:
            by_dataset[result["dataset"]].append(result)
    for name, results in by_dataset.items():
        if len(results) != 1:
            raise Failure(
                f"{folder} holds {len(results)} results on {name} ({split}), expected one: "
                "move what is of other data away"
            )
    return {name: results[0] for name, results in by_dataset.items()}


def figures(kept: dict[str, Any]) -> dict[str, float]:
    """The figures of a kept result, in percent.

    ``top1``: zero-shot on CIFAR-100; ``recall``: the mean on Flickr8k of recall at 1, 5 and 10
    both ways; ``R@1``: of both ways; ``gap_*``: how much better each is on training samples.
    """
    values = {}
    for suffix in ("", "_seen"):
        retrieval = kept["results"][f"flickr8k{suffix}"]["metrics"]
        first = [v for k, v in retrieval.items() if k.endswith("@1")]
        values[f"top1{suffix}"] = 100 * kept["results"][f"cifar100{suffix}"]["metrics"]["acc1"]
        values[f"recall{suffix}"] = 100 * sum(retrieval.values()) / len(retrieval)
        values[f"R@1{suffix}"] = 100 * sum(first) / len(first)
    for name in ("top1", "recall"):
        values[f"gap_{name}"] = values[f"{name}_seen"] - values[name]
    return values


def score(kept: dict[str, Any]) -> float:
    """What tuning maximises: the mean of ``top1`` and ``recall`` on held-out training data."""
    values = figures(kept)
    return (values["top1"] + values["recall"]) / 2
