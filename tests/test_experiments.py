"""The study of CIFAR-100: what it runs, keeps and compares."""

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path
from statistics import fmean

import pytest

from experiments import cifar100, table1
from experiments.study import Run, Study, priorities, write_result
from runs import ROOT
from training.classifier.config import parse_args
from training.errors import UsageError
from training.intervals import paired
from training.tuning.plan import parse as tuning
from training.tuning.table import figure_of

CIFAR = ROOT.parent / "shared" / "data"
needs_cifar = pytest.mark.skipif(
    not (CIFAR / "cifar100_train.npz").is_file(), reason="needs CIFAR-100 in ../shared/data"
)


def parsed(run: Run) -> Namespace:
    return parse_args(Study([run], Path("l"), Path("d")).command(run)[2:])


def test_the_plan_trains_every_run_after_those_it_needs():
    seen: set[str] = set()
    runs = cifar100.plan([4, 5, 6])
    for run in runs:
        assert seen.issuperset(run.needs), f"{run.name} comes before one of {run.needs}"
        seen.add(run.name)
        args = parsed(run)
        assert run.name.endswith(f"_s{args.seed}") and args.final and args.holdout == 2500
        teachers = {Path(place).name.rpartition("_")[2] for place in args.teachers}
        assert teachers <= {"s4"}, "the first seed's teachers teach every student"
    every_seed = [{run.name[:-3] for run in runs if run.name.endswith(f"_s{n}")} for n in (4, 5, 6)]
    assert every_seed[1] == every_seed[2] < every_seed[0]
    first = priorities(runs)
    assert max(first, key=first.get) == "teacher_s4"


def test_table_1_is_tuned_with_equal_trials_and_has_its_authors_means_untuned():
    *before, study, _ = table1.plan(jobs=2, trials=8, seeds=3)
    idle = {run.name for run in before} ^ set(study.needs) - {"data", "logs"}
    assert not idle, "a teacher is missing, or teaches nobody"
    plan = tuning(Study([*before, study], Path("l"), Path("d")).command(study)[2:])
    rows = {row.name: {weight.name for weight in row.weights} for row in plan.rows}
    assert rows["kd"] == rows["takd"] == rows["dgkd"] == {"lambda_kl", "tau"}
    assert rows["cifd"] == {"lambda_kl", "tau", "lambda_n", "lambda_emb", "lambda_i"}
    assert not any(weights for name, weights in rows.items() if name not in table1.OWN)


def test_table_1s_parts_have_the_weights_of_its_cifd_row_untuned(tmp_path):
    best = tmp_path / "table1" / "best" / "cifd.args"
    best.parent.mkdir(parents=True)
    weights = "--lambda-kl=0.5 --lambda-n=2 --lambda-emb=3 --lambda-i=0.1 --tau=5"
    best.write_text(f"--method cifd --teacher=t --rdm-bank=b --rates 7 {weights}\n")
    *_, study = table1.plan(jobs=2, trials=8, seeds=3)
    rows = tuning(Study([study], tmp_path, Path("d")).command(study)[2:]).rows
    assert not any(row.weights for row in rows)
    runs = {row.name: parse_args([*row.flags, "--model=cnn2", "--data=d"]) for row in rows}
    assert {run.lambda_kl for run in runs.values()} == {0.5}
    assert [len(runs[name].rates) for name in ("cifd3-noibm", "cifd1", "cifd5")] == [1, 1, 5]
    assert [run.ibm for run in runs.values()] == [False, True, True]


def test_table_1s_orderings_are_those_of_the_records():
    results = ROOT / "results" / "cifar100"
    text = table1.to_markdown(results)
    assert text == (results / "table1.md").read_text()
    scores = {
        row["row"]: list(row["scores"].values())
        for name in ("table1", "table6")
        for row in json.loads((results / f"{name}.json").read_text())["rows"]
    }
    _, _, _, _, *lines = text.partition("orderings")[2].strip().splitlines()
    assert len(lines) > len(table1.OWN)
    for line in lines:
        name, _, tuned, untuned = (cell.strip() for cell in line.split("|")[1:-1])
        one, other = name.split(" − ")
        mean = [
            row if row in scores and row in ("none", "kd-three") else f"{row}-mean"
            for row in (one, other)
        ]
        for shown, (mine, theirs) in ((tuned, (one, other)), (untuned, mean)):
            if shown:
                expected = fmean(scores[mine]) - fmean(scores[theirs])
                assert float(shown.split()[0]) == pytest.approx(expected, abs=0.006), name


def test_what_the_docs_say_of_table_1_is_in_its_records():
    results = ROOT / "results" / "cifar100"
    record = (results / "table1.md").read_text()
    assert record.partition("test top-1.\n\n")[2] in (ROOT / "docs" / "paper.md").read_text()
    page = (ROOT / "docs" / "results.md").read_text()
    section = page.partition("## Classifiers")[2].partition("Where students overfit")[0]
    scores = {
        row["row"]: f"{fmean(row['scores'].values()):.2f}"
        for name in ("table1", "table6")
        for row in json.loads((results / f"{name}.json").read_text())["rows"]
    }
    for row, label in {
        "none": "Student, 2 layers", "kd": "KD", "takd": "TAKD (3 TA)", "dgkd": "DGKD (3 TA)",
        "cifd1": "CIFD (1 RDM)", "cifd": "CIFD (3 RDM)", "cifd5": "CIFD (5 RDM)",
    }.items():  # fmt: skip
        cells = [label, f"{table1.PAPER[row]:.2f}", scores[row], scores.get(f"{row}-mean", "")]
        assert f"| {' | '.join(cells)} |".replace("|  |", "| |") in section
    difference = r"[+-]\d+\.\d\d ± \d\.\d\d"
    told = set(re.findall(difference, " ".join(section.split()).replace(" 4.60", " +4.60")))
    assert len(told) > 10 and told <= set(re.findall(difference, record))


def test_what_the_docs_say_of_choices_is_in_the_records_of_the_study_before_the_map():
    scores: dict[tuple[str, str], dict[int, float]] = {}
    for path in (ROOT / "results" / "clip_small" / "runs").glob("*.json"):
        record = json.loads(path.read_text())
        about = record["about"]
        metrics = [record["results"][name]["metrics"] for name in ("cifar100", "flickr8k")]
        score = 100 * fmean(figure_of(one) for one in metrics)
        key = about["question"], about["answer"]
        scores.setdefault(key, {})[about["seed"]] = score
    page = " ".join((ROOT / "docs" / "paper.md").read_text().split())
    told = [(question, answer) for question, answer in scores if question != "default"]
    for question, answer in told:
        default = "gap10-vit" if question == "IBM" else "gap10"
        found = paired(scores[question, answer], scores["default", default])
        if (question, answer) not in (("λ_I", "0.01"), ("projector", "separate")):
            assert f"{abs(found.mean):.2f} ± {found.half:.2f}" in page, (question, answer)
    assert len(told) == 20


@pytest.mark.parametrize("few", [0, 10_000])
def test_a_trials_epochs_and_images_are_those_of_every_run(few):
    for run in cifar100.plan([0], epochs=1, subset=256, few=few):
        args = parsed(run)
        assert (args.epochs, args.subset) == (1, 256), run.name


def test_a_study_with_all_its_results_says_so_and_trains_nothing(tmp_path, capsys, monkeypatch):
    results = shutil.copytree(ROOT / "results" / "cifar100", tmp_path / "results")
    command = [f"--results={results}", f"--logs={tmp_path / 'logs'}"]
    with pytest.raises(UsageError, match=r"--data .*nowhere holds no CIFAR-100"):
        cifar100.main([*command, f"--data={tmp_path / 'nowhere'}"])
    (tmp_path / "cifar-100-python").mkdir()
    command.append(f"--data={tmp_path}")
    runs = cifar100.plan([0, 1, 2])
    count = sum(len(run.results) for run in runs)
    sentence = (
        f"all {count} results are in {results} already; to make them again, give another --results"
    )
    assert cifar100.main([*command, "--dry-run"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"# {sentence}")
    monkeypatch.setattr("eval.report.main", lambda _: None)
    assert cifar100.main(command) == 0
    first, *text = capsys.readouterr().out.splitlines()
    assert first.startswith(sentence) and text[0].startswith("|")
    assert not (tmp_path / "logs").exists()
    (results / "runs" / "kd_s1.json").unlink()
    assert cifar100.main([*command, "--dry-run"]) == 0
    *left, cost = capsys.readouterr().out.splitlines()
    assert len(left) == 2 and all(run.startswith("python -m training.classify") for run in left)
    assert cost == "# 2 runs, about 32 core-minutes: training.classify 32"


def test_a_method_costs_what_its_whole_chain_took(tmp_path):
    study = Study(cifar100.plan([0, 1]), tmp_path / "logs", results=tmp_path)
    for run in study.runs.values():
        seed = int(run.name[-1])
        for path in study.kept(run).values():
            spent = {"training": {"cpu_seconds": 10.0 + 2 * seed}}
            write_result(path, spent | {"provenance": {"seed": seed}})
    costs = cifar100.costs(tmp_path)
    assert costs == pytest.approx(
        # Students of 11 s on average; assistants, made once, of 10.
        {"kd": 1, "takd": 41 / 11, "dgkd": 41 / 11, **{f"cifd{n}": 21 / 11 for n in (1, 3, 5)}}
    )
    (tmp_path / "runs" / "cnn4_takd_s0.json").unlink()
    assert set(cifar100.costs(tmp_path)) == set(costs) - {"takd"}


def test_rows_of_the_study_are_compared_seed_by_seed(tmp_path):
    for name, gains in {"kd": (0, 0, 0), "cifd3": (1, 2, 3), "cifd3_noibm": (2, 1, 1)}.items():
        for seed, gain in enumerate(gains):
            metrics = {"acc1": 0.4 + 0.1 * seed + gain / 100}
            result = {"metrics": metrics, "train_metrics": metrics}
            result["provenance"] = {"seed": seed}
            write_result(tmp_path / "runs" / f"{name}_s{seed}.json", result)
    rows = {
        line.split("|")[1].strip(): line for line in cifar100.to_markdown(tmp_path).splitlines()
    }
    assert rows["CIFD (3 RDM)"] == (
        "| CIFD (3 RDM) | 3 | 52.00 ± 11.00 | +2.00 ± 2.48 | +0.67 ± 3.79 | 52.0 |"
    )
    assert "TAKD (3 TA)" not in rows
