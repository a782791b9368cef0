"""Results: one schema, written once and read back, and nothing else taken for one."""

import csv
import json
import math
import sys
from dataclasses import replace

import pytest
from clip_benchmark import cli as clip_benchmark

from cifd_clip.files import BadFile
from training.engine import result
from training.engine.environment import environment
from training.engine.result import (
    BankResult,
    EmbeddingMap,
    Provenance,
    Reconstruction,
    Result,
    Training,
)

ZERO_SHOT = Result(
    task="zeroshot_classification",
    dataset="digits",
    split="test",
    model="cifd",
    pretrained="0123456789",
    metrics={"acc1": 0.5, "acc5": None},
    provenance=Provenance(
        command="python -m eval.benchmark",
        commit="c" * 40,
        weights="w" * 64,
        data={"test": "d" * 64},
        held={"images": 3},
        preprocessing={"size": 32, "mean": [0.5] * 3},
    ),
)
TRAINING = Training(
    method="cifd",
    student="cnn2",
    teacher="cnn10",
    rates=(10.0, 100.0),
    ibm=True,
    settings={"lr": 0.1},
    steps=3,
    seconds=1.5,
    cpu_seconds=2.5,
)
BANK = BankResult(
    task="classification",
    dataset="cifar100",
    split="test",
    model="rdm",
    teacher={"acc1": 0.6},
    assistants=(Reconstruction(rate=10.0, bits={"image": 2.5}, metrics={"acc1": 0.5}),),
    map=EmbeddingMap(classes=("a", "b"), labels=(0, 1), points={"teacher": ((0.0, 1.0),) * 2}),
    provenance=Provenance(seed=0),
)


@pytest.mark.parametrize("written", [ZERO_SHOT, BANK], ids=lambda one: type(one).__name__)
def test_what_is_read_is_what_was_written(written, tmp_path):
    result.write(tmp_path / "r.json", written)
    assert result.read(tmp_path / "r.json", type(written)) == written


def test_a_classifiers_result_says_who_made_it_and_with_what(tmp_path):
    metrics = {"metrics": None, "holdout_metrics": {"acc1": 0.4}, "train_metrics": {"acc1": 0.9}}
    made = environment()
    written = result.of_classifier(
        dataset="cifar100", model="cifd_s1", training=TRAINING, measured=metrics,
        environment=made, seed=1, weights="w" * 64, teachers=("t" * 64,), data={"train": "d"},
    )  # fmt: skip
    result.write(tmp_path / "r.json", written)
    again = result.read(tmp_path / "r.json")
    assert again == written and again.metrics is None and again.pretrained == "w" * 10
    assert (again.provenance.command, again.provenance.seed) == (made["command"], 1)
    assert again.provenance.versions == made["packages"]
    assert again.provenance.machine["processor"] == made["processor"]


def test_clip_benchmarks_own_table_is_built_of_zero_shot_results(tmp_path, monkeypatch):
    result.write(tmp_path / "results" / "r.json", ZERO_SHOT)
    command = ["clip_benchmark", "build", str(tmp_path / "results"), "--output"]
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "table.csv")])
    clip_benchmark.main()
    with open(tmp_path / "table.csv") as file:
        (row,) = csv.DictReader(file)
    assert row["model_fullname"] == "cifd 0123456789"
    assert (row["dataset"], row["task"], row["language"]) == (
        "digits", "zeroshot_classification", "en",
    )  # fmt: skip
    assert (row["acc1"], row["acc5"]) == ("0.5", "")


def test_what_a_study_keeps_beside_a_result_is_left_alone(tmp_path):
    result.write(tmp_path / "r.json", ZERO_SHOT)
    content = json.loads((tmp_path / "r.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps({**content, "flags": ["--lr=1"]}))
    assert result.read(tmp_path / "r.json") == ZERO_SHOT


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, "has format 2, this version of cifd_clip reads format 1"),
        ({"format": None}, "has format None"),
        ({"dataset": None}, "dataset is 'None', expected str"),
        ({"metrics": {"acc1": "0.5"}}, r"metrics\.acc1 is '0\.5', expected a finite number"),
        ({"metrics": {"acc1": True}}, r"metrics\.acc1 is 'True', expected a finite number"),
        ({"metrics": {"acc1": math.nan}}, r"metrics\.acc1 is 'nan', expected a finite number"),
        ({"metrics": [0.5]}, r"metrics is '\[0\.5\]', expected"),
        ({"provenance": {"seed": 1.5}}, r"provenance\.seed is '1\.5', expected int"),
        ({"provenance": {"teachers": "abc"}}, r"provenance\.teachers is 'abc', expected"),
        ({"training": {"method": "kd"}}, "training lacks 'settings'"),
    ],
    ids=str,
)
def test_what_is_no_result_is_refused_in_a_sentence(change, reason, tmp_path):
    result.write(tmp_path / "r.json", ZERO_SHOT)
    content = json.loads((tmp_path / "r.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(BadFile, match=reason):
        result.read(tmp_path / "r.json")


def test_a_result_that_lacks_a_key_is_refused_by_its_name(tmp_path):
    result.write(tmp_path / "r.json", ZERO_SHOT)
    content = json.loads((tmp_path / "r.json").read_text())
    del content["split"]
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(BadFile, match=r"r\.json is no Result: it lacks 'split'"):
        result.read(tmp_path / "r.json")


def test_figures_that_are_no_numbers_are_never_written(tmp_path):
    with pytest.raises(BadFile, match=r"metrics\.acc1 is 'nan'"):
        result.write(tmp_path / "r.json", replace(ZERO_SHOT, metrics={"acc1": math.nan}))
    assert not (tmp_path / "r.json").exists()


def test_a_map_without_a_point_for_each_image_is_refused(tmp_path):
    result.write(tmp_path / "r.json", BANK)
    content = json.loads((tmp_path / "r.json").read_text())
    for change in ({"labels": [0]}, {"labels": [0, 7]}, {"points": {"10": [[0, 1]] * 2}}):
        damaged = {**content, "map": {**content["map"], **change}}
        (tmp_path / "r.json").write_text(json.dumps(damaged))
        with pytest.raises(BadFile, match=r"map .*expected"):
            result.read(tmp_path / "r.json", BankResult)
