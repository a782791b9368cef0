"""Runs of `training.classify` on few images, and what they leave behind."""

import json
import logging
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import training.classifier.run as classifier_run
from runs import ROOT
from training.classifier.cifar import load_cifar100
from training.classify import main

CIFAR = ROOT.parent / "shared" / "data"
CLASSES = ("n01440764", "n01443537", "n01484850")
needs_cifar = pytest.mark.skipif(
    not (CIFAR / "cifar100_train.npz").is_file(), reason="needs CIFAR-100 in ../shared/data"
)


@pytest.fixture(scope="session")
def run_cifar():
    """``training.classify`` in this process on a part of CIFAR-100, which is decoded once."""

    def go(logs: Path, name: str, *flags: str) -> Path:
        common = ["--data", str(CIFAR), "--logs", str(logs), "--name", name, "--subset", "256"]
        assert main([*common, "--device=cpu", "--batch-size", "32", *flags]) == 0
        return logs / name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier_run, "load_cifar100", cache(load_cifar100))
        yield go


@pytest.fixture(scope="session")
def home(tmp_path_factory, run_cifar: Callable[..., Path]) -> Path:
    """A teacher, its RDMs and a paraphraser, trained on CIFAR-100."""
    logs = tmp_path_factory.mktemp("classify")
    small = ("--epochs", "1", "--holdout", "32")
    teacher = run_cifar(logs, "teacher", "--model", "cnn4", *small)
    for method in ("rdm", "paraphraser"):
        run_cifar(logs, method, "--method", method, "--teacher", str(teacher), *small)
    return logs


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Three classes of generated photos in ImageNet's layout: nine to train on, three to test."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (6, 7 + i, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((250, 240))
                image.save(root / split / name / f"{name}_{i}.JPEG")
    return root


def photo_flags(folder: Path, name: str) -> list[str]:
    """A run of an epoch of three steps, in the folder's ``runs/``."""
    common = ["--dataset=imagenet", f"--data={folder}", f"--logs={folder}/runs", f"--name={name}"]
    return [*common, "--device=cpu", "--batch-size=3", "--epochs=1", "--workers=0"]


def run_photos(folder: Path, name: str, *flags: str) -> Path:
    """The directory of a run to its end."""
    assert main([*photo_flags(folder, name), *flags]) == 0
    logs = [flag.partition("=")[2] for flag in flags if flag.startswith("--logs=")]
    return Path(*logs or [folder / "runs"]) / name


@pytest.fixture(scope="session")
def known(photos) -> tuple[Path, Path]:
    """A teacher of the photos' classes, and its RDMs."""
    flags = ["--final", "--lr=0.001"]
    teacher = run_photos(photos, "known", "--model=resnet18", *flags)
    under = ["--method=rdm", f"--teacher={teacher}", "--rates", "10", "300"]
    return teacher, run_photos(photos, "bank", *under, *flags)


@pytest.fixture(scope="session")
def another(photos) -> Path:
    """Another teacher of the photos' classes."""
    return run_photos(photos, "another teacher", "--model=cnn4", "--lr=0.001")


def copied(photos: Path, to: Path) -> Path:
    """The photos in another folder."""
    for split in ("train", "val"):
        shutil.copytree(photos / split, to / split)
    return to


def content(run: Path, name: str = "result.json") -> dict:
    """A JSON file of a run directory."""
    return json.loads((run / name).read_text())


def logs_open_in(folder: Path) -> list[Path]:
    """The files in a folder that this process logs to."""
    handlers = logging.getLogger().handlers
    files = [Path(h.baseFilename) for h in handlers if isinstance(h, logging.FileHandler)]
    return [file for file in files if file.is_relative_to(folder)]
