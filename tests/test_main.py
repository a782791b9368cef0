"""``training.main``, as a user runs it, on real scenes of handwritten digits."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
from open_clip_train.params import parse_args as open_clip_parse_args

import cifd_clip
import training.engine.loop
from cifd_clip import World
from cifd_clip.files import BadFile
from cifd_clip.rdm import RDMBank
from cifd_clip.teacher import weights_hash
from runs import CONFIGS, ROOT, assert_bit_equal, final, lines, word_tokenizer
from training.clip.config import DISTILL
from training.clip.flags import UNSUPPORTED, parse_args, parser
from training.clip.run import bank_config
from training.engine.control import StopFlag
from training.errors import (
    Failure,
    MachineFailure,
    NonFinite,
    Stopped,
    UsageError,
    exit_code,
)
from training.main import main

STEPS = 4  # of an epoch: 96 scenes in batches of 24


def method_flags(method: str, teacher: str, bank: Path) -> list[str]:
    given = ["--distill", method]
    if method != "none":
        given += ["--distill-model", teacher]
    if method == "mobileclip":
        given[-1] = f"{teacher},{teacher}"
    if method == "cifd":
        given += ["--rdm-bank", str(bank)]
    if method == "rdm":
        given += ["--rates", "300", "30"]
    return given


@pytest.mark.parametrize("method", [m for m in DISTILL if m != "rdm"])
def test_every_method_leaves_a_checkpoint_that_stock_open_clip_loads_strictly(
    method, flags, teacher, bank, tmp_path
):
    command = [*flags, *method_flags(method, teacher, bank), "--logs", str(tmp_path)]
    assert main([*command, "--name", method]) == 0
    run = tmp_path / method
    content = final(run)
    stock = open_clip.create_model("tiny-student")
    stock.load_state_dict(content["state_dict"], strict=True)
    shipped, *_ = open_clip.create_model_and_transforms(f"local-dir:{run / 'student'}")
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, shipped.state_dict()[name]), f"{name} differs in student/"
    steps = lines(run)
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    terms = [k for k in steps[-1] if k.endswith("_loss")]
    total = sum(steps[-1][k] for k in terms)
    assert steps[-1]["loss"] == pytest.approx(total, rel=1e-5), "the total is the terms' sum"


def test_help_shows_what_is_commonly_set_and_help_all_every_flag(capsys):
    shown = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            parser().given([flag])
        shown[flag] = capsys.readouterr().out
    named = {
        name: set(re.findall(r"^  (--[a-z0-9-]+)", text, re.M)) for name, text in shown.items()
    }
    every = {action.option_strings[0] for action in parser()._actions} - {"-h"}
    assert named["--help-all"] == every and named["--help"] < every
    assert {"--train-data", "--distill", "--lr"} < named["--help"]
    assert len(shown["--help"].splitlines()) <= 80


def test_a_run_directory_explains_itself(flags, teacher, bank, tmp_path, scenes):
    command = [*flags, *method_flags("cifd", teacher, bank), "--logs", str(tmp_path)]
    command += ["--val-data", str(scenes / "val"), "--report-to", "tensorboard"]
    assert main([*command, "--name", "run"]) == 0
    run = tmp_path / "run"
    config = json.loads((run / "config.json").read_text())
    assert config["distill"] == "cifd" and config["global_batch"] == 24
    data = json.loads((run / "data.json").read_text())
    assert data["usable"] == 96 and len(data["hash"]) == 64
    environment = json.loads((run / "environment.json").read_text())["starts"][-1]
    assert environment["packages"]["open_clip_torch"].startswith("3.")
    assert environment["packages"]["cifd_clip"] == cifd_clip.__version__
    assert {"cuda", "cudnn", "nccl", "driver"} < environment.keys()
    row = lines(run)[-1]
    for name in ("logit_scale", "samples_per_s", "data_wait", "image_bits", "text_bits", "lr"):
        assert np.isfinite(row[name]), name
    held_out = lines(run, "val")[-1]
    assert held_out["image_embedding_loss"] > 0 and "image_rate_loss" not in held_out
    assert list((run / "tensorboard").glob("events*"))
    log = (run / "out.log").read_text()
    assert re.search(r"epoch 0\.75/1, step 3/4, \d+ s left", log), log


def test_stage_one_reports_bits_distortion_and_snr_of_every_rate(bank):
    row = lines(bank.parent)[-1]
    for modality in ("image", "text"):
        for rate in ("300", "30"):
            for quantity in ("bits", "distortion", "snr_db"):
                assert np.isfinite(row[f"{modality}/R={rate}/{quantity}"])


def test_cifd_without_a_bank_trains_one_first_in_the_same_run(flags, teacher, tmp_path):
    command = [*flags, "--distill", "cifd", "--distill-model", teacher, "--rdm-epochs", "1"]
    command += ["--rates", "100", "--logs", str(tmp_path), "--name", "run"]
    assert main(command) == 0
    run = tmp_path / "run"
    assert (run / "rdm" / "finished.json").is_file() and (run / "finished.json").is_file()
    identity = json.loads((run / "rdm" / "bank" / "config.json").read_text())["teacher"]
    assert RDMBank.load(run / "rdm" / "bank", identity).rates == [100.0]
    assert main([*command, "--resume", "latest"]) == 0, "a finished run ends well at once"


@pytest.mark.parametrize("method", ["rdm", "clipkd", "cifd"])
def test_a_run_stopped_by_a_signal_goes_on_as_if_nothing_had_happened(
    method, flags, teacher, bank, tmp_path, monkeypatch
):
    command = [*flags, *method_flags(method, teacher, bank), "--logs", str(tmp_path)]
    assert main([*command, "--name", "whole"]) == 0

    from training.engine.trainer import Trainer

    step = Trainer.step

    def interrupted(self, batch):
        values = step(self, batch)
        if self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return values

    monkeypatch.setattr(Trainer, "step", interrupted)
    assert main([*command, "--name", "parts"]) == 75
    monkeypatch.undo()
    assert final(tmp_path / "parts")["progress"]["step"] == 2
    assert main([*command, "--name", "parts", "--resume", "latest"]) == 0
    assert_bit_equal(final(tmp_path / "parts"), final(tmp_path / "whole"))
    whole, parts = lines(tmp_path / "whole"), lines(tmp_path / "parts")
    assert [r["loss"] for r in parts] == [r["loss"] for r in whole], "one curve, no gap"


def test_resuming_passes_over_a_truncated_checkpoint(flags, tmp_path):
    command = [*flags, "--logs", str(tmp_path), "--save-every-n-steps", "1", "--keep", "0"]
    assert main([*command, "--name", "run"]) == 0
    run = tmp_path / "run"
    whole = final(run)
    newest = run / "checkpoints" / f"step_{STEPS:08d}.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    (run / "finished.json").unlink()
    assert main([*command, "--name", "run", "--resume", "latest"]) == 0
    assert_bit_equal(final(run), whole)


def test_a_run_goes_back_to_a_checkpoint_and_on_from_it(flags, teacher, tmp_path):
    command = [*flags, "--distill", "cifd", "--distill-model", teacher, "--rdm-epochs", "1"]
    command += ["--rates", "100", "--save-every-n-steps", "1", "--keep", "0"]
    command += ["--logs", str(tmp_path), "--name", "run"]
    assert main(command) == 0
    run, whole = tmp_path / "run", final(tmp_path / "run")
    older = run / "checkpoints" / "step_00000002.pt"
    assert main([*command, "--resume", str(older)]) == 0
    assert (run / "checkpoints" / "superseded" / f"step_{STEPS:08d}.pt").is_file()
    assert_bit_equal(final(run), whole)
    assert [row["step"] for row in lines(run)] == list(range(1, STEPS + 1))
    assert (run / "finished.json").is_file()


def test_accumulation_trains_as_the_large_batch_does(flags, teacher, bank, tmp_path):
    command = [*flags, *method_flags("cifd", teacher, bank), "--logs", str(tmp_path)]
    assert main([*command, "--name", "whole"]) == 0
    micro = [*command, "--batch-size", "8", "--accum-freq", "3", "--name", "micro"]
    assert main(micro) == 0
    for whole, parts in zip(lines(tmp_path / "whole"), lines(tmp_path / "micro")):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        assert parts["image_bits"] == pytest.approx(whole["image_bits"], rel=1e-4)


@pytest.mark.parametrize("extra", [["--precision", "amp_bf16"], ["--grad-checkpointing"]])
@pytest.mark.parametrize("method", ["clipkd", "cifd"])
def test_bf16_and_gradient_checkpointing_follow_the_plain_run(
    method, extra, flags, teacher, bank, tmp_path
):
    command = [*flags, *method_flags(method, teacher, bank), "--logs", str(tmp_path)]
    assert main([*command, "--name", "plain"]) == 0
    assert main([*command, *extra, "--accum-freq", "3", "--batch-size", "8", "--name", "it"]) == 0
    plain, it = lines(tmp_path / "plain")[-1], lines(tmp_path / "it")[-1]
    tolerance = 0.05 if "amp_bf16" in extra else 1e-4
    assert it["loss"] == pytest.approx(plain["loss"], rel=tolerance)


def test_divergence_is_skipped_counted_and_named_and_the_weights_stay_good(flags, tmp_path):
    command = [*flags, "--lr", "1e30", "--warmup", "1", "--epochs", "4", "--logs", str(tmp_path)]
    with pytest.raises(NonFinite, match=r"contrastive_loss = (nan|inf)"):
        main([*command, "--max-nonfinite-steps", "3", "--name", "run"])
    content = final(tmp_path / "run")
    assert content["progress"]["nonfinite_steps"] == 3
    for name, tensor in content["state_dict"].items():
        assert torch.isfinite(tensor).all(), f"{name} was spoilt"


WRONG = {
    "no data": ([], ["--train-data"], "--train-data is missing"),
    "no shards": (["--train-data", "/nowhere/{0..3}.tar"], [], "/nowhere/0.tar"),
    "unknown model": (["--model", "ViT-B-17"], [], "did you mean ViT-B-16"),
    "teacher half given": (
        ["--distill", "fd", "--distill-model", "ViT-B-16"], [], "--distill-pretrained"),
    "teacher without method": (["--distill-model", "ViT-B-16"], [], "choose a method"),
    "method without teacher": (["--distill", "cifd"], [], "needs a teacher"),
    "unknown weights": (
        ["--distill", "fd", "--distill-model", "ViT-B-16", "--distill-pretrained", "nothing"],
        [], "neither a file nor a tag"),
    "QuickGELU mismatch": (
        ["--distill", "fd", "--distill-model", "ViT-B-16", "--distill-pretrained", "openai"],
        [], "ViT-B-16-quickgelu"),
    "bank of a method that has none": (
        ["--distill", "none", "--rdm-bank", "y"], [], "belongs to methods with a teacher"),
    "refused flag": (["--horovod"], [], "torchrun or srun"),
    "unknown flag": (["--distil", "cifd"], [], "unrecognized"),
    "batch larger than the data": (["--batch-size", "1000"], [], "one global batch"),
    "float16 without a GPU": (["--precision", "amp"], [], "needs a GPU"),
    "negative rate": (["--rates", "-1"], [], "positive"),
    "missing flag file": (["@nowhere.args"], [], "no such flag file"),
    "CoCa student": (["--model", "coca_ViT-B-32"], [], "CoCa"),
    "batch norm and accumulation": (["--model", "RN50", "--accum-freq", "2"], [], "normalisation"),
    "a crop's range upside down": (["--aug-cfg", "scale=(2,1)"], [], "--aug-cfg scale="),
    "no checkpoint kept": (["--keep", "-1"], [], "--keep must be 0 or more"),
    "no window": (["--shuffle-window", "0"], [], "--shuffle-window must be positive"),
    "negative workers": (["--workers", "-1"], [], "--workers must be 0 or more"),
    "negative views": (["--views", "-2"], [], "--views must be 0 or more"),
    "a learning rate that is no number": (["--lr", "nan"], [], "--lr must be positive"),
    "a clip that is no number": (["--grad-clip-norm", "nan"], [], "must be positive"),
    "no patience": (["--max-nonfinite-steps", "0"], [], "--max-nonfinite-steps must be at least 1"),
    "a GPU that is not there": (["--device", "cuda"], [], "torch finds no GPU"),
    "a checkpoint as an architecture": (
        ["--distill", "kd", "--distill-model", "logs/a/checkpoints/step_1.pt"], [],
        "name its run, or --distill-model NAME --distill-pretrained logs/a/checkpoints/step_1.pt"),
    "no context": (["--force-context-length", "0"], [], "must be at least 1, got 0"),
    "no pixels": (["--force-image-size", "0"], [], "--force-image-size must be at least 1, got 0"),
    "less than a patch": (["--force-image-size", "7"], [], "can't encode an image and a caption"),
    "no deviation": (["--image-std", "0", "1", "1"], [], "--image-std must be positive, got 0 1 1"),
    "no device": (["--device", "gpu"], [], "--device 'gpu': expected cpu, cuda or cuda:N"),
    "unknown augmentation": (["--aug-cfg", "scal=(0.5,1)"], [], "--aug-cfg scal="),
    "augmentation of the wrong kind": (["--aug-cfg", "scale=0.4"], [], "--aug-cfg scale=0.4"),
    "negative learning rate": (["--lr", "-1"], [], "--lr must be positive"),
    "nothing left to train": (["--lock-image", "--lock-text"], [], "leave nothing"),
    "weights of a model that has its own": (
        ["--model", "local-dir:x", "--pretrained", "y.pt"], [], "--model 'local-dir:x'"),
    "no held-out shards": (["--val-data", "/nowhere/0.tar"], [], "--val-data: /nowhere/0.tar"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_sentence(case, flags, tmp_path):
    extra, dropped, expected = WRONG[case]
    given = [*flags, *extra, "--logs", str(tmp_path)]
    for flag in dropped:
        place = given.index(flag)
        del given[place : place + 2]
    with pytest.raises(UsageError, match=expected) as raised:
        main(given)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.rglob("*.pt")), "nothing was trained"
    assert not list(tmp_path.iterdir()), "no folder is left, and the name is free"


def test_an_existing_run_and_a_changed_configuration_are_refused(flags, tmp_path):
    command = [*flags, "--logs", str(tmp_path), "--name", "run"]
    assert main(command) == 0
    with pytest.raises(UsageError, match="holds a run already"):
        main(command)
    with pytest.raises(UsageError, match=r"--lr was 0\.001, now 0\.1"):
        main([*command, "--lr", "0.1", "--resume", "latest"])


def test_a_students_hugging_face_tokenizer_lies_in_its_folder(flags, tmp_path):
    config = json.loads((ROOT / "tests" / "models" / "tiny-student.json").read_text())
    words = word_tokenizer(tmp_path / "words")
    config["text_cfg"] |= {"hf_tokenizer_name": str(words), "vocab_size": 13}
    path = tmp_path / "tiny-words.json"
    path.write_text(json.dumps(config))
    models = flags.index("--model-config") + 1
    command = [*flags[:models], str(path), *flags[models:], "--model", "tiny-words"]
    assert main([*command, "--logs", str(tmp_path), "--name", "run"]) == 0
    captions = ["a photo of the cat", "snow"]
    tokens = open_clip.get_tokenizer("tiny-words")(captions)
    words.rename(tmp_path / "gone")
    stock = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'run' / 'student'}")
    assert torch.equal(stock(captions), tokens)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1", b"{}", b""])
def test_a_file_that_holds_no_weights_is_refused_in_one_sentence(content, flags, tmp_path):
    file = tmp_path / "weights.pt"
    file.write_bytes(content)
    command = [*flags, "--distill=fd", "--distill-model=tiny-teacher", f"--logs={tmp_path}"]
    with pytest.raises(
        UsageError, match=r"'tiny-teacher' with weights .*weights\.pt' could not be"
    ):
        main([*command, "--distill-pretrained", str(file)])


@pytest.mark.parametrize("content", ["null", "3", "[]", "{}", '{"model_cfg": null}', "{"])
def test_a_teachers_damaged_configuration_is_named(content, flags, tmp_path):
    (tmp_path / "open_clip_config.json").write_text(content)
    command = [*flags, "--distill", "fd", "--distill-model", f"local-dir:{tmp_path}"]
    with pytest.raises((UsageError, BadFile), match=r"open_clip_config\.json"):
        main([*command, "--logs", str(tmp_path)])


def test_a_flag_file_that_shlex_cannot_read_is_named_by_its_line(tmp_path):
    recipe = tmp_path / "recipe.args"
    recipe.write_text("--lr 1\n--train-data 'some shards\n")
    with pytest.raises(UsageError, match=r"--train-data 'some shards.*No closing quotation"):
        parse_args([f"@{recipe}"])


def test_a_checkpoint_as_teacher_sees_images_as_its_run_did(flags, tmp_path):
    logs = ["--logs", str(tmp_path), "--log-every-n-steps", "1"]
    given = ["--model", "tiny-teacher", "--image-mean", "0.1", "0.2", "0.3"]
    assert main([*flags, *given, *logs, "--name", "teacher"]) == 0
    (weights,) = (tmp_path / "teacher" / "checkpoints").glob("step_*.pt")
    command = [*flags, *logs, "--distill", "fd", "--distill-model", "tiny-teacher"]
    assert main([*command, "--distill-pretrained", str(weights), "--name", "student"]) == 0
    (taught_by,) = json.loads((tmp_path / "student" / "teachers.json").read_text())["teachers"]
    assert taught_by["preprocess"]["mean"] == [0.1, 0.2, 0.3]


def test_a_teacher_is_named_by_its_run_its_student_or_its_weights(flags, teacher, tmp_path):
    student = Path(teacher.removeprefix("local-dir:"))
    run, file = student.parent, student / "open_clip_model.safetensors"
    for place in (run, f"local-dir:{run}", student):
        config = parse_args([*flags, "--distill", "kd", "--distill-model", str(place)])
        assert config.teachers == [(teacher, None)], place
    given = ["--distill", "kd", "--distill-model", "tiny-teacher", "--distill-pretrained", str(run)]
    assert parse_args([*flags, *given]).teachers == [("tiny-teacher", str(file))]
    assert main([*flags, *given, "--logs", str(tmp_path), "--name", "run"]) == 0
    (taught_by,) = json.loads((tmp_path / "run" / "teachers.json").read_text())["teachers"]
    model, _, _ = open_clip.create_model_and_transforms(teacher)
    assert taught_by["weights"] == weights_hash(model)


def test_a_bank_may_be_named_by_its_run_and_belongs_to_its_teachers_images(
    flags, bank, teacher, tmp_path
):
    command = [*flags, "--distill", "cifd", "--distill-model", teacher, "--logs", str(tmp_path)]
    assert main([*command, "--rdm-bank", str(bank.parent), "--name", "run"]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["rdm_bank"] == str(bank)
    other = shutil.copytree(bank, tmp_path / "bank")
    config = json.loads((other / "config.json").read_text())
    config["teacher"]["preprocess"]["mean"] = [0.5, 0.5, 0.5]
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="was trained on inputs prepared as"):
        main([*command, "--rdm-bank", str(other), "--name", "other"])


def test_the_first_ctrl_c_asks_to_stop_and_the_second_interrupts():
    stop = StopFlag(World())
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed() and stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        stop.close()


def test_a_hangup_stops_a_run_unless_it_is_ignored_as_under_nohup():
    for before, raised in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        signal.signal(signal.SIGHUP, before)
        stop = StopFlag(World())
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.raised() is raised
        stop.close()
        assert signal.getsignal(signal.SIGHUP) is before
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_run_goes_on_with_data_a_teacher_and_a_bank_that_have_moved_but_with_no_others(
    flags, teacher, bank, scenes, tmp_path
):
    def command(train: Path, teacher: str, bank: Path) -> list[str]:
        given = [
            *flags,
            "--train-data",
            str(train),
            "--distill",
            "cifd",
            "--distill-model",
            teacher,
        ]
        given += ["--rdm-bank", str(bank), "--logs", str(tmp_path), "--name", "run"]
        return [*given, "--epochs", "2", "--resume", "latest"]

    def moved(folder: Path, name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    assert main(command(scenes / "train", teacher, bank)) == 0
    (tmp_path / "run" / "finished.json").unlink()
    places = moved(scenes / "train", "data"), moved(Path(teacher.partition(":")[2]), "teacher")
    places = str(places[0] / "*.tar"), f"local-dir:{places[1]}", moved(bank, "bank")
    assert main(command(*places)) == 0
    (tmp_path / "run" / "finished.json").unlink()
    assert main([*flags, "--seed", "1", "--logs", str(tmp_path), "--name", "other"]) == 0
    rdm = [*flags, "--distill", "rdm", "--distill-model", teacher, "--rates", "300", "30"]
    assert main([*rdm, "--seed", "1", "--logs", str(tmp_path), "--name", "rdm"]) == 0
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(UsageError, match="--rdm-bank was"):
        main(command(*places[:2], tmp_path / "rdm" / "bank"))
    with pytest.raises(UsageError, match="--train-data was"):
        main(command(scenes / "val", *places[1:]))
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    with pytest.raises(UsageError, match="--rdm-bank was"):
        main([*command(*places), "--rdm-bank", ""])


def test_held_out_data_and_model_configs_may_move_too_but_not_change(flags, scenes, tmp_path):
    command = [*flags, "--logs", str(tmp_path), "--name", "run", "--resume", "latest"]
    assert main([*command, "--val-data", str(scenes / "val")]) == 0
    held_out = shutil.copytree(scenes / "val", tmp_path / "held out")
    configs = [shutil.copy(path, tmp_path) for path in CONFIGS]
    moved = ["--val-data", str(held_out), "--model-config", *configs]
    (tmp_path / "run" / "finished.json").unlink()
    assert main([*command, *moved]) == 0
    (tmp_path / "run" / "finished.json").unlink()
    with pytest.raises(UsageError, match="--val-data was"):
        main([*command, *moved, "--val-data", str(scenes / "train")])
    content = json.loads(Path(configs[0]).read_text())
    Path(configs[0]).write_text(json.dumps(content | {"quick_gelu": True}))
    with pytest.raises(UsageError, match="--model-config was"):
        main([*command, *moved])


def test_a_student_that_cannot_run_is_refused_before_its_bank_is_trained(flags, teacher, tmp_path):
    """It can be built, but its vocabulary is smaller than its tokenizer's."""
    config = json.loads((ROOT / "tests" / "models" / "tiny-student.json").read_text())
    config["text_cfg"]["vocab_size"] = 1000
    (tmp_path / "small.json").write_text(json.dumps(config))
    command = [*flags, "--distill", "cifd", "--distill-model", teacher, "--logs", str(tmp_path)]
    command += ["--model-config", *CONFIGS, str(tmp_path / "small.json"), "--model", "small"]
    with pytest.raises(UsageError, match="--model small can't encode an image and a caption"):
        main([*command, "--name", "run"])
    assert not (tmp_path / "run" / "rdm").exists()


def test_what_was_trained_is_saved_when_a_worker_dies(flags, tmp_path, monkeypatch):
    log = training.engine.loop._log

    def kill(*given):
        log(*given)
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        for worker in map(int, children):
            os.kill(worker, signal.SIGKILL)

    monkeypatch.setattr("training.engine.loop._log", kill)
    command = [*flags, "--workers", "1", "--epochs", "50", "--save-frequency", "0"]
    with pytest.raises(Failure, match=r"data worker \d+ was killed"):
        main([*command, "--logs", str(tmp_path), "--name", "run"])
    assert final(tmp_path / "run")["progress"]["step"] >= 1


def test_a_second_ctrl_c_ends_with_one_line_and_code_130(flags, tmp_path):
    """A terminal's goes to the workers too."""
    command = [*flags, "--logs", str(tmp_path), "--name", "run", "--epochs", "9999"]
    process = subprocess.Popen(
        [sys.executable, "-m", "training.main", *command, "--workers", "1"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not (tmp_path / "run" / "metrics.jsonl").is_file():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    while "SIGINT: saving step" not in process.stderr.readline():  # two at once may be seen as one
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    told = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 130 and told[-1] == "interrupted"
    assert not any("Traceback" in line for line in told), told


def test_a_sigmoid_student_ships_its_bias(flags, tmp_path):
    command = [*flags, "--siglip", "--loss-dist-impl", "shift", "--logs", str(tmp_path)]
    assert main([*command, "--name", "run"]) == 0
    shipped = open_clip.create_model(f"local-dir:{tmp_path / 'run' / 'student'}")
    assert abs(shipped.logit_bias.item() + 10) < 0.1, "begins as OpenCLIP's does"
    assert abs(shipped.logit_scale.exp().item() - 10) < 0.5
    assert torch.equal(final(tmp_path / "run")["state_dict"]["logit_bias"], shipped.logit_bias)


def test_a_missing_bank_and_a_foreign_bank_are_refused(flags, bank, teacher, tmp_path):
    command = [*flags, "--distill", "cifd", "--distill-model", teacher, "--logs", str(tmp_path)]
    with pytest.raises(UsageError, match="holds no RDM bank"):
        main([*command, "--rdm-bank", str(tmp_path)])
    assert main([*flags, "--logs", str(tmp_path), "--name", "other", "--seed", "1"]) == 0
    other = [*command, "--distill-model", f"local-dir:{tmp_path / 'other' / 'student'}"]
    with pytest.raises(UsageError, match="was trained on"):
        main([*other, "--rdm-bank", str(bank)])


def test_a_student_that_cannot_be_made_is_refused_before_its_bank_is_trained(
    flags, teacher, tmp_path
):
    command = [*flags, "--distill", "cifd", "--distill-model", teacher, "--logs", str(tmp_path)]
    command += ["--rates", "300", "--rdm-epochs", "1", "--name", "run"]
    with pytest.raises(UsageError, match="--model 'tiny-stuent'"):
        main([*command, "--model", "tiny-stuent"])
    assert not list(tmp_path.rglob("finished.json")), "the bank was trained in vain"


def test_a_run_with_a_bank_of_its_own_goes_on_where_it_was_moved_to(flags, teacher, tmp_path):
    command = [*flags, "--distill", "cifd", "--distill-model", teacher, "--name", "run"]
    command += ["--rates", "300", "--rdm-epochs", "1"]
    assert main([*command, "--logs", str(tmp_path / "a")]) == 0
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b" / "run" / "finished.json").unlink()
    assert main([*command, "--logs", str(tmp_path / "b"), "--resume", "latest"]) == 0


def test_rates_that_are_not_the_banks_are_refused(flags, bank, teacher, tmp_path):
    command = [*flags, "--distill", "cifd", "--distill-model", teacher, "--logs", str(tmp_path)]
    command += ["--rdm-bank", str(bank), "--name", "run"]
    with pytest.raises(UsageError, match=r"--rates \[1000.0\]: the bank"):
        main([*command, "--rates", "1000"])
    assert main(command) == 0
    rates = json.loads((bank / "config.json").read_text())["rates"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["rates"] == rates


def test_a_teacher_without_weights_is_refused(flags, teacher, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    config = Path(teacher.removeprefix("local-dir:")) / "open_clip_config.json"
    (folder / config.name).write_bytes(config.read_bytes())
    command = [*flags, "--distill", "fd", "--distill-model", f"local-dir:{folder}"]
    with pytest.raises(UsageError, match="could not be"):
        main([*command, "--logs", str(tmp_path)])


def test_remote_shards_refuse_what_needs_numbered_samples(flags, tmp_path):
    place = flags.index("--train-data")
    given = [*flags[:place], *flags[place + 2 :], "--train-data", "pipe:cat x.tar"]
    given += ["--train-num-samples", "100", "--logs", str(tmp_path)]
    for flag, value in {"train-data-upsampling-factors": ["1"], "dataset-resampled": []}.items():
        with pytest.raises(UsageError, match=f"--{flag} needs local --train-data"):
            main([*given, f"--{flag}", *value])


def test_the_command_itself_ends_with_one_line_and_a_code(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "training.main", "--distill", "cifd", "--train-data", "x.tar"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: --distill cifd needs a teacher")


def test_every_flag_of_open_clip_is_taken_or_refused_with_a_reason():
    theirs = {f"--{name.replace('_', '-')}" for name in vars(open_clip_parse_args([]))}
    ours = {option for action in parser()._actions for option in action.option_strings}
    refused = {flag for flags in UNSUPPORTED.values() for flag in flags.split()}
    missing = theirs - ours - refused
    assert not missing, f"neither taken nor refused: {sorted(missing)}"
    assert not ours & refused


def test_flag_files_may_be_followed_by_flags_that_win(tmp_path):
    recipe = tmp_path / "recipe.args"
    recipe.write_text("# a comment\n--train-data 'some shards'\n--lr 0.5 --epochs 3\n")
    args = parse_args([f"@{recipe}", "--lr", "0.25"])
    assert (args.train_data, args.lr, args.epochs) == ("some shards", 0.25, 3)


def test_failures_carry_documented_exit_codes():
    assert (Failure.exit_code, UsageError.exit_code, NonFinite.exit_code) == (1, 2, 3)
    assert (Stopped.exit_code, MachineFailure.exit_code) == (75, 76)


def cuda(text: str, name: str = "Unknown") -> str:
    """An error of CUDA, as torch words it."""
    place = "https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html"
    help = "CUDA kernel errors might be asynchronously reported at some other API call"
    return f"CUDA error: {text}\nSearch for `cudaError{name}' in {place} for more\n{help}, so the"


DEVICE = [
    ("an illegal memory access was encountered", "IllegalAddress"),
    ("uncorrectable ECC error encountered", "ECCUncorrectable"),
    ("uncorrectable NVLink error detected during the execution", "NvlinkUncorrectable"),
    ("Invalid access of peer GPU memory over nvlink or a hardware error", "Contained"),
    ("unspecified launch failure", "LaunchFailure"),
    ("unknown error",),
    ("CUDA-capable device(s) is/are busy or unavailable", "DevicesUnavailable"),
    ("no CUDA-capable device is detected", "NoDevice"),
    ("the launch timed out and was terminated", "LaunchTimeout"),
    ("system not yet initialized", "SystemNotReady"),
    ("CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`",),
]
PROGRAM = [
    ("device-side assert triggered", "Assert"),
    ("out of memory", "MemoryAllocation"),
    ("no kernel image is available for execution on the device", "NoKernelImageForDevice"),
    ("invalid device ordinal", "InvalidDevice"),
    ("CUDA driver version is insufficient for CUDA runtime version", "InsufficientDriver"),
    ("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",),
]
NCCL = [
    ("remote process exited or there was a network error, NCCL version 2.28.8", 76),
    ("unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.18.6", 76),
    ("invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.28.8", 1),
]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ESTALE, os.strerror(errno.ESTALE), "00000.tar"), 76),
        (RuntimeError("unable to open file <x> in read-only mode: Stale file handle (116)"), 76),
        (BadFile("run.json can't be read: [Errno 5] Input/output error: 'run.json'"), 76),
        (OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN), "0.tar"), 76),  # of Lustre
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1),
        *((RuntimeError(cuda(*error)), 76) for error in DEVICE),
        *((RuntimeError(cuda(*error)), 1) for error in PROGRAM),
        *((dist.DistBackendError(f"NCCL error in: NCCLUtils.hpp:268, {e}"), c) for e, c in NCCL),
        (RuntimeError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4)"), 76),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), 76),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), 1),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), 1),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), 1),
        (BadFile("run.json is damaged"), 2),
    ],
)
def test_a_failure_of_the_machine_has_a_code_of_its_own(error, code):
    """With which SLURM's jobs are put back into the queue, at most MAX_RESTARTS times in vain."""
    assert exit_code(error) == code


def test_piped_shards_stream_and_resume_at_a_shard(flags, scenes, tmp_path):
    piped = f"pipe:cat {scenes / 'train'}/00000.tar"
    command = [*flags, "--train-data", piped, "--logs", str(tmp_path), "--name", "run"]
    with pytest.raises(UsageError, match="--train-num-samples is needed"):
        main(command)
    assert main([*command, "--train-num-samples", "96"]) == 0
    assert [row["step"] for row in lines(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert json.loads((tmp_path / "run" / "data.json").read_text())["shards"] == 1


def test_a_held_out_batch_without_a_usable_sample_is_passed_over(
    flags, scenes, tmp_path, monkeypatch
):
    monkeypatch.setattr("training.clip.heldout.VALIDATION_BATCH", 29)  # of 30: the last is alone
    (source,) = (scenes / "val").glob("*.tar")
    data = bytearray(source.read_bytes())
    at = data.rindex(b"\x89PNG") + 1
    data[at : at + 3] = b"???"
    (tmp_path / "val.tar").write_bytes(data)
    command = [*flags, "--val-data", str(tmp_path / "val.tar"), "--logs", str(tmp_path)]
    assert main([*command, "--name", "run"]) == 0
    assert lines(tmp_path / "run", "val")[-1]["contrastive_loss"] > 0


def test_a_cooldown_is_as_large_a_part_of_stage_1_as_of_stage_2():
    config = parse_args(
        "--train-data x --distill cifd --distill-model local-dir:t --epochs 32 --rdm-epochs 8 "
        "--lr-scheduler const-cooldown --epochs-cooldown 4 --warmup 100".split()
    )
    stage1 = bank_config(config)
    assert (stage1.epochs, stage1.epochs_cooldown, stage1.warmup) == (8, 1, 25)


def test_too_many_bad_samples_stop_the_run(flags, scenes, tmp_path):
    shard = tmp_path / "broken"
    shard.mkdir()
    (source,) = (scenes / "train").glob("*.tar")
    data = bytearray(source.read_bytes())
    at = 0
    for _ in range(40):  # spoil forty images' headers; the tar stays whole
        at = data.index(b"\x89PNG", at) + 1
        data[at : at + 3] = b"???"
    (shard / "00000.tar").write_bytes(data)
    command = [*flags, "--train-data", str(shard), "--logs", str(tmp_path), "--name", "run"]
    with pytest.raises(UsageError, match=r"could not be used .*--max-bad-fraction 0\.01"):
        main(command)
    assert main([*command[:-1], "all", "--max-bad-fraction", "1"]) == 0
    assert sum(final(tmp_path / "all")["progress"]["skipped"].values()) >= 40
    (reasons,) = lines(tmp_path / "all", "skipped")[-1:]
    assert sum(v for k, v in reasons.items() if k not in ("kind", "step")) >= 40


#: The paper's; those of other authors are in tests/test_presets.py.
RECIPES = {
    path.stem: path
    for path in (ROOT / "slurm" / "recipes").glob("*.args")
    if path.stem not in ("clipkd", "mobileclip2", "tinyclip")
}


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_of_the_paper_parses(recipe):
    method = ["--distill", "clipkd"] if recipe.startswith("teacher_") else []
    args = parse_args([f"@{RECIPES[recipe]}", "--train-data", "shards", *method])
    assert args.epochs * args.train_num_samples == 96_000_000, "samples seen, as in the paper"


def test_tuples_on_the_command_line_are_what_a_cache_recorded_of_them():
    args = parse_args(["--train-data", "shards", "--aug-cfg", "scale=(0.5, 1.0)"])
    assert json.loads(json.dumps(args.aug_cfg)) == args.aug_cfg == {"scale": [0.5, 1.0]}
