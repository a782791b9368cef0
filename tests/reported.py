"""Runs and results as the commands leave them, for tests of what the report makes of them."""

import json
from dataclasses import replace
from pathlib import Path

from cifd_clip.files import write_json
from training.classifier import config as classifier_config
from training.clip import flags as clip_config
from training.engine import result
from training.engine.config import FORMAT, record
from training.engine.result import Provenance, Result, Training

SIZES = {"image": 34_304, "text": 15_329, "token_table": 1_581_056}


def clip_run(logs: Path, name: str, method: str, **given) -> Path:
    """The run directory of a `training.main` that has ended, without results."""
    run = logs / name
    flags = {"train_data": "shards", "distill": method, "name": name, "global_batch": 10}
    if method != "none":
        flags |= {"distill_model": "ViT-L-14", "distill_pretrained": "datacomp_xl_s13b_b90k"}
    config = clip_config.resolve({**flags, **given})
    write_json(run / "config.json", record(config), FORMAT)
    rates = list(config.rates)
    banks = [{"rates": rates, "hidden": [8] * 3, "teacher": {}}] if rates else []
    write_json(run / "teachers.json", {"teachers": [], "banks": banks}, FORMAT)
    write_json(run / "finished.json", {"samples": 96_000_000, "seconds": 12.3}, FORMAT)
    write_json(run / "data.json", {"usable": 3_000_000}, FORMAT)
    return run


def zero_shot(model: str, dataset: str, metrics: dict, task: str = "classification", **provenance):
    """A result of `eval.benchmark`."""
    known = {
        "weights": f"{model}-weights", "data": {"test": "d" * 64}, "precision": "fp32",
        "parameters": SIZES, "held": {"images": 3}, "protocol": "whole",
        "versions": {"torch": "2.9"},
    }  # fmt: skip
    return Result(
        task=f"zeroshot_{task}",
        dataset=dataset,
        split="test",
        model=model,
        metrics=metrics,
        provenance=Provenance(**{**known, **provenance}),
    )


def classifier(
    student: str | None,
    method: str,
    acc1: float | None,
    seed: int = 0,
    teacher: str = "cnn10",
    rates=(),
    dataset: str = "cifar100",
    name: str = "",
    provenance: dict | None = None,
    settings: dict | None = None,
    **training,
) -> Result:
    """A result of `training.classify`; an acc1 of None: the test split was not looked at."""
    name = name or f"{method}-{student}-seed{seed}"
    config = record(replace(classifier_config.Config(), seed=seed, name=name))
    return Result(
        task="classification",
        dataset=dataset,
        split="test",
        model=name,
        metrics=None if acc1 is None else {"acc1": acc1, "acc5": 0.9},
        train_metrics={"acc1": 0.99},
        training=Training(
            method=method,
            student=student,
            teacher=None if method == "none" else teacher,
            rates=tuple(map(float, rates)),
            settings={**config, **(settings or {})},
            steps=1,
            seconds=1.0,
            cpu_seconds=1.0,
            **training,
        ),
        provenance=Provenance(seed=seed, **(provenance or {})),
    )


def keep(folder: Path, results: list[Result]) -> Path:
    """A study's folder with these results."""
    for number, one in enumerate(results):
        result.write(folder / "runs" / f"{number}.json", one)
    return folder


def change(path: Path, **changes) -> None:
    """Change a JSON file; of a dict, some keys."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(content.get(key), dict)
        content[key] = {**content[key], **value} if both else value
    path.write_text(json.dumps(content))
