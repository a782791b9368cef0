"""Supervised CIFD: its equations recomputed by hand, its draws, its data, its runs."""

import io
import json
import logging
import shutil
import signal
import tarfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import training.classifier.trainer as classify_trainer
from PIL import Image
from safetensors.torch import load_file

import training.classifier.run as classify
from cifd_clip import World
from cifd_clip.classification.models import build, simple_cnn
from cifd_clip.noise import derive_seed
from classification.small import generator, rdms
from eval import classifier_bank, report
from runs import lines
from test_launch import launch
from training.classifier.cifar import Batches, Table, load_cifar100, mirrored, normalise, split_rows
from training.classifier.config import parse_args, parser, run_config
from training.classifier.imagenet import PhotoBatches, check_classes, load_photos
from training.classifier.teachers import CachedTeachers, LiveTeachers
from training.engine.control import STOPPED_EXIT
from training.engine.run import RunDirectory
from training.errors import UsageError

CIFAR = Path(__file__).parents[3] / "shared" / "data"
needs_cifar = pytest.mark.skipif(
    not (CIFAR / "cifar100_train.npz").is_file(), reason="needs CIFAR-100 in ../shared/data"
)


def table(samples: int) -> Table:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (samples, 32, 32, 3), dtype=np.uint8)
    return Table(torch.from_numpy(images), torch.from_numpy(rng.integers(0, 100, samples)), "h")


# -- data and teachers -----------------------------------------------------------------------------


def test_what_is_held_out_does_not_depend_on_the_seed_and_grows_by_adding():
    train, small = split_rows(1000, 50)
    _, large = split_rows(1000, 100)
    assert set(small) <= set(large) and len(small) == 50
    assert sorted([*train, *small]) == list(range(1000))


def test_an_epoch_visits_every_training_row_once_and_the_next_in_another_order():
    rows, _ = split_rows(64, 16)
    batches = Batches(table(64), rows, "flip", seed=0, size=8)
    first = torch.cat([b.rows for b in batches.epoch(0, 0, False)])
    assert sorted(first.tolist()) == rows.tolist()
    assert not torch.equal(first, torch.cat([b.rows for b in batches.epoch(1, 0, False)]))
    late = torch.cat([b.rows for b in batches.epoch(0, 2, False)])
    assert torch.equal(late, first[16:]), "an epoch resumed in the middle must go on as it was"


def test_a_flip_mirrors_and_a_crop_is_a_shifted_window():
    data = table(32)
    rows = np.arange(32)
    for b in Batches(data, rows, "flip", 0, 32).epoch(0, 0, True):
        assert 0 < b.views.sum() < 32
        for row, view, image in zip(b.rows, b.views, b.images):
            plain = data.batch(row[None]).images[0]
            torch.testing.assert_close(image, plain.flip(2) if view else plain)
    padded = F.pad(data.images.permute(0, 3, 1, 2), (4, 4, 4, 4))
    for b in Batches(data, rows, "crop", 0, 32).epoch(0, 0, True):
        whole = data.batch(b.rows).images
        assert not torch.equal(b.images, whole)
        image, view = b.images[0], bool(b.views[0])
        windows = padded[b.rows[0]].unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 9, 9, 32, 32)
        windows = windows.permute(1, 2, 3, 4, 0).reshape(81, 32, 32, 3)
        plain = normalise(windows.flip(2) if view else windows)
        assert any(torch.allclose(image, window) for window in plain)


@pytest.mark.parametrize("form", ["classify", "reconstruct"])
def test_a_cached_teacher_says_what_the_live_one_says(form):
    model = simple_cnn("cnn2", generator=generator()).eval()
    modules = rdms(form, [1.0, 5.0, 9.0], 256)
    live = LiveTeachers([model], modules, [2, 0], [0.5, 0.25])
    data = table(24)
    cached = CachedTeachers(live, data, "flip", ["hash"])
    for b in Batches(data, np.arange(24), "flip", 0, 8).epoch(0, 0, True):
        for ours, theirs in zip(cached(b), live(b), strict=True):
            torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.embedding, theirs.embedding, rtol=1e-4, atol=1e-4)
            assert (ours.space, ours.weight) == (theirs.space, theirs.weight)
    plain = data.batch(torch.tensor([3, 5]))
    turned = mirrored(plain)
    assert not torch.allclose(cached(plain)[0].logits, cached(turned)[0].logits)
    spaces = [o.space for o in cached(plain)]
    assert spaces == ([0, 0, 0] if form == "reconstruct" else [0, 1, 2])
    assert live.dims == ([256] if form == "reconstruct" else [256, 100, 100])


def test_kept_answers_are_read_again_and_their_cost_is_counted(tmp_path):
    live = LiveTeachers([simple_cnn("cnn2", generator=generator()).eval()])
    data = table(8)
    first = CachedTeachers(live, data, "flip", ["hash"], tmp_path)
    nobody = LiveTeachers([simple_cnn("cnn2")])
    nobody.models[0].forward = nobody.models[0].features = None
    again = CachedTeachers(nobody, data, "flip", ["hash"], tmp_path)
    for ours, theirs in zip(again(data.batch(torch.arange(8))), first(data.batch(torch.arange(8)))):
        assert torch.equal(ours.logits, theirs.logits)
        assert torch.equal(ours.embedding, theirs.embedding)
    assert first.saved == 0 < again.saved
    for other in (["another"], "flip"), (["hash"], "none"):
        with pytest.raises(TypeError):  # other teachers and views are not those kept
            CachedTeachers(nobody, data, other[1], other[0], tmp_path)


@pytest.mark.parametrize("layout", ["cifar100_test.npz", "test/0.tar", "cifar-100-python/test"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 was a file", b"nonsense" * 200])
def test_damaged_data_are_named_in_a_sentence(layout, content, tmp_path):
    (tmp_path / layout).parent.mkdir(exist_ok=True)
    (tmp_path / layout).write_bytes(content)
    named = layout.removesuffix("/test")
    with pytest.raises(UsageError, match=rf"^--data: {tmp_path}/{named} is damaged: [^\n]+$"):
        load_cifar100(tmp_path, "test")


def test_an_image_that_is_damaged_or_of_another_size_is_no_traceback(tmp_path):
    def pack(*images: bytes) -> None:
        offsets = np.cumsum([0, *map(len, images)])
        blob = np.frombuffer(b"".join(images), np.uint8)
        labels = np.zeros(len(images), np.int64)
        np.savez(tmp_path / "cifar100_test.npz", webp=blob, offsets=offsets, labels=labels)

    def webp(side: int) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", (side, side)).save(out, "webp")
        return out.getvalue()

    for images in ([webp(32), webp(32)[:20]], [webp(32), webp(31)]):
        pack(*images)
        with pytest.raises(UsageError, match="npz is damaged: "):
            load_cifar100(tmp_path, "test")
    pack(webp(32))
    with pytest.raises(UsageError, match=r"has 1 images .* and 1 labels, CIFAR-100's has 10000"):
        load_cifar100(tmp_path, "test")


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model cnn3", "--model cnn3: there are cnn10"),
        ("--method kd --model cnn2", "--method kd needs one --teacher RUN, got 0"),
        ("--method kd --model cnn2 --teacher a,b", "needs one --teacher RUN, got 2"),
        ("--method none", "--method none needs --model"),
        ("--method rdm --teacher a --model cnn2", "trains no --model"),
        ("--model cnn2 --teacher a", "has no --teacher"),
        ("--method cifd --model cnn2 --teacher a --rates 1", "--rdm-bank RUN, which is missing"),
        ("--method kd --model cnn2 --teacher a --rdm-bank b", "--rdm-bank belongs to --method"),
        ("--method ft --model cnn2 --teacher a", "--paraphraser RUN go together"),
        ("--model cnn2 --epochs 2 --warmup-epochs 2", "leaves nothing"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        parse_args(["--data", "x", *flags.split()])


KD, CIFD = "--method kd --model cnn2 --teacher a", "--method cifd --model cnn2 --teacher a"
DGKD, RDM = "--method dgkd --model cnn2 --teacher a,b", "--method rdm --teacher a"


@pytest.mark.parametrize(
    "flags",
    [
        "--grad-clip-norm -1",
        "--grad-clip-norm 0",
        "--holdout -1000",
        "--subset -5",
        "--lr -1",
        "--lr 0",
        "--density-lr 0",
        "--wd -1",
        "--gamma -0.1",
        "--warmup-epochs nan",
        "--momentum 2",
        "--momentum -0.1",
        "--workers -1",
        "--keep -1",
        "--epochs 0",
        "--tau nan",
        "--label-smoothing 2",
        "--lambda-ce -1",
        f"--kd-dropout 1 {KD}",
        f"--lambda-kl -1 {KD}",
        f"--lambda-i -1 {CIFD}",
        f"--lambda-emb nan {CIFD} --rdm-bank b",
        f"--lambda-n 1 -1 {CIFD} --rdm-bank b",
        f"--rates 10 10 {CIFD} --rdm-bank b",
        "--lambda-ft -1 --method ft --model cnn2 --teacher a --paraphraser p",
        "--factors 0 --method paraphraser --teacher a",
        "--factors -3 --method paraphraser --teacher a",
        f"--rates -1 0 {RDM}",
        f"--rates nan {RDM}",
        f"--rates 10 3 10.0000001 {RDM}",
        f"--rdm-hidden 8 0 8 {RDM}",
    ],
)
def test_a_value_out_of_range_is_refused_by_its_flag(flags):
    model = "" if "--method" in flags else "--model cnn2"
    with pytest.raises(UsageError, match=f"^{flags.split()[0]} (must be|has one of)"):
        parse_args(["--data", "x", *flags.split(), *model.split()])


@pytest.mark.parametrize(
    "flags",
    [
        f"--lambda-n 0.1 {DGKD}",
        f"--lambda-n 0.1 {CIFD}",
        "--augment none --dataset imagenet --model resnet18",
        "--augment flip --dataset imagenet --model resnet18",
        f"--rdm-form reconstruct {CIFD} --rdm-bank b",
        f"--rdm-form classify {CIFD} --rdm-bank b",
        f"--rdm-hidden 8 8 8 {CIFD} --rdm-bank b",
        f"--lambda-i 5 {KD}",
        f"--no-ibm {KD}",
        f"--lambda-ft 3 {KD}",
        f"--factors 3 {KD}",
        f"--embedding-loss smooth_l1 {KD}",
        f"--kd-dropout 0.25 {RDM}",
        f"--label-smoothing 0.1 {RDM}",
        "--lambda-ce 1 --method paraphraser --teacher a",
        "--kd-dropout 0.25 --model cnn2",
    ],
)
def test_a_flag_that_would_have_no_effect_is_refused(flags):
    said = f"^{flags.split()[0]}.*( belongs to --method | is of )"
    with pytest.raises(UsageError, match=said):
        parse_args(["--data", "x", *flags.split()])


def test_flags_that_are_not_given_are_recorded_as_ever(tmp_path):
    config = run_config(parse_args(["--data=x", "--dataset=imagenet", "--model=resnet18"]))
    as_ever = {"augment": "none", "rdm_form": "classify", "embedding_loss": "mse", "no_ibm": False}
    as_ever |= {"lambda_n": [1.0], "lambda_i": 0.005, "lambda_ft": 500.0, "kd_dropout": 0.0}
    assert config.items() >= as_ever.items()
    older = {name: value for name, value in config.items() if name not in as_ever}
    (tmp_path / "config.json").write_text(json.dumps(older))
    RunDirectory(tmp_path, config, parser(), resume=True)  # a run older than the flags


def test_the_learning_rate_starts_and_ends_where_it_should():
    def at(flags: str, step: int) -> float:
        args = parse_args(["--data", "x", "--model", "cnn2", *flags.split()])
        return classify_trainer.schedule(args, step, 10)

    assert at("--epochs 4", 0) == 1 and at("--epochs 4", 39) < 0.01
    assert at("--epochs 4", 20) == pytest.approx(0.5)
    assert at("--epochs 4 --warmup-epochs 1", 4) == pytest.approx(0.5)
    assert at("--epochs 4 --warmup-epochs 1", 10) == 1
    multistep = "--epochs 9 --lr-schedule multistep --milestones 2 5"
    assert [at(multistep, s) for s in (19, 20, 50)] == pytest.approx([1, 0.1, 0.01])


@pytest.fixture(scope="module")
def run_classify():
    """``training.classify`` in this process on a part of CIFAR-100, which is decoded once."""
    loaded = classify.load_cifar100
    classify.load_cifar100 = cache(load_cifar100)

    def go(logs: Path, name: str, *flags: str) -> Path:
        common = ["--data", str(CIFAR), "--logs", str(logs), "--name", name, "--subset", "256"]
        assert classify.main([*common, "--device=cpu", "--batch-size", "32", *flags]) == 0
        return logs / name

    yield go
    classify.load_cifar100 = loaded


@pytest.fixture(scope="module")
def home(tmp_path_factory, run_classify):
    """A teacher, its RDMs and a paraphraser."""
    logs = tmp_path_factory.mktemp("classify")
    small = ("--epochs", "1", "--holdout", "32")
    teacher = run_classify(logs, "teacher", "--model", "cnn4", *small)
    for method in ("rdm", "paraphraser"):
        run_classify(logs, method, "--method", method, "--teacher", str(teacher), *small)
    return logs


METHODS = {
    "kd": [],
    "takd": [],
    "dgkd": ["--kd-dropout", "0.25"],
    "ft": ["--paraphraser={home}/paraphraser"],
    "cifd": ["--rdm-bank={home}/rdm", "--rates", "1", "10", "--augment", "crop"],
}


@needs_cifar
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_real_images(method, home, run_classify):
    teachers = f"{home}/teacher,{home}/teacher" if method == "dgkd" else f"{home}/teacher"
    flags = [flag.format(home=home) for flag in METHODS[method]]
    flags += ["--epochs", "1", "--method", method, "--model", "cnn2", "--teacher", teachers]
    run = run_classify(home, method, *flags, "--holdout", "32")
    result = json.loads((run / "result.json").read_text())
    assert result["method"] == method and result["teacher"] == "cnn4"
    assert result["metrics"] is None, "the test split is looked at with --final alone"
    assert 0 <= result["holdout_metrics"]["acc1"] <= result["holdout_metrics"]["acc5"] <= 1
    shipped = load_file(run / "model.safetensors")
    assert set(shipped) == set(simple_cnn("cnn2").state_dict()), "a student ships nothing else"


@needs_cifar
def test_a_resumed_run_ends_in_the_same_bits(home, run_classify):
    flags = ["--method=cifd", "--model=cnn2", f"--teacher={home}/teacher", f"--rdm-bank={home}/rdm"]
    flags += ["--epochs=2", "--kd-dropout=0.25", "--augment=flip", "--holdout=32"]
    straight = run_classify(home, "straight", *flags)
    wanted = (straight / "model.safetensors").read_bytes()
    lines = (straight / "metrics.jsonl").read_text().count("\n")
    # Back to the end of the first epoch, as a kill would have left it.
    newest = max((straight / "checkpoints").glob("step_*.pt"))
    newest.unlink()
    newest.with_suffix(".json").unlink()
    for name in ("finished.json", "model.safetensors", "result.json"):
        (straight / name).unlink()
    run_classify(home, "straight", *flags, "--resume=latest")
    assert (straight / "model.safetensors").read_bytes() == wanted
    assert (straight / "metrics.jsonl").read_text().count("\n") == lines


@needs_cifar
def test_answers_of_a_cache_make_the_same_student(home, run_classify, tmp_path):
    flags = ["--method=kd", "--model=cnn2", f"--teacher={home}/teacher", "--epochs=1"]
    kept = f"--teacher-cache={tmp_path}"
    students = [
        run_classify(home, f"student{i}", *flags, *cache)
        for i, cache in enumerate(([], [kept], [kept]))
    ]
    weights = {(run / "model.safetensors").read_bytes() for run in students}
    assert len(weights) == 1 and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UsageError, match="--teacher-cache keeps what teachers say about each view"):
        run_classify(home, "crops", *flags, kept, "--augment=crop")


@needs_cifar
def test_a_teacher_that_has_seen_the_held_out_images_is_refused(home, run_classify):
    flags = ["--method=kd", "--model=cnn2", f"--teacher={home}/teacher", "--holdout=64"]
    with pytest.raises(UsageError, match="it has seen what --holdout 64 would keep back"):
        run_classify(home, "leak", *flags)


@needs_cifar
def test_rdms_leave_one_result_per_rate(home):
    rates = [1, 3, 10, 30, 100]
    for rate in rates:
        result = json.loads((home / "rdm" / f"result_R{rate}.json").read_text())
        assert result["role"] == "rdm" and result["rate"] == rate
        assert result["train_metrics"]["bits"] > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three classes of generated photos in ImageNet's layout."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1)):
        for name in ("n01440764", "n01443537", "n01484850"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (6, 7 + i, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((250, 240))
                image.save(root / split / name / f"{name}_{i}.JPEG")
    return root


def folder_flags(folder: Path, name: str) -> list[str]:
    common = ["--dataset=imagenet", f"--data={folder}", f"--logs={folder}/runs", f"--name={name}"]
    return [*common, "--device=cpu", "--batch-size=3", "--epochs=1", "--workers=1"]


def run_folder(folder: Path, name: str, *flags: str) -> Path:
    assert classify.main([*folder_flags(folder, name), *flags]) == 0
    return folder / "runs" / name


def test_imagenets_layout_trains_under_a_live_teacher(folder):
    teacher = run_folder(folder, "teacher", "--model=resnet18")
    under = f"--teacher={teacher}"
    rates = ["--rdm-form=reconstruct", "--rates=1000", "--embedding-loss=smooth_l1"]
    rdm = run_folder(folder, "rdm", "--method=rdm", under, *rates)
    flags = ["--method=cifd", "--model=mobilenetv1_100", under, f"--rdm-bank={rdm}", "--final"]
    student = run_folder(folder, "student", *flags)
    result = json.loads((student / "result.json").read_text())
    assert result["metrics"]["acc5"] == 1, "with three classes everything is among five"
    assert load_file(student / "model.safetensors")["head.weight"].shape == (3, 1024)


@pytest.mark.parametrize("shell", ["of sbatch or salloc", "of an interactive step"])
def test_a_command_typed_in_an_allocation_of_several_tasks_is_one_process(
    shell, folder, monkeypatch
):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    allocation = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    if "step" in shell:
        allocation["SLURM_STEP_NUM_TASKS"] = "1"
    for name, value in allocation.items():
        monkeypatch.setenv(name, value)
    run = run_folder(folder, f"typed in a shell {shell}", "--model=cnn2")
    assert json.loads((run / "result.json").read_text())["provenance"]["processes"] == 1


def copied(folder: Path, to: Path) -> Path:
    for split in ("train", "val"):
        shutil.copytree(folder / split, to / split)
    return to


def test_a_test_split_is_looked_for_and_its_classes_checked_before_training(folder, tmp_path):
    data = copied(folder, tmp_path)

    def refused(message: str) -> None:
        with pytest.raises(UsageError, match=message):
            run_folder(data, "student", "--model=cnn2", "--final")
        assert not any((data / "runs" / "student").iterdir()), "it has begun"

    other = (data / "val" / "n01443537").rename(data / "val" / "n02")
    refused("classes are not those trained on: it lacks n01443537 and it has n02$")
    shutil.rmtree(other)
    refused("classes are not those trained on: it lacks n01443537$")
    shutil.rmtree(data / "val")
    refused("there is no val/ with a folder per class")
    run_folder(data, "student", "--model=cnn2")  # which needs none


def test_classes_without_names_are_compared_by_their_number(folder):
    test = load_photos(folder, "val", 0)
    names = test.class_names
    nameless = replace(test, class_names=("0", "1", "2"), named=False)
    check_classes(folder, test, names, 3)
    check_classes(folder, test, None, 3)
    check_classes(folder, nameless, names, 3)
    for found, trained in ((test, None), (nameless, [*names, "n02"]), (nameless, None)):
        with pytest.raises(UsageError, match=r"not those trained on: it has 3, not 4$"):
            check_classes(folder, found, trained, 4)
    with pytest.raises(UsageError, match="it lacks a, b, c and 1 more and it has n01440764, n0"):
        check_classes(folder, test, list("abcd"), 4)
    with pytest.raises(UsageError, match=r"not those trained on: they come in another order$"):
        check_classes(folder, test, names[::-1], 3)


@pytest.fixture(scope="module")
def known(folder) -> tuple[Path, Path]:
    """A teacher of the folder's classes, and its RDMs."""
    flags = ["--final", "--lr=0.001"]
    teacher = run_folder(folder, "known", "--model=resnet18", *flags)
    under = ["--method=rdm", f"--teacher={teacher}", "--rates", "10", "300"]
    return teacher, run_folder(folder, "bank", *under, *flags)


@pytest.fixture(scope="module")
def other(folder) -> Path:
    """Another teacher."""
    return run_folder(folder, "another teacher", "--model=cnn4", "--lr=0.001")


def logs_open_in(folder: Path) -> list[Path]:
    handlers = logging.getLogger().handlers
    files = [Path(h.baseFilename) for h in handlers if isinstance(h, logging.FileHandler)]
    return [file for file in files if file.is_relative_to(folder)]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--lambda-n", "1", "1", "1"], "--lambda-n has 3 values for 2 assistants"),
        (["--rates", "7"], "--rates 7: the bank .* has 10, 300"),
        (["--teacher-cache=answers"], "--teacher-cache keeps what teachers say about each view"),
        (["--teacher={other}"], "--rdm-bank: .* but the teacher is cnn4 with weights"),
    ],
)
def test_a_refused_command_leaves_its_name_to_the_corrected_one(
    wrong, message, folder, known, other, tmp_path
):
    teacher, bank = known
    right = ["--method=cifd", "--model=cnn2", f"--teacher={teacher}", f"--rdm-bank={bank}"]
    right.append(f"--logs={tmp_path}")
    with pytest.raises(UsageError, match=message):
        run_folder(folder, "name", *right, *(flag.format(other=other) for flag in wrong))
    assert not any((tmp_path / "name").iterdir()) and not logs_open_in(tmp_path)
    run_folder(folder, "name", *right)
    assert (tmp_path / "name" / "finished.json").is_file()


@pytest.mark.parametrize("flag", ["--teacher", "--rdm-bank", "--paraphraser"])
def test_a_run_of_training_main_is_refused_as_such(flag, folder, known, tmp_path):
    clip = tmp_path / "clip"
    clip.mkdir()
    (clip / "config.json").write_text(json.dumps({"distill": "none", "model": "ViT-S-32"}))
    (clip / "finished.json").write_text("{}")
    under = {"--teacher": known[0], flag: clip}
    method = {"--rdm-bank": "cifd", "--paraphraser": "ft"}.get(flag, "kd")
    flags = [f"{name}={run}" for name, run in under.items()]
    with pytest.raises(UsageError, match=f"{flag} {clip} is a run of training.main, which trains"):
        run_folder(folder, "name", f"--method={method}", "--model=cnn2", *flags)


def test_a_run_that_fails_does_not_go_on_logging(folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(classify, "Sinks", full)
    with pytest.raises(OSError, match="no space left"):
        run_folder(folder, "full", "--model=cnn2", f"--logs={tmp_path}")
    assert (tmp_path / "full" / "out.log").is_file(), "it has begun"
    assert not logs_open_in(tmp_path)


def test_a_signal_ends_a_run_that_makes_its_results_and_it_goes_on_there(folder, monkeypatch):
    class Ended(Exception):
        pass

    def end(*_):
        raise Ended

    monkeypatch.setattr(classify, "evaluate", lambda *_: signal.raise_signal(signal.SIGUSR1))
    before = signal.signal(signal.SIGUSR1, end)
    try:
        with pytest.raises(Ended):
            run_folder(folder, "ended", "--model=cnn2")
    finally:
        signal.signal(signal.SIGUSR1, before)
    run = folder / "runs" / "ended"
    trained = (run / "metrics.jsonl").read_text()
    assert not (run / "finished.json").exists()
    monkeypatch.undo()
    run_folder(folder, "ended", "--model=cnn2", "--resume=latest")
    assert (run / "finished.json").is_file() and (run / "metrics.jsonl").read_text() == trained


def test_a_signal_in_the_last_validation_stops_a_run_before_its_results(folder, monkeypatch):
    def signalled(*given):
        signal.raise_signal(signal.SIGTERM)
        return classify.evaluate(*given)

    flags = ["--model=cnn2", "--holdout=1"]
    monkeypatch.setattr(classify_trainer, "evaluate", signalled)
    assert classify.main([*folder_flags(folder, "last"), *flags]) == STOPPED_EXIT
    monkeypatch.undo()
    run = folder / "runs" / "last"
    trained = (run / "metrics.jsonl").read_text()
    assert not (run / "result.json").exists()
    run_folder(folder, "last", *flags, "--resume=latest")
    assert (run / "finished.json").is_file() and (run / "metrics.jsonl").read_text() == trained


@pytest.mark.parametrize("method", ["none", "rdm"])
def test_a_finished_run_is_asked_for_its_test_figures_afterwards(
    method, folder, known, monkeypatch
):
    teacher = ["--method=rdm", f"--teacher={known[0]}", "--rates", "10", "300"]
    flags = teacher if method == "rdm" else ["--model=cnn2", "--lr=0.001"]
    straight = run_folder(folder, f"straight {method}", *flags, "--final")
    later = run_folder(folder, f"later {method}", *flags)
    assert "test: not looked at" in (later / "out.log").read_text()
    monkeypatch.setattr(classify_trainer.Trainer, "step", None)
    again = ["--resume=latest", "--final"]
    run_folder(folder, later.name, *flags, *again)
    files = sorted(path.name for path in later.glob("result*.json"))
    assert files == sorted(path.name for path in straight.glob("result*.json")) and files
    for file in files:
        results = [json.loads((run / file).read_text()) for run in (straight, later)]
        for part in ("metrics", "train_metrics"):
            assert results[0][part] == results[1][part] and results[0][part]
        assert results[1]["provenance"]["data"] == results[0]["provenance"]["data"]
    assert {path.name for path in later.iterdir()} == {path.name for path in straight.iterdir()}

    before = {path: path.stat().st_mtime_ns for path in later.rglob("*")}
    run_folder(folder, later.name, *flags, *again)
    run_folder(folder, later.name, *flags, "--resume=latest")  # --final is switched off again
    assert {path: path.stat().st_mtime_ns for path in later.rglob("*")} == before


def test_a_finished_run_without_checkpoints_is_not_trained_again_for_its_test_figures(folder):
    run = run_folder(folder, "pruned", "--model=cnn2")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UsageError, match=r"--final: .*pruned is finished, and there is no checkp"):
        run_folder(folder, "pruned", "--model=cnn2", "--resume=latest", "--final")


def test_final_metrics_are_told_in_percent():
    measured = {"metrics": {"acc1": 0.4821, "acc5": 0.77}, "holdout_metrics": None}
    measured["train_metrics"] = {"acc1": [0.379, 0.4745], "bits": [24.26, 35.0]}
    assert classify.told(measured) == [
        "test: top-1 48.21 %, top-5 77.00 %",
        "training images: top-1 37.90 / 47.45 %, bits 24.26 / 35",
    ]
    unseen = classify.told({**measured, "metrics": None})
    assert unseen[-1] == "test: not looked at; --final --resume latest does so"


@pytest.mark.parametrize(
    "method, flag, student",
    [("rdm", "--rdm-bank", "cifd"), ("paraphraser", "--paraphraser", "ft")],
)
def test_what_has_seen_the_held_out_images_is_refused_whatever_its_teacher_saw(
    method, flag, student, folder
):
    def train(name: str, *flags: str) -> Path:
        return run_folder(folder, f"seen {method} {name}", *flags)

    under = f"--teacher={train('teacher', '--model=cnn2', '--lr=0.001', '--holdout=2')}"
    seen = train("seen", f"--method={method}", under, "--holdout=1")
    unseen = train("unseen", f"--method={method}", under, "--holdout=2")
    flags = [f"--method={student}", "--model=cnn2", "--lr=0.001", under, "--holdout=2"]
    said = f"{flag} {seen} was trained with --holdout 1: it has seen what --holdout 2 would keep"
    with pytest.raises(UsageError, match=said):
        train("leak", *flags, f"{flag}={seen}")
    train("student", *flags, f"{flag}={unseen}")


def test_rdms_are_not_measured_on_other_classes_than_their_own(folder, known, tmp_path):
    _, bank = known
    out = tmp_path / "out.json"
    (tmp_path / "data").mkdir()
    data = copied(folder, tmp_path / "data")
    (data / "val" / "n01443537").rename(data / "val" / "n02")
    command = [str(bank), f"--data={data}", "--workers=0", f"--out={out}"]
    with pytest.raises(UsageError, match=r"it lacks n01443537 and it has n02$"):
        classifier_bank.main(command)
    older = shutil.copytree(bank, tmp_path / "older")  # a bank that does not know their names
    record = json.loads((older / "data.json").read_text())
    del record["train"]["classes"]
    (older / "data.json").write_text(json.dumps(record))
    shutil.rmtree(data / "val" / "n02")
    with pytest.raises(UsageError, match=r"it has 2, not 3$"):
        classifier_bank.main([str(older), *command[1:]])
    assert not out.exists()


def test_a_file_of_another_banks_result_is_not_this_banks(folder, known, tmp_path, capsys):
    teacher, bank = known
    out = tmp_path / "out.json"
    command = [f"--data={folder}", "--workers=0", f"--out={out}"]
    other = run_folder(folder, "other", "--method=rdm", f"--teacher={teacher}", "--rates", "10")
    classifier_bank.main([str(other), *command])
    classifier_bank.main([str(other), *command])
    assert capsys.readouterr().out.splitlines()[-1] == f"measured already, skipped ({out})"
    with pytest.raises(UsageError, match=r"another measurement \(rates, weights differ\)"):
        classifier_bank.main([str(bank), *command])
    result = json.loads(out.read_text())
    del result["provenance"]["weights"]  # as older ones
    out.write_text(json.dumps(result))
    classifier_bank.main([str(other), *command])
    out.write_text('{"provenance": "none"}')
    with pytest.raises(UsageError, match=r"holds no result of eval\.classifier_bank"):
        classifier_bank.main([str(other), *command])


def test_what_rdms_still_know_is_measured_as_after_their_training_and_drawn(
    folder, known, tmp_path
):
    teacher, bank = known
    classifier_bank.main([str(bank), f"--data={folder}", "--workers=1"])
    (path,) = (bank / "results" / "bank").glob("*.json")
    found = json.loads(path.read_text())
    for one in found["assistants"]:
        result = json.loads((bank / f"result_R{one['rate']:g}.json").read_text())
        assert one["metrics"]["acc1"] == pytest.approx(result["metrics"]["acc1"])
        assert one["bits"]["image"] == pytest.approx(result["metrics"]["bits"], rel=1e-4)
    known = json.loads((teacher / "result.json").read_text())
    assert found["teacher"]["metrics"]["acc1"] == pytest.approx(known["metrics"]["acc1"])
    assert result["provenance"]["teachers"] == [known["provenance"]["weights"]]
    assert found["map"]["classes"] == ["n01440764", "n01443537", "n01484850"]
    report.main([str(teacher), str(bank), "-o", str(tmp_path / "r.html")])
    page = (tmp_path / "r.html").read_text()
    assert "Figure 5" in page and "Figure 9" in page and "with the accuracy on the whole" in page


def test_two_processes_share_each_batch_and_train_what_one_would(folder, tmp_path):
    teacher = run_folder(folder, "small", "--model=cnn4", "--lr=0.001", "--holdout=1")
    under = f"--teacher={teacher}"
    kept = ["--holdout=1", "--rates", "10", "300"]
    bank = run_folder(folder, "small_rdm", "--method=rdm", under, *kept)
    flags = ["--method=cifd", "--model=cnn2", under, f"--rdm-bank={bank}", "--kd-dropout=0.25"]
    flags += ["--batch-size=2", "--lr=0.001", "--holdout=1", "--final"]
    alone = run_folder(folder, "alone", *flags)
    command = [*folder_flags(folder, "shared"), *flags]
    ranks = launch(command, tmp_path / "log", 2, "training.classify")
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0], (tmp_path / "log.0").read_text()
    shared = folder / "runs" / "shared"
    one, two = (load_file(run / "model.safetensors") for run in (alone, shared))
    start = build("cnn2", 3, 224, torch.Generator().manual_seed(derive_seed(0, "init")))
    for name, weights in one.items():
        moved = (weights - start.state_dict()[name]).norm()
        assert moved > 0, f"{name} did not train"
        assert (two[name] - weights).norm() < 1e-3 * moved, f"{name} trained differently"
    results = [json.loads((run / "result.json").read_text()) for run in (alone, shared)]
    assert results[0]["metrics"] == pytest.approx(results[1]["metrics"])
    for a, b in zip(*(lines(run) for run in (alone, shared)), strict=True):
        for key in a.keys() - {"kind", "time", "samples_per_s"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4), f"{key}: logged of the whole batch"
    with pytest.raises(UsageError, match="can't be shared evenly by 2 processes"):
        classify.check_share(3, World(0, 2))


def test_a_crop_of_a_photo_is_a_function_of_seed_epoch_and_name(folder):
    data = load_photos(folder, "train", workers=0)
    batches = PhotoBatches(data, np.arange(len(data)), seed=0, size=3)
    first, again = (next(batches.epoch(3, 1, True)) for _ in range(2))
    assert torch.equal(first.images, again.images)
    other = {r.item(): i for b in batches.epoch(4, 0, True) for r, i in zip(b.rows, b.images)}
    assert not torch.equal(first.images[0], other[first.rows[0].item()])
    assert data.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_tars_hold_what_folders_hold(folder, tmp_path):
    for split, where in (("train", "train"), ("val", "test")):  # clip_benchmark says test
        (tmp_path / where).mkdir()
        photos = load_photos(folder, split, 0)
        for shard in range(2):
            with tarfile.open(tmp_path / where / f"{shard}.tar", "w") as tar:
                for row in range(shard, len(photos), 2):
                    label = str(photos.labels[row].item()).encode()
                    data = (folder / split / photos.photos.names[row]).read_bytes()
                    for suffix, content in (("jpg", data), ("cls", label)):
                        member = tarfile.TarInfo(f"photo{row}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        packed = load_photos(tmp_path, split, 0)
        rows = torch.arange(len(packed))
        one, two = (next(table.in_order(rows, len(rows))) for table in (photos, packed))
        order = torch.tensor([*range(0, len(rows), 2), *range(1, len(rows), 2)])
        assert torch.equal(one.images[order], two.images)
        assert torch.equal(one.labels[order], two.labels)
    run = run_folder(tmp_path, "student", "--model=resnet18", "--final")
    assert json.loads((run / "result.json").read_text())["metrics"]["acc5"] == 1
    (tmp_path / "classnames.txt").write_text("tench\ngoldfish\n")
    with pytest.raises(UsageError, match="names 2 classes, and there is a label 2"):
        load_photos(tmp_path, "train", 0)
    shard = tmp_path / "train" / "1.tar"
    shard.write_bytes(shard.read_bytes()[:-9000])
    with pytest.raises(UsageError, match=r"1\.tar.*truncated"):
        load_photos(tmp_path, "train", 0)


def test_a_photo_that_can_not_be_decoded_is_named(folder, tmp_path):
    copied(folder, tmp_path)
    broken = next((tmp_path / "train" / "n01443537").iterdir())
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(UsageError, match=f"{broken.name}.* image: broken"):
        run_folder(tmp_path, "student", "--model=cnn2", "--workers=0")


def test_stock_weights_of_another_size_are_refused(folder, tmp_path):
    weights = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18(num_classes=4).state_dict(), weights)
    flags = ["--method=kd", "--model=resnet8x4", f"--teacher=resnet18:{weights}"]
    with pytest.raises(UsageError, match=r"tells 4 classes apart, --data .* has 3"):
        run_folder(folder, "wrong", *flags)
    with pytest.raises(UsageError, match="holds no weights of resnet34"):
        run_folder(folder, "wrong", *flags[:2], f"--teacher=resnet34:{weights}")


# -- recipes and tuning ----------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
MISSING = {
    "cifar100_teacher": "--model wrn_40_2",
    "cifar100_rdm": "--teacher t",
    "cifar100_cifd": "--model resnet8x4 --teacher t --rdm-bank b",
    "cifar100_kd": "--model resnet8x4 --teacher t",
    "cifar100_paraphraser": "--teacher t",
    "cifar100_ft": "--model resnet8x4 --teacher t --paraphraser p",
    "imagenet_student": "--model resnet18",
    "imagenet_rdm": "--teacher t",
    "imagenet_cifd": "--model resnet18 --teacher t --rdm-bank b",
}


def test_every_recipe_needs_only_what_it_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    recipes = {path.stem: path for path in Path("slurm/recipes/classify").glob("*.args")}
    assert set(recipes) == set(MISSING)
    for name, path in recipes.items():
        args = parse_args([f"@{path}", "--data", "d", *MISSING[name].split()])
        assert args.resume == "latest"
    cifd = parse_args(
        [f"@{recipes['cifar100_cifd']}", "--data=d", *MISSING["cifar100_cifd"].split()]
    )
    assert (cifd.tau, cifd.kd_dropout, cifd.lambda_i, cifd.lambda_emb) == (2.0, 0.25, 0.005, 100.0)
    assert cifd.ibm and cifd.epochs == 240 and cifd.milestones == [150, 160, 180]


def test_a_subset_is_of_the_images_that_are_not_held_out():
    whole, held_out = split_rows(1000, 100)
    some, held_beside = split_rows(1000, 100, subset=50)
    assert np.array_equal(held_out, held_beside), "a teacher has seen what is held out here"
    assert len(some) == 50 and set(some) < set(whole)


@needs_cifar
def test_a_student_of_a_subset_learns_from_a_teacher_of_all(run_classify, tmp_path):
    kept = ["--holdout=64", "--epochs=1", "--batch-size=16"]
    run_classify(tmp_path, "teacher", "--model=cnn2", *kept, "--subset=128")
    taught = ["--method=kd", "--model=cnn2", f"--teacher={tmp_path / 'teacher'}", *kept]
    cache = ["--augment=flip", f"--teacher-cache={tmp_path / 'answers'}"]
    for name, subset in (("some", 64), ("others", 96)):
        run_classify(tmp_path, name, *taught, *cache, f"--subset={subset}")
    assert len(list((tmp_path / "answers").iterdir())) == 2, "answers of other rows were taken"
