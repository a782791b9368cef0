"""Teachers of classifiers: live or looked up, and what is refused of a run that is to teach."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from cifd_clip.classification.models import simple_cnn
from cifd_clip.files import BadFile
from classification.command import needs_cifar, run_photos
from classification.small import bank, generator, table
from training.classifier.cifar import Batches, mirrored
from training.classifier.teachers import TeacherNetworks, TeacherTable
from training.errors import UsageError


@pytest.mark.parametrize("form", ["classify", "reconstruct"])
def test_a_table_of_answers_says_what_the_live_teacher_says(form):
    model = simple_cnn("cnn2", generator=generator()).eval()
    live = TeacherNetworks([model], bank(form, [1.0, 5.0, 9.0], 256), [2, 0], [0.5, 0.25])
    data = table(24)
    kept = TeacherTable(live, data, "flip", ["hash"])
    for b in Batches(data, np.arange(24), "flip", 0, 8).epoch(0, 0, True):
        for ours, theirs in zip(kept(b), live(b), strict=True):
            torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.embedding, theirs.embedding, rtol=1e-4, atol=1e-4)
            assert (ours.space, ours.weight) == (theirs.space, theirs.weight)
    plain = data.batch(torch.tensor([3, 5]))
    turned = mirrored(plain)
    assert not torch.allclose(kept(plain)[0].logits, kept(turned)[0].logits)
    spaces = [o.space for o in kept(plain)]
    assert spaces == ([0, 0, 0] if form == "reconstruct" else [0, 1, 2])
    assert live.dims == ([256] if form == "reconstruct" else [256, 100, 100])


def test_kept_answers_are_read_again_and_their_cost_is_counted(tmp_path):
    live = TeacherNetworks([simple_cnn("cnn2", generator=generator()).eval()])
    data = table(8)
    first = TeacherTable(live, data, "flip", ["hash"], tmp_path)
    nobody = TeacherNetworks([simple_cnn("cnn2")])
    nobody.models[0].forward = nobody.models[0].features = None
    again = TeacherTable(nobody, data, "flip", ["hash"], tmp_path)
    for ours, theirs in zip(again(data.batch(torch.arange(8))), first(data.batch(torch.arange(8)))):
        assert torch.equal(ours.logits, theirs.logits)
        assert torch.equal(ours.embedding, theirs.embedding)
    assert first.saved == 0 < again.saved
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadFile, match=rf"--teacher-cache: {file} is damaged .*: remove it"):
        TeacherTable(nobody, data, "flip", ["hash"], tmp_path)
    for other in (["another"], "flip"), (["hash"], "none"):
        with pytest.raises(TypeError):  # other teachers and views are not those kept
            TeacherTable(nobody, data, other[1], other[0], tmp_path)


@needs_cifar
def test_answers_of_a_cache_make_the_same_student(home, run_cifar, tmp_path):
    flags = ["--method=kd", "--model=cnn2", f"--teacher={home}/teacher", "--epochs=1"]
    kept = f"--teacher-cache={tmp_path}"
    students = [
        run_cifar(home, f"student{i}", *flags, *cache)
        for i, cache in enumerate(([], [kept], [kept]))
    ]
    weights = {(run / "model.safetensors").read_bytes() for run in students}
    assert len(weights) == 1 and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UsageError, match="--teacher-cache keeps what teachers say about each view"):
        run_cifar(home, "crops", *flags, kept, "--augment=crop")


@needs_cifar
def test_a_student_of_a_subset_learns_from_a_teacher_of_all(run_cifar, tmp_path):
    kept = ["--holdout=64", "--epochs=1", "--batch-size=16"]
    run_cifar(tmp_path, "teacher", "--model=cnn2", *kept, "--subset=128")
    taught = ["--method=kd", "--model=cnn2", f"--teacher={tmp_path / 'teacher'}", *kept]
    cache = ["--augment=flip", f"--teacher-cache={tmp_path / 'answers'}"]
    for name, subset in (("some", 64), ("others", 96)):
        run_cifar(tmp_path, name, *taught, *cache, f"--subset={subset}")
    assert len(list((tmp_path / "answers").iterdir())) == 2, "answers of other rows were taken"


@needs_cifar
def test_a_teacher_that_has_seen_the_held_out_images_is_refused(home, run_cifar):
    flags = ["--method=kd", "--model=cnn2", f"--teacher={home}/teacher", "--holdout=64"]
    with pytest.raises(UsageError, match="it has seen what --holdout 64 would keep back"):
        run_cifar(home, "leak", *flags)


@pytest.mark.parametrize(
    "method, flag, student",
    [("rdm", "--rdm-bank", "cifd"), ("paraphraser", "--paraphraser", "ft")],
)
def test_what_has_seen_the_held_out_images_is_refused_whatever_its_teacher_saw(
    method, flag, student, photos
):
    def train(name: str, *flags: str) -> Path:
        return run_photos(photos, f"seen {method} {name}", *flags)

    under = f"--teacher={train('teacher', '--model=cnn2', '--lr=0.001', '--holdout=2')}"
    seen = train("seen", f"--method={method}", under, "--holdout=1")
    unseen = train("unseen", f"--method={method}", under, "--holdout=2")
    flags = [f"--method={student}", "--model=cnn2", "--lr=0.001", under, "--holdout=2"]
    refusal = f"{flag} {seen} was trained with --holdout 1: it has seen what --holdout 2 would keep"
    with pytest.raises(UsageError, match=refusal):
        train("leak", *flags, f"{flag}={seen}")
    train("student", *flags, f"{flag}={unseen}")


def test_stock_weights_of_another_size_are_refused(photos, tmp_path):
    weights = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18(num_classes=4).state_dict(), weights)
    flags = ["--method=kd", "--model=resnet8x4", f"--teacher=resnet18:{weights}"]
    with pytest.raises(UsageError, match=r"tells 4 classes apart, --data .* has 3"):
        run_photos(photos, "wrong", *flags)
    with pytest.raises(UsageError, match="holds no weights of resnet34"):
        run_photos(photos, "wrong", *flags[:2], f"--teacher=resnet34:{weights}")


@pytest.mark.parametrize("name", ["resnet18.pth", "resnet18.safetensors"])
def test_damaged_weights_are_named(name, photos, known, tmp_path):
    (tmp_path / name).write_bytes(b"no weights at all")
    flags = ["--method=kd", "--model=resnet8x4"]
    with pytest.raises(UsageError, match=f"{name} holds no weights of resnet18"):
        run_photos(photos, "wrong", *flags, f"--teacher=resnet18:{tmp_path / name}")
    teacher = shutil.copytree(known[0], tmp_path / "teacher")
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BadFile, match=f"--teacher: {weights} is damaged"):
        run_photos(photos, "wrong", *flags, f"--teacher={teacher}")


def test_more_held_out_images_than_there_are_is_refused_by_its_name(photos):
    with pytest.raises(UsageError, match=r"--holdout 999: there are \d+ training images"):
        run_photos(photos, "wrong", "--model=cnn2", "--holdout=999")


@pytest.mark.parametrize("flag", ["--teacher", "--rdm-bank", "--paraphraser"])
def test_a_run_of_training_main_is_refused_as_such(flag, photos, known, tmp_path):
    clip = tmp_path / "clip"
    clip.mkdir()
    config = {"format": 1, "distill": "none", "model": "ViT-S-32"}
    (clip / "config.json").write_text(json.dumps(config))
    (clip / "finished.json").write_text('{"format": 1}')
    under = {"--teacher": known[0], flag: clip}
    method = {"--rdm-bank": "cifd", "--paraphraser": "ft"}.get(flag, "kd")
    flags = [f"{name}={run}" for name, run in under.items()]
    with pytest.raises(UsageError, match=f"{flag} {clip} is a run of training.main, which trains"):
        run_photos(photos, "name", f"--method={method}", "--model=cnn2", *flags)


def test_a_run_that_is_not_finished_teaches_nobody(photos, known, tmp_path):
    (tmp_path / "config.json").write_bytes((known[0] / "config.json").read_bytes())
    with pytest.raises(UsageError, match="is not finished: continue it with --resume latest"):
        run_photos(photos, "name", "--method=kd", "--model=cnn2", f"--teacher={tmp_path}")
    with pytest.raises(UsageError, match=r"trained no classifier \(--method rdm\)"):
        run_photos(photos, "name", "--method=kd", "--model=cnn2", f"--teacher={known[1]}")
