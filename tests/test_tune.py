"""Every row gets the same trials; a study goes on where it was stopped, and ends with new seeds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import pytest

from cifd_clip.files import BadFile, write_json
from cifd_clip.methods import DECLARED
from demo import scenes
from eval import report
from runs import ROOT
from training.engine.flags import expand_files
from training.errors import UsageError
from training.tune import main
from training.tuning.plan import parse
from training.tuning.queue import Queue
from training.tuning.table import flag_file, lines, record
from training.tuning.work import Task, Worker, check_settings

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


def test_trials_are_judged_by_labelled_samples_too_where_there_are_some(flags, teacher, tmp_path):
    scenes.write(tmp_path / "data", train=1, val=1, scenes=40)
    labelled = ["--trial-root", str(tmp_path / "data" / "benchmark"), "--trial-datasets", "digits"]
    small = ["--trials", "1", "--seeds", "1"]
    words = study(flags, teacher, tmp_path, "study", *labelled, *small, methods=["clipkd"])
    assert main(words) == 0
    for run, found in (("t00", "trials"), ("s00", "scores")):
        folder = tmp_path / "study" / "runs" / f"clipkd-{run}"
        (result,) = (json.loads(path.read_text()) for path in (folder / "results").glob("*.json"))
        validations = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        recalls = [line for line in validations if line["kind"] == "val"][-1]
        recall = fmean(value for name, value in recalls.items() if "_recall@" in name)
        row = table(tmp_path)["clipkd"]
        score = row["scores"]["1"] if found == "scores" else row["trials"][0]["score"]
        assert score == pytest.approx(50 * (recall + result["metrics"]["acc1"]))
    assert set(row["figures"]) == {"held out", "digits"}


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


def test_a_queue_whose_worker_was_killed_while_it_filled_it_lacks_nothing(flags, teacher, tmp_path):
    plan = parse(study(flags, teacher, tmp_path, methods=["clipkd"]))
    plan.folder.mkdir()
    Queue(plan, optuna).claim()
    journal = plan.folder / "journal.log"
    kept = journal.read_text().splitlines(keepends=True)
    first = next(i for i, line in enumerate(kept) if '"number"' in line)
    journal.write_text("".join(kept[: first + 1]))
    queue = Queue(plan, optuna)
    claims = [queue.claim(), queue.claim()]
    assert [claim.number for claim in claims] == [0, 1] and queue.claim() is None
    assert queue.left() == 4, "two trials and two seeds"
    queue.give_back(claims[1].study, claims[1].trial)
    assert queue.left() == 4 and queue.claim().number == 1
    for claim in claims[:1] * 2:  # twice: another may have given it back, and this one goes on
        queue.give_back(claim.study, claim.trial)
    assert queue.left() == 4 and queue.claim().number == 0


def test_a_worker_is_not_taken_for_one_of_its_number_from_before_a_power_cut(
    flags, teacher, tmp_path
):
    plan = parse(study(flags, teacher, tmp_path, methods=["clipkd"]))
    plan.folder.mkdir()
    before = Queue(plan, optuna)
    host_and_number, _, begin = before.worker.rpartition("-")
    assert begin.isdigit()
    before.worker = f"{host_and_number}-{int(begin) - 1}"
    before.beat()
    before.claim(), before.claim()
    now = Queue(plan, optuna)
    assert [now.claim().number, now.claim().number] == [0, 1]


def test_a_run_that_diverged_under_a_new_seed_counts_as_zero_and_has_no_figures(
    flags, teacher, tmp_path
):
    plan = parse(study(flags, teacher, tmp_path, methods=["fd"]))
    for scores in ([None, 31.0], [31.0, None], [None, None]):
        trials, final = (optuna.create_study(direction="maximize") for _ in range(2))
        for number, score in enumerate(scores):
            own = {"number": number} | ({} if score is None else {"held out": score / 100})
            final.add_trial(optuna.trial.create_trial(value=score or 0.0, user_attrs=own))
        found = record(plan, plan.rows[0], trials, final)
        assert list(found["scores"].values()) == [score or 0.0 for score in scores]
        whole = {**found, "row": "other", "shown": "", "figures": {"held out": 1.0, "x": 2.0}}
        content = {"against": "fd", "rows": [{**found, "shown": ""}, whole]}
        assert len({len(line) for line in lines(content)}) == 1, "every line has all cells"


def test_a_trial_that_falls_behind_is_ended_and_has_no_score(flags, teacher, tmp_path):
    words = study(flags, teacher, tmp_path, "study", "--prune", "--trials", "3", methods=["clipkd"])
    plan = parse(words)
    plan.folder.mkdir()
    worker = Worker(plan, Queue(plan, optuna))

    def claimed(recalls: list[float]) -> Task:
        task = worker.task(worker.queue.claim())
        task.run.mkdir(parents=True)
        names = plan.command.held_out
        validations = [
            {"kind": "val", "step": step} | dict.fromkeys(names, recall)
            for step, recall in enumerate(recalls)
        ]
        (task.run / "metrics.jsonl").write_text("".join(json.dumps(v) + "\n" for v in validations))
        return task

    behind = []
    for recalls in ([0.3, 0.4], [0.31, 0.41], [0.1]):
        task = claimed(recalls)
        behind.append(worker.falls_behind(task))
        if behind[-1]:
            task.claim.study.tell(task.claim.trial, state=worker.queue.states.PRUNED)
        else:
            worker.score(task, worker.figures(task))
    assert behind == [False, False, True]
    trials, final = worker.queue.studies["clipkd"]
    final.add_trial(optuna.trial.create_trial(value=1.0, user_attrs={"number": 0}))
    scores = [trial["score"] for trial in record(plan, plan.rows[0], trials, final)["trials"]]
    assert scores == [pytest.approx(40), pytest.approx(41), None]


def test_runs_whose_rows_have_a_dot_in_their_names_have_logs_of_their_own(flags, teacher, tmp_path):
    rows = ["lr0.1=--distill fd", "lr0.2=--distill fd"]
    words = study(flags, teacher, tmp_path, "study", "--against", "lr0.1", methods=rows)
    plan = parse(words)
    plan.folder.mkdir()
    worker = Worker(plan, Queue(plan, optuna))
    tasks = [worker.task(worker.queue.claim()) for _ in range(4)]
    logs = [task.log.name for task in tasks]
    assert logs == [f"{row}-s0{seed}.log" for row in ("lr0.1", "lr0.2") for seed in (0, 1)]


def test_the_best_weights_are_read_back_whatever_is_in_their_flags(tmp_path):
    flags = ["--teacher-cache=my runs/a", "--distill", "fd", "it's", "#1"]
    path = tmp_path / "best.args"
    path.write_text(flag_file(flags, "study"))
    assert expand_files([f"@{path}"]) == flags


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
    "data without data sets": (
        ["--methods", "fd", "--trial-root", "x"],
        [],
        "--trial-root DIR and",
    ),
    "a wrong flag of the runs": (["--methods", "fd"], ["--epocs", "3"], "did you mean --epochs"),
    "a seed of the runs": (["--methods", "fd"], ["--seed", "3"], "--seed after --"),
    "no folder in --logs": (["--methods", "fd", "--name", "../x"], [], "--name '../x': expected"),
    "a name of the runs in a file": (["--methods", "fd"], ["@seeded.args"], "--name after --"),
    "a name of a row's runs": (["--methods", "a=--distill fd --name x"], [], "--name of --methods"),
    "no held-out pairs": (["--methods", "fd"], ["--val-fraction", "0"], "judged by held-out pairs"),
    "a last epoch without": (
        ["--methods", "fd"],
        ["--val-frequency", "7"],
        r"divides --epochs \d, got 7",
    ),
    "no trial": (["--methods", "fd", "--trials", "0"], [], "--trials must be at least 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_before_anything_runs(
    case, flags, teacher, tmp_path, tmp_path_factory, monkeypatch
):
    ours, runs, message = WRONG[case]
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    Path("seeded.args").write_text("--name x\n")
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


def test_a_span_of_some_methods_flag_is_tuned_in_their_rows_alone(tmp_path):
    command = ["--command", "classify", "--methods", "none", "kd=--teacher t", "--name", "x"]
    command += ["--space", "kd_dropout=0.05:0.5", "--logs", str(tmp_path)]
    plan = parse([*command, "--", "--data", "d", "--model", "cnn2", "--holdout", "9"])
    tuned = {row.name: [weight.name for weight in row.weights] for row in plan.rows}
    assert tuned["none"] == [] and "kd_dropout" in tuned["kd"]
