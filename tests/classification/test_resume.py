"""A run that was stopped, at whatever step, goes on as if nothing had happened."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import training.classifier.run as classifier_run
from classification.command import needs_cifar, photo_flags, run_photos
from runs import assert_bit_equal, final, lines
from training.classify import main
from training.engine.control import STOPPED_EXIT
from training.engine.trainer import Trainer
from training.errors import Failure, UsageError


def signal_at(step: int) -> Callable:
    """`Trainer.step`, with a signal in the step of this number."""
    plain = Trainer.step

    def interrupted(self: Trainer, batch):
        values = plain(self, batch)
        if self.progress.step == step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return values

    return interrupted


def weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def straight(photos, known, tmp_path_factory) -> tuple[Path, list[str]]:
    """CIFD with its average of weights, two epochs of three steps; and its flags."""
    teacher, bank = known
    logs = tmp_path_factory.mktemp("straight")
    flags = [
        "--method=cifd",
        "--model=mobilenetv1_100",
        f"--teacher={teacher}",
        f"--rdm-bank={bank}",
    ]
    flags += ["--epochs=2", "--kd-dropout=0.25", "--lr=0.01", "--ema=0.7", f"--logs={logs}"]
    return run_photos(photos, "straight", *flags), flags


@pytest.mark.parametrize("step", [2, 3, 6])
def test_a_run_stopped_at_any_step_ends_in_the_same_bits(step, straight, photos, monkeypatch):
    whole, flags = straight
    name = f"stopped at {step}"
    monkeypatch.setattr(Trainer, "step", signal_at(step))
    assert main([*photo_flags(photos, name), *flags]) == STOPPED_EXIT
    monkeypatch.undo()
    run = whole.with_name(name)
    assert final(run)["progress"]["step"] == step
    assert not (run / "finished.json").exists() and not (run / "result.json").exists()
    run_photos(photos, name, *flags, "--resume=latest")
    assert weights(run) == weights(whole)
    assert_bit_equal(final(run), final(whole))
    assert [row["step"] for row in lines(run)] == [row["step"] for row in lines(whole)]


def test_a_killed_run_goes_on_from_the_last_step_that_was_saved(straight, photos):
    whole, flags = straight
    flags = [*flags, "--save-every-n-steps=1", "--keep=0"]
    run = run_photos(photos, "killed", *flags)
    saved = sorted((run / "checkpoints").glob("step_*.pt"))
    assert [int(path.stem[5:]) for path in saved] == [1, 2, 3, 4, 5, 6]
    for path in saved[4:]:  # as a kill in the fifth step would have left it
        path.unlink()
        path.with_suffix(".json").unlink()
    for name in ("finished.json", "model.safetensors", "result.json"):
        (run / name).unlink()
    run_photos(photos, "killed", *flags, "--resume=latest")
    assert weights(run) == weights(whole)


def test_teachers_and_what_helps_them_may_move_but_no_others_take_their_place(
    photos, known, another, tmp_path
):
    (teacher, bank), logs = known, f"--logs={tmp_path}"
    factors = ["--method=paraphraser", f"--teacher={teacher}", "--lr=0.001", logs]
    paraphraser = run_photos(photos, "paraphraser", *factors)

    def moved(run: Path) -> Path:
        return Path(shutil.copytree(run, tmp_path / "moved" / run.name, dirs_exist_ok=True))

    for method, helper in (("cifd", ("--rdm-bank", bank)), ("ft", ("--paraphraser", paraphraser))):
        own = [f"--method={method}", "--model=cnn2", logs, "--resume=latest"]
        for place in (lambda run: run), moved:
            given = [f"--teacher={place(teacher)}", f"{helper[0]}={place(helper[1])}"]
            run = run_photos(photos, method, *own, *given)
            (run / "finished.json").unlink()
    other = ["--method=kd", "--model=cnn2", logs, "--resume=latest"]
    run = run_photos(photos, "kd", *other, f"--teacher={teacher}")
    (run / "finished.json").unlink()
    with pytest.raises(UsageError, match=r"--teacher was '[0-9a-f]{16}', now '"):
        run_photos(photos, "kd", *other, f"--teacher={another}")


def test_the_average_of_weights_is_what_ships_and_changes_nothing_of_what_trains(straight, photos):
    averaged, flags = straight
    plain = run_photos(photos, "plain", *(f for f in flags if not f.startswith("--ema")))
    trained, task = final(averaged)["training"], final(averaged)["task"]
    assert_bit_equal(trained, final(plain)["task"])
    shipped = load_file(averaged / "model.safetensors")
    for name, tensor in shipped.items():
        assert tensor.equal(task[f"student.{name}"]), name
    moved = sum((t - trained[f"student.{n}"]).abs().sum().item() for n, t in shipped.items())
    assert moved > 0, "what ships is the last weights, not their average"
    with pytest.raises(UsageError, match=r"--ema was 0\.7, now None"):
        run_photos(
            photos, "straight", *(f for f in flags if not f.startswith("--ema")), "--resume=latest"
        )


@needs_cifar
def test_a_run_under_a_table_of_answers_ends_in_the_same_bits(home, run_cifar):
    flags = ["--method=cifd", "--model=cnn2", f"--teacher={home}/teacher", f"--rdm-bank={home}/rdm"]
    flags += ["--epochs=2", "--kd-dropout=0.25", "--augment=flip", "--holdout=32"]
    run = run_cifar(home, "straight", *flags)
    wanted, count = weights(run), (run / "metrics.jsonl").read_text().count("\n")
    # Back to the end of the first epoch, as a kill would have left it.
    newest = max((run / "checkpoints").glob("step_*.pt"))
    newest.unlink()
    newest.with_suffix(".json").unlink()
    for name in ("finished.json", "model.safetensors", "result.json"):
        (run / name).unlink()
    run_cifar(home, "straight", *flags, "--resume=latest")
    assert weights(run) == wanted
    assert (run / "metrics.jsonl").read_text().count("\n") == count


def test_a_signal_ends_a_run_that_makes_its_results_and_it_goes_on_there(
    photos, tmp_path, monkeypatch
):
    class Ended(Exception):
        pass

    def end(*_):
        raise Ended

    flags = ["--model=cnn2", f"--logs={tmp_path}"]
    monkeypatch.setattr(classifier_run, "measure", lambda *_: signal.raise_signal(signal.SIGUSR1))
    before = signal.signal(signal.SIGUSR1, end)
    try:
        with pytest.raises(Ended):
            run_photos(photos, "ended", *flags)
    finally:
        signal.signal(signal.SIGUSR1, before)
    run = tmp_path / "ended"
    trained = (run / "metrics.jsonl").read_text()
    assert not (run / "finished.json").exists()
    monkeypatch.undo()
    run_photos(photos, "ended", *flags, "--resume=latest")
    assert (run / "finished.json").is_file() and (run / "metrics.jsonl").read_text() == trained


def test_a_signal_in_the_last_validation_stops_a_run_before_its_results(
    photos, tmp_path, monkeypatch
):
    validate = Trainer.validate

    def signalled(*given):
        signal.raise_signal(signal.SIGTERM)
        return validate(*given)

    flags = ["--model=cnn2", "--holdout=1", f"--logs={tmp_path}"]
    monkeypatch.setattr(Trainer, "validate", signalled)
    assert main([*photo_flags(photos, "last"), *flags]) == STOPPED_EXIT
    monkeypatch.undo()
    run = tmp_path / "last"
    trained = (run / "metrics.jsonl").read_text()
    assert not (run / "result.json").exists()
    run_photos(photos, "last", *flags, "--resume=latest")
    assert (run / "finished.json").is_file() and (run / "metrics.jsonl").read_text() == trained


def test_a_finished_run_without_checkpoints_is_not_trained_again_for_its_test_figures(
    photos, tmp_path
):
    flags = ["--model=cnn2", f"--logs={tmp_path}"]
    run = run_photos(photos, "pruned", *flags)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(Failure, match=r"pruned/checkpoints holds no checkpoint, and .* shows that"):
        run_photos(photos, "pruned", *flags, "--resume=latest", "--final")
