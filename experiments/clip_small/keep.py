"""What is kept of a run: its figures, and everything they depend on."""

import json
import shlex
from pathlib import Path
from typing import Any

from experiments.clip_small.plan import Plan
from experiments.runs import Run, curve, is_finished, write_json
from training.clip.config import parse_args, parser
from training.engine.run import RunDirectory, resolved_config
from training.errors import Failure


def keep_result(plan: Plan, run: Run, data: Path, logs: Path, results: Path) -> None:
    """Write the kept result of a finished evaluation, unless it is there.

    Raises:
        UsageError: the student's run directory was made with other settings.
        Failure: the evaluation left no result of a data set, or several.
    """
    kept = run.kept(results).get("result.json")
    if kept is None or kept.is_file() or not is_finished(run, logs):
        return
    trained = plan.by_name[run.about["run"]]
    directory = logs / trained.name
    config = resolved_config(parse_args(trained.command(data, logs)[2:]), 1)
    RunDirectory(directory, config, parser(), resume=True)
    made = _read(directory / "environment.json")
    content = {
        "flags": run.depends,
        "about": run.about,
        "commands": [shlex.join(["python", *one.command(data, logs)]) for one in (trained, run)],
        "commits": sorted({str(entry["commit"]) for entry in made}),
        "environment": made[-1],
        "data": _read(directory / "data.json"),
        "taught_by": _read(directory / "teachers.json"),
        "seconds": {
            name: _read(logs / name / "finished.json")["seconds"]
            for name in plan.chain(trained.name)
        },
        "curve": curve(directory, ("step", "loss")),
        "results": evaluated(directory / "results", run),
    }
    write_json(kept, content)


def evaluated(folder: Path, run: Run) -> dict[str, dict[str, Any]]:
    """Data set → what an evaluation found on it."""
    start = run.flags.index("--datasets") + 1
    split = next(flag for flag in run.flags if flag.startswith("--split="))[8:]
    wanted = [flag for flag in run.flags[start:] if not flag.startswith("--")]
    found: dict[str, list[dict]] = {name: [] for name in wanted}
    for path in sorted(folder.glob("*.json")):
        result = _read(path)
        if result["provenance"]["split"] == split:
            found[result["dataset"]].append(result)
    for name, results in found.items():
        if len(results) != 1:
            raise Failure(
                f"{folder} holds {len(results)} results on {name} ({split}), expected one: "
                "move what is of other data away"
            )
    return {name: results[0] for name, results in found.items()}


def read_results(results: Path) -> list[dict[str, Any]]:
    """Everything kept, by file name."""
    return [_read(path) for path in sorted((results / "runs").glob("*.json"))]


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


def _read(path: Path) -> Any:
    return json.loads(path.read_text())
