"""The paper's seven test sets, in both layouts: stock's samples, offline, shared by processes."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from clip_benchmark.datasets.builder import build_dataset, get_dataset_default_task

from eval import benchmark, datasets
from paper_sets import RETRIEVAL, Pictures, local, webdataset
from tests.test_eval_benchmark import model_folder, results

ROOT = Path(__file__).parents[1]
COUNTS = {
    "imagenet1k": 1000,
    "imagenetv2": 60,
    "imagenet-r": 200,
    "imagenet-a": 200,
    "objectnet": 116,
    "mscoco_captions": 30,
    "flickr30k": 30,
}
LAYOUTS = ("webdataset", "local")
#: Runs ``eval.benchmark`` where connecting to anything, or starting a program, is an error.
OFFLINE = """
import socket, sys
def refuse(event, args):
    internet = event == "socket.__new__" and args[1] != socket.AF_UNIX
    if internet or event in ("socket.getaddrinfo", "subprocess.Popen", "os.system"):
        raise PermissionError(f"offline: {event} {args}")
sys.addaudithook(refuse)
from eval.benchmark import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The seven sets in both layouts."""
    root = tmp_path_factory.mktemp("sets")
    for name, count in COUNTS.items():
        distinct = None if name in RETRIEVAL else 40
        pictures = Pictures(count, distinct=distinct)
        webdataset(root / "webdataset", name, pictures, templates=3)
        local(root / "local", name, pictures)
    return root


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("run") / "student")


@pytest.fixture(scope="module")
def transform(student):
    return open_clip.create_model_and_transforms(f"local-dir:{student}")[2]


def process(*command, **environment):
    """Run a command as a user would, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def stock_samples(layout, root, name, transform):
    """clip_benchmark's own data set, and its samples."""
    task = get_dataset_default_task(name)
    if layout == "webdataset":
        known = f"wds/{name}"
    else:
        # imagenet1k's first builder wants the archives of the whole training set beside it
        known = "imagenet1k-unverified" if name == "imagenet1k" else name
    stock = build_dataset(known, root=str(root / name), transform=transform, task=task)
    return stock, list(stock) if layout == "webdataset" else [stock[i] for i in range(len(stock))]


# the builder of ImageNet-V2 downloads wherever it does not count 10,000 images
@pytest.mark.parametrize(
    ("layout", "name"),
    [(x, n) for x in LAYOUTS for n in COUNTS if (x, n) != ("local", "imagenetv2")],
)
def test_samples_classes_and_templates_are_stocks(sets, transform, layout, name):
    stock, samples = stock_samples(layout, sets / layout, name, transform)
    ours = datasets.open_folder(sets / layout, name, "test")
    if name in RETRIEVAL:
        assert ours.targets == [captions for _, captions in samples]
    else:
        assert ours.targets == [label for _, label in samples]
        assert (ours.classnames, ours.templates) == (stock.classes, stock.templates)
    images = datasets.Images(ours.samples, transform)
    # grayscale, CMYK, palette and RGBA are among the first
    assert all(torch.equal(images[i], samples[i][0]) for i in range(20))


def test_imagenetv2_is_read_whatever_it_counts_and_its_folders_are_its_labels(sets):
    folder = datasets.open_folder(sets / "local", "imagenetv2", "test")
    assert sorted(folder.targets) == list(range(60))
    assert all(f"/{sample.target}/" in sample.key for sample in folder.samples)
    assert (folder.classnames[0], len(folder.classnames)) == ("tench", 1000)
    assert len(folder.templates) == 80


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_papers_suite_runs_offline_and_names_its_gaps(sets, student, layout, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(sets / layout, data, copy_function=os.link)
    shutil.rmtree(data / "flickr30k")
    if layout == "webdataset":
        names = data / "imagenet-r" / "classnames.txt"
        lines = names.read_text().splitlines()
        names.unlink()
        names.write_text("\n".join(lines[:-1]))
        reason = "199 class names where the protocol has 200"
    else:
        shutil.rmtree(data / "imagenet-r" / "n01443537")
        reason = "199 class folders, which are not those of the 200 classes"
        # the text tower's 80 templates are not what this test is about
        for name in ("imagenet1k", "imagenetv2"):
            shutil.rmtree(data / name)
            shutil.copytree(sets / "webdataset" / name, data / name)
    done = process(
        "-c", OFFLINE, student, "--data-root", data, "--datasets", "paper", "--out", out,
        "--device", "cpu", "--workers", "1",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    found = {result["dataset"]: result for result in results(out)}
    assert set(found) == set(COUNTS) - {"flickr30k", "imagenet-r"}
    assert {gap["dataset"]: gap["gap"] for gap in results(out / "gaps")} == {
        "imagenet-r": reason,
        "flickr30k": "no folder 'flickr30k/test' with nshards.txt under the data root"
        + ", nor 'flickr30k/flickr30k_test_karpathy.txt'",
    }
    assert {name: result["provenance"]["protocol"] for name, result in found.items()} == {
        "imagenet1k": "1000 images of 50000",
        "imagenetv2": "60 images of 10000",
        "imagenet-a": "200 images of 7500",
        "objectnet": f"{116 if layout == 'webdataset' else 113} images of 18574",
        "mscoco_captions": "30 images of 5000; 153 captions of 25010",
    }
    assert not (data / "flickr30k").exists()


def test_a_damaged_image_is_a_gap_and_the_other_sets_are_evaluated(sets, student, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    for name in RETRIEVAL:
        shutil.copytree(sets / "local" / name, data / name)
    image = next((data / "mscoco_captions" / "val2014").iterdir())
    image.write_bytes(image.read_bytes()[:200])
    status = benchmark.main(
        [str(student), "--data-root", str(data), "--datasets", "retrieval", "--out", str(out),
        "--device=cpu", "--workers=1"]
    )  # fmt: skip
    assert status == 1
    (gap,) = results(out / "gaps")
    assert gap["gap"].startswith(f"sample 'val2014/{image.name}' has no readable image: ")
    assert [result["dataset"] for result in results(out)] == ["flickr30k"]


def test_an_image_that_is_listed_and_not_there_is_a_gap(sets, tmp_path):
    shutil.copytree(sets / "local" / "flickr30k", tmp_path / "flickr30k")
    image = next((tmp_path / "flickr30k").glob("*.jpg"))
    image.unlink()
    with pytest.raises(datasets.Gap, match=f"'{image.name}' is missing"):
        datasets.open_folder(tmp_path, "flickr30k", "test")


def test_a_class_folder_without_images_is_a_gap(sets, tmp_path):
    shutil.copytree(sets / "local" / "imagenet-a", tmp_path / "imagenet-a")
    for image in (tmp_path / "imagenet-a" / "n01498041").iterdir():
        image.unlink()
    with pytest.raises(datasets.Gap, match="no valid file for the classes n01498041"):
        datasets.open_folder(tmp_path, "imagenet-a", "test")


def test_the_parts_hold_every_evaluation_once_and_keep_a_models_sets_together():
    pairs = [(model, name) for model in "ab" for name in range(7)]
    for of in (1, 2, 3, 5, 14, 20):
        parts = [benchmark.share(pairs, number, of) for number in range(1, of + 1)]
        assert [pair for part in parts for pair in part] == pairs
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert {model for model, _ in benchmark.share(pairs, 1, 2)} == {"a"}


def test_tasks_of_srun_are_processes_and_an_sbatch_script_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"PROCID": "0", "NTASKS": "4", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert benchmark.Place.of_process() == (0, 1, 0)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert benchmark.Place.of_process() == (3, 4, 1)


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_processes_share_a_models_sets_and_a_gap_of_one_does_not_stop_the_other(
    sets, student, tmp_path, launcher
):
    wanted = ["imagenet_sketch", "flickr30k", "imagenet-a", "mscoco_captions"]
    arguments = [student, "--data-root", sets / "webdataset", "--out", tmp_path, "--device", "cpu"]
    command = ["-m", "eval.benchmark", *arguments, "--workers", "0", "--datasets", *wanted]
    if launcher == "torchrun":
        own = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        codes = {process(*own, *command).returncode}
    else:
        codes = srun(*command)
    assert codes & {1}, "the gap has to be told"
    assert [gap["dataset"] for gap in results(tmp_path / "gaps")] == ["imagenet_sketch"]
    found = {result["dataset"]: result["metrics"] for result in results(tmp_path)}
    assert set(found) == set(wanted[1:])
    assert json.dumps(found, allow_nan=False)


def srun(*command) -> set[int]:
    """Two processes with the environment that srun gives its tasks; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    tasks = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env={**os.environ, **place, "SLURM_STEP_NUM_TASKS": "2"}
            | {f"SLURM_{name}": str(number) for name in ("PROCID", "LOCALID")},
        )
        for number in range(2)
    ]
    return {task.wait(300) for task in tasks}
