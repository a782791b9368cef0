"""``training.classify``, as a user runs it: what each method leaves, and what is said about it."""

import pytest
import torch
from safetensors.torch import load_file

import training.classifier.run as classifier_run
from cifd_clip import World
from cifd_clip.classification.models import build, simple_cnn
from cifd_clip.noise import derive_seed
from classification.command import (
    content,
    logs_open_in,
    needs_cifar,
    photo_flags,
    run_photos,
)
from runs import lines
from test_launch import launch
from training.classifier.config import parse, resolve
from training.classifier.imagenet import load_photos
from training.engine import result
from training.errors import UsageError

METHODS = {
    "kd": [],
    "takd": [],
    "dgkd": ["--kd-dropout", "0.25"],
    "ft": ["--paraphraser={home}/paraphraser"],
    "cifd": ["--rdm-bank={home}/rdm", "--rates", "1", "10", "--augment", "crop"],
}


@needs_cifar
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_real_images(method, home, run_cifar):
    teachers = f"{home}/teacher,{home}/teacher" if method == "dgkd" else f"{home}/teacher"
    flags = [flag.format(home=home) for flag in METHODS[method]]
    flags += ["--epochs", "1", "--method", method, "--model", "cnn2", "--teacher", teachers]
    run = run_cifar(home, method, *flags, "--holdout", "32")
    record = result.read(run / "result.json")
    assert record.training.method == method and record.training.teacher == "cnn4"
    assert record.training.role == "student"
    config = content(run, "config.json")
    assert config.items() >= record.training.settings.items()
    assert record.metrics is None, "the test split is looked at with --final alone"
    assert 0 <= record.holdout_metrics["acc1"] <= record.holdout_metrics["acc5"] <= 1
    shipped = load_file(run / "model.safetensors")
    assert set(shipped) == set(simple_cnn("cnn2").state_dict()), "a student ships nothing else"


@needs_cifar
def test_rdms_leave_one_result_per_rate(home):
    for rate in (1, 3, 10, 30, 100):
        record = result.read(home / "rdm" / f"result_R{rate}.json")
        assert record.training.role == "rdm" and record.training.rate == rate
        assert record.train_metrics["bits"] > 0
    record = result.read(home / "paraphraser" / "result.json")
    assert record.training.role == "paraphraser" and record.train_metrics["distortion"] > 0


@pytest.mark.parametrize("shell", ["of sbatch or salloc", "of an interactive step"])
def test_a_command_typed_in_an_allocation_of_several_tasks_is_one_process(
    shell, photos, monkeypatch
):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    allocation = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    if "step" in shell:
        allocation["SLURM_STEP_NUM_TASKS"] = "1"
    for name, value in allocation.items():
        monkeypatch.setenv(name, value)
    run = run_photos(photos, f"typed in a shell {shell}", "--model=cnn2")
    assert result.read(run / "result.json").training.processes == 1


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--lambda-n", "1", "1", "1"], "--lambda-n has 3 values for 2 assistants"),
        (["--rates", "7"], "--rates 7: the bank .* has 10, 300"),
        (["--teacher-cache=answers"], "--teacher-cache keeps what teachers say about each view"),
        (["--teacher={another}"], "--rdm-bank: .* but the teacher is cnn4 with weights"),
        (["--batch-size=10"], "--batch-size 10: a step has 10 images, and there are 9"),
    ],
)
def test_a_refused_command_leaves_its_name_to_the_corrected_one(
    wrong, message, photos, known, another, tmp_path
):
    teacher, bank = known
    right = ["--method=cifd", "--model=cnn2", f"--teacher={teacher}", f"--rdm-bank={bank}"]
    right.append(f"--logs={tmp_path}")
    with pytest.raises(UsageError, match=message):
        run_photos(photos, "name", *right, *(flag.format(another=another) for flag in wrong))
    taken = tmp_path / "name"
    assert not taken.exists() or not any(taken.iterdir())
    assert not logs_open_in(tmp_path)
    run_photos(photos, "name", *right)
    assert (tmp_path / "name" / "finished.json").is_file()


def test_a_run_that_fails_does_not_go_on_logging(photos, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(classifier_run, "MetricWriter", full)
    with pytest.raises(OSError, match="no space left"):
        run_photos(photos, "full", "--model=cnn2", f"--logs={tmp_path}")
    assert (tmp_path / "full" / "out.log").is_file(), "it has begun"
    assert not logs_open_in(tmp_path)


def test_all_rdms_of_a_bank_teach_unless_some_are_named(photos, known, tmp_path):
    teacher, bank = known
    flags = ["--method=cifd", "--model=cnn2", "--lr=0.001", f"--logs={tmp_path}"]
    flags += [f"--teacher={teacher}", f"--rdm-bank={bank}"]
    for name, own, rates in (("all", [], [10.0, 300.0]), ("one", ["--rates=300"], [300.0])):
        run = run_photos(photos, name, *flags, *own)
        assert content(run, "config.json")["rates"] == rates
        assert list(result.read(run / "result.json").training.rates) == rates
        assert "--rdm-bank" not in (run / "out.log").read_text()


def test_cifd_without_a_bank_says_once_that_no_rdm_teaches(photos, known, tmp_path):
    flags = ["--method=cifd", "--model=cnn2", "--lr=0.001", f"--teacher={known[0]}"]
    run = run_photos(photos, "bare", *flags, f"--logs={tmp_path}")
    warned = [row for row in (run / "out.log").read_text().splitlines() if "--rdm-bank" in row]
    assert len(warned) == 1 and "WARNING" in warned[0] and "no RDM assists" in warned[0]
    assert content(run, "config.json")["rates"] == []
    assert result.read(run / "result.json").training.rates == ()


def test_bfloat16_trains_and_float32_measures_what_ships(photos, tmp_path):
    flags = ["--model=cnn2", "--lr=0.001", "--precision=amp_bf16", "--final", "--holdout=2"]
    run = run_photos(photos, "half", *flags, f"--logs={tmp_path}")
    model = build("cnn2", 3, 224)
    model.load_state_dict(load_file(run / "model.safetensors"))
    test = load_photos(photos, "val", 0)
    (batch,) = test.in_order(torch.arange(len(test)), len(test))
    with torch.no_grad():
        right = (model.eval()(batch.images).argmax(1) == batch.labels).float().mean().item()
    assert result.read(run / "result.json").metrics["acc1"] == pytest.approx(right)
    full = run_photos(photos, "full", "--precision=fp32", *flags[:2], f"--logs={tmp_path}")
    assert lines(run)[0]["loss"] != lines(full)[0]["loss"], "nothing was in bfloat16"


@pytest.mark.parametrize("own", [[], ["--accum-freq=2"]], ids=["plain", "accumulated"])
def test_two_processes_share_each_batch_and_train_what_one_would(own, photos, tmp_path):
    again = "--resume=latest"  # the second time
    teacher = run_photos(photos, "small", "--model=cnn4", "--lr=0.001", "--holdout=1", again)
    under = f"--teacher={teacher}"
    kept = ["--holdout=1", "--rates", "10", "300"]
    bank = run_photos(photos, "small_rdm", "--method=rdm", under, *kept, again)
    flags = ["--method=cifd", "--model=cnn2", under, f"--rdm-bank={bank}", "--kd-dropout=0.25"]
    flags += ["--global-batch=4", "--lr=0.001", "--holdout=1", "--final", f"--logs={tmp_path}"]
    alone = run_photos(photos, "alone", *flags)
    command = [*photo_flags(photos, "shared"), *flags, *own]
    ranks = launch(command, tmp_path / "log", 2, "training.classify")
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0], (tmp_path / "log.0").read_text()
    shared = tmp_path / "shared"
    one, two = (load_file(run / "model.safetensors") for run in (alone, shared))
    start = build("cnn2", 3, 224, torch.Generator().manual_seed(derive_seed(0, "init")))
    for name, weights in one.items():
        moved = (weights - start.state_dict()[name]).norm()
        assert moved > 0, f"{name} did not train"
        assert (two[name] - weights).norm() < 1e-3 * moved, f"{name} trained differently"
    results = [result.read(run / "result.json") for run in (alone, shared)]
    assert results[0].metrics == pytest.approx(results[1].metrics)
    assert [r.training.processes for r in results] == [1, 2]
    for a, b in zip(*(lines(run) for run in (alone, shared)), strict=True):
        for key in a.keys() - {"kind", "time", "samples_per_s", "data_wait"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4), f"{key}: logged of the whole batch"


def test_a_batch_that_processes_can_not_share_is_refused():
    given = parse(["--data=x", "--model=cnn2", "--global-batch=3"])
    with pytest.raises(UsageError, match="--global-batch 3 can't be shared by 2 processes"):
        resolve(given, World(0, 2).size)


@pytest.mark.parametrize("method", ["none", "rdm"])
def test_a_finished_run_is_asked_for_its_test_figures_afterwards(
    method, photos, known, tmp_path, monkeypatch
):
    teacher = ["--method=rdm", f"--teacher={known[0]}", "--rates", "10", "300"]
    flags = teacher if method == "rdm" else ["--model=cnn2", "--lr=0.001"]
    flags.append(f"--logs={tmp_path}")
    straight = run_photos(photos, "straight", *flags, "--final")
    later = run_photos(photos, "later", *flags)
    assert "test: not looked at" in (later / "out.log").read_text()
    monkeypatch.setattr(classifier_run.Trainer, "step", None)
    again = ["--resume=latest", "--final"]
    run_photos(photos, "later", *flags, *again)
    files = sorted(path.name for path in later.glob("result*.json"))
    assert files == sorted(path.name for path in straight.glob("result*.json")) and files
    for file in files:
        one, two = (result.read(run / file) for run in (straight, later))
        assert one.metrics == two.metrics and one.metrics
        assert one.train_metrics == two.train_metrics and one.train_metrics
        assert one.provenance.data == two.provenance.data
        assert one.provenance.data.keys() == {"train", "test"}
    assert {path.name for path in later.iterdir()} == {path.name for path in straight.iterdir()}

    before = {path: path.stat().st_mtime_ns for path in later.rglob("*")}
    run_photos(photos, "later", *flags, *again)
    run_photos(photos, "later", *flags, "--resume=latest")  # --final is switched off again
    assert {path: path.stat().st_mtime_ns for path in later.rglob("*")} == before


def test_final_metrics_are_told_in_percent():
    measured = {"metrics": {"acc1": 0.4821, "acc5": 0.77}, "holdout_metrics": None}
    measured["train_metrics"] = {"acc1": [0.379, 0.4745], "bits": [24.26, 35.0]}
    assert classifier_run.summary(measured) == [
        "test: top-1 48.21 %, top-5 77.00 %",
        "training images: top-1 37.90 / 47.45 %, bits 24.26 / 35",
    ]
    unseen = classifier_run.summary({**measured, "metrics": None})
    assert unseen[-1] == "test: not looked at; --final --resume latest does so"
