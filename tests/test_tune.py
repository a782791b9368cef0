"""Every row gets the same trials; a study goes on where it was stopped, and ends with new seeds."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from cifd_clip.files import BadFile, write_json
from cifd_clip.methods import DECLARED
from eval import report
from runs import ROOT
from training.errors import UsageError
from training.tune import main
from training.tuning.plan import parse
from training.tuning.queue import Queue
from training.tuning.work import check_settings

CIFAR = ROOT.parent / "shared" / "data"
needs_cifar = pytest.mark.skipif(
    not (CIFAR / "cifar100_train.npz").is_file(), reason="needs CIFAR-100 in ../shared/data"
)
optuna = pytest.importorskip("optuna", reason="needs the extra `tune`")


ROWS = ["none", "fd", "clipkd", "ibm=--distill fd --ibm"]
FEW = ["none", "fd", "clipkd"]  # what is executed: every run takes seconds


def study(flags, teacher, logs, name="study", *more, methods=FEW):
    rows = ["--methods", *methods]
    size = ["--trials", "2", "--seeds", "2", "--against", methods[0], "--logs", str(logs)]
    runs = [*flags, "--distill-model", teacher, "--val-fraction", "0.3"]
    return [*rows, *size, "--name", name, *more, "--", *runs]


def table(logs, name="study"):
    content = json.loads((logs / name / "table.json").read_text())
    return {row["row"]: row for row in content["rows"]}


def test_every_row_tries_its_defaults_and_then_as_many_values_of_its_own_weights(
    flags, teacher, tmp_path
):
    plan = parse(study(flags, teacher, tmp_path, methods=ROWS))
    none, fd, clipkd, ibm = plan.rows
    assert none.trials(3, 0) == fd.trials(3, 0) == [], "what has no weight needs no trial"
    assert [w.name for w in ibm.weights] == ["lambda_i"]
    tried = clipkd.trials(3, 0)
    defaults = {o.name: o.default for o in DECLARED["clipkd"].options if o.span}
    assert tried[0] == {k: defaults[k] for k in ("lambda_crd", "lambda_icl", "lambda_fd")}
    assert len(tried) == 3 and tried != clipkd.trials(3, 1)
    assert clipkd.trials(5, 0)[:3] == tried, "more trials leave those that were made"
    for values in tried:
        assert all(w.low <= values[w.name] <= w.high for w in clipkd.weights)


def test_defaults_stay_unless_a_trial_is_clearly_ahead_of_them(flags, teacher, tmp_path):
    scores = {1e-4: 30.0, 1e-3: 31.5, 1e-5: 29.0}  # the first is the default
    trials = optuna.create_study(direction="maximize")
    spans = {"lambda_i": optuna.distributions.FloatDistribution(1e-6, 1e-2, log=True)}
    for value, score in scores.items():
        trials.add_trial(
            optuna.trial.create_trial(params={"lambda_i": value}, distributions=spans, value=score)
        )
    for margin, expected in (("0", 1e-3), ("1.4", 1e-3), ("1.6", 1e-4)):
        words = study(flags, teacher, tmp_path, "study", "--margin", margin, methods=ROWS)
        plan = parse(words)
        assert plan.best(plan.rows[3], trials) == {"lambda_i": expected}, margin
        assert plan.best(plan.rows[0], trials) == {}
    with pytest.raises(UsageError, match="--margin -1: expected points"):
        parse(study(flags, teacher, tmp_path, "study", "--margin=-1"))


def test_a_value_at_an_end_of_its_span_is_on_the_edge(flags, teacher, tmp_path):
    (weight,) = parse(study(flags, teacher, tmp_path, methods=ROWS)).rows[3].weights
    assert weight.on_edge(weight.low * 1.1) and weight.on_edge(weight.high)
    assert not weight.on_edge((weight.low * weight.high) ** 0.5)


@pytest.fixture(scope="module")
def finished(flags, teacher, tmp_path_factory):
    logs = tmp_path_factory.mktemp("tune")
    assert main(study(flags, teacher, logs, "study", "--jobs", "2")) == 0
    return logs


def test_a_study_ends_with_scores_of_new_seeds_and_flags_of_the_best_weights(finished):
    rows = table(finished)
    assert list(rows) == FEW
    for row in rows.values():
        assert list(row["scores"]) == ["1", "2"], "trials had seed 0"
    assert rows["none"]["difference"] is None and rows["clipkd"]["difference"]["n"] == 2
    assert [len(row["trials"]) for row in rows.values()] == [0, 0, 2]
    scores = [trial["score"] for trial in rows["clipkd"]["trials"]]
    best = rows["clipkd"]["trials"][scores.index(max(scores))]["values"]
    assert best == rows["clipkd"]["best"]
    flags = (finished / "study" / "best" / "clipkd.args").read_text()
    assert f"--lambda-fd={best['lambda_fd']:g}" in flags
    run = json.loads((finished / "study" / "runs" / "clipkd-s00" / "config.json").read_text())
    assert run["lambda_fd"] == best["lambda_fd"] and run["seed"] == 1
    assert (finished / "study" / "difference.png").stat().st_size > 1000
    assert "| clipkd | 2 |" in (finished / "study" / "table.md").read_text()


def test_a_study_is_a_section_of_the_report(finished, tmp_path):
    page = tmp_path / "r.html"
    report.main([str(finished / "study"), "--out", str(page)])
    table = (finished / "study" / "table.md").read_text().splitlines()
    shown = [line for line in page.with_suffix(".md").read_text().splitlines() if "| fd" in line]
    assert [line for line in table if line.startswith("| fd")] == shown and shown
    text = page.read_text()
    assert "Equal tuning" in text and text.count("<svg") == 1 and "95 % t-interval" in text
    study_begun = tmp_path / "begun" / "settings.json"
    study_begun.parent.mkdir()
    study_begun.write_text((finished / "study" / "settings.json").read_text())
    with pytest.raises(UsageError, match="the study is not finished"):
        report.main([str(study_begun.parent), "--out", str(page)])


def test_a_study_of_three_methods_stopped_twice_ends_as_one_that_was_not(
    finished, flags, teacher, tmp_path
):
    command = [sys.executable, "-m", "training.tune", *study(flags, teacher, tmp_path)]
    for stop in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(command, start_new_session=True)
        runs = tmp_path / "study" / "runs"
        before = len(list(runs.glob("*/metrics.jsonl")))
        deadline = time.monotonic() + 120
        while len(list(runs.glob("*/metrics.jsonl"))) < before + 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(process.pid, stop)
        assert process.wait(60) == (75 if stop == signal.SIGTERM else -9)
    assert main(study(flags, teacher, tmp_path)) == 0
    mine, whole = table(tmp_path), table(finished)
    for name, row in whole.items():
        assert mine[name]["scores"] == row["scores"]
        assert mine[name]["trials"] == row["trials"]


def test_runs_in_memory_share_the_samples_that_one_of_them_made(flags, teacher, tmp_path):
    words = study(flags, teacher, tmp_path, methods=["none"])
    assert main([*words, "--views", "2", "--in-memory"]) == 0
    made = tmp_path / "study" / "made"
    configs = [json.loads(p.read_text()) for p in (tmp_path / "study/runs").glob("*/config.json")]
    assert [config["in_memory_dir"] for config in configs] == [str(made)] * 2
    assert not made.exists(), "nobody needs them any more"


def test_a_study_does_not_go_on_with_other_settings(finished, flags, teacher):
    with pytest.raises(UsageError, match="the study began with other flags"):
        main([*study(flags, teacher, finished), "--lr", "0.1"])
    with pytest.raises(UsageError, match="the study began with other seed"):
        main(study(flags, teacher, finished, "study", "--seed", "3"))


def test_a_trial_that_was_half_taken_when_its_worker_died_keeps_its_values(
    flags, teacher, tmp_path
):
    plan = parse(study(flags, teacher, tmp_path, methods=["clipkd"]))
    plan.folder.mkdir()
    Queue(plan, optuna).claim()
    journal = plan.folder / "journal.log"
    lines = journal.read_text().splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if '"param_name"' in line)
    journal.write_text("".join(lines[: first + 1]) + lines[first + 1][:20])
    queue = Queue(plan, optuna)
    claims = [queue.claim(), queue.claim()]
    tried = {claim.number: claim.trial.params for claim in claims}
    assert tried == dict(enumerate(plan.rows[0].trials(2, plan.seed)))


@pytest.mark.parametrize("line", ["\0garbage\n", "[]\n", '{"op_code": 99, "worker_id": "x"}\n'])
def test_a_damaged_journal_is_named(line, flags, teacher, tmp_path):
    plan = parse(study(flags, teacher, tmp_path))
    plan.folder.mkdir()
    (plan.folder / "journal.log").write_text(line)
    with pytest.raises(
        BadFile, match=r"journal.log is damaged .*: remove it; runs that have ended"
    ):
        Queue(plan, optuna)


def test_a_study_does_not_go_on_where_what_it_began_with_is_not_all_known(flags, teacher, tmp_path):
    plan = parse(study(flags, teacher, tmp_path))
    for settings in ({}, {**json.loads(json.dumps(plan.settings)), "of the future": 1}):
        write_json(plan.folder / "settings.json", settings, 1)
        with pytest.raises(UsageError, match="the study began with other"):
            check_settings(plan)


WRONG = {
    "a bank in every run": (["--methods", "cifd"], [], "each of its runs would train a bank"),
    "a bank": (["--methods", "rdm"], [], "a bank is no student"),
    "an unknown baseline": (["--methods", "fd", "--against", "kd"], [], "--against kd: expected"),
    "a span that is none": (["--methods", "fd", "--space", "lr=1:0.1"], [], "--space 'lr=1:0.1'"),
    "a span of nothing": (
        ["--methods", "fd", "--space", "lambda=1:2"],
        [],
        "--space lambda: no row",
    ),
    "a span of a count": (
        ["--methods", "fd", "--space", "lr=1:2", "epochs=1:9"],
        [],
        "--space epoc",
    ),
    "data sets without data": (["--methods", "fd", "--datasets", "x"], [], "go together"),
    "a wrong flag of the runs": (["--methods", "fd"], ["--epocs", "3"], "did you mean --epochs"),
    "a seed of the runs": (["--methods", "fd"], ["--seed", "3"], "--seed after --"),
    "no folder in --logs": (["--methods", "fd", "--name", "../x"], [], "--name '../x': expected"),
    "no trial": (["--methods", "fd", "--trials", "0"], [], "--trials must be at least 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_before_anything_runs(case, flags, teacher, tmp_path):
    ours, runs, message = WRONG[case]
    where = ["--name", "study", "--logs", str(tmp_path)]
    with pytest.raises(UsageError, match=message):
        main([*where, *ours, "--", *flags, "--distill-model", teacher, *runs])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", ["--holdout 0", "--holdout 5000 --final"])
def test_classifiers_are_tuned_on_held_out_training_images_alone(flags, tmp_path):
    command = ["--command", "classify", "--methods", "none", "--name", "x", "--logs", str(tmp_path)]
    with pytest.raises(UsageError, match=r"held-out training images alone|--final after --"):
        main([*command, "--", "--data", "d", "--model", "cnn2", *flags.split()])


@needs_cifar
def test_classifiers_are_compared_by_their_test_accuracy(tmp_path):
    command = ["--command", "classify", "--methods", "none", "--space", "lr=0.001:0.1"]
    command += ["--trials", "1", "--seeds", "1", "--name", "x"]
    runs = ["--data", str(CIFAR), "--model", "cnn2", "--subset", "128", "--holdout", "32"]
    runs += ["--epochs", "1", "--batch-size", "32"]
    assert main([*command, "--logs", str(tmp_path), "--", *runs]) == 0
    rows = table(tmp_path, "x")
    assert list(rows["none"]["figures"]) == ["test"] and set(rows["none"]["best"]) == {"lr"}
    result = json.loads((tmp_path / "x" / "runs" / "none-s00" / "result.json").read_text())
    assert rows["none"]["figures"]["test"] == 100 * result["metrics"]["acc1"]


def test_tuning_without_optuna_says_what_to_install(flags, teacher, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"pip install 'cifd_clip\[tune\]'"):
        main(study(flags, teacher, tmp_path))
