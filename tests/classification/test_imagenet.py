"""Photos on disk, in folders or in tars: what is read, in which views, with which classes."""

import io
import json
import shutil
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_benchmark.datasets.builder import build_wds_dataset

from classification.command import CLASSES, content, copied, run_photos
from eval.datasets import open_folder
from training.classifier.imagenet import PhotoBatches, Photos, check_classes, load_photos
from training.classifier.stage import EpochLoader
from training.data.workers import reads
from training.errors import Failure, UsageError


def write_tars(photos: Path, to: Path, split: str, shards: int = 2) -> None:
    """A split of the photos as tars, sample by sample in turn."""
    to.mkdir()
    table = load_photos(photos, split, 0)
    for shard in range(shards):
        with tarfile.open(to / f"{shard}.tar", "w") as tar:
            for row in range(shard, len(table), shards):
                label = str(table.labels[row].item()).encode()
                data = (photos / split / table.photos.names[row]).read_bytes()
                for suffix, bytes_ in (("jpg", data), ("cls", label)):
                    member = tarfile.TarInfo(f"photo{row}.{suffix}")
                    member.size = len(bytes_)
                    tar.addfile(member, io.BytesIO(bytes_))


def test_a_crop_of_a_photo_is_a_function_of_seed_epoch_and_name(photos):
    data = load_photos(photos, "train", workers=0)
    batches = PhotoBatches(data, np.arange(len(data)), seed=0, size=3)
    first, again = (next(batches.epoch(3, 1, True)) for _ in range(2))
    assert torch.equal(first.images, again.images)
    other = {r.item(): i for b in batches.epoch(4, 0, True) for r, i in zip(b.rows, b.images)}
    assert not torch.equal(first.images[0], other[first.rows[0].item()])
    assert data.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3


class Stuck(Photos):
    def open(self, row: int):
        reads(row)
        time.sleep(1000)


def test_photos_that_do_not_come_are_given_up_by_name_or_for_a_stop(photos):
    table = load_photos(photos, "train", workers=1)
    table = replace(table, photos=Stuck(**vars(table.photos)))
    batches = PhotoBatches(table, np.arange(len(table)), seed=0, size=3)
    named = rf"no batch for 1 seconds: data worker \d+ reads '{CLASSES[0]}/.*' in .*JPEG"
    with pytest.raises(Failure, match=named):
        next(table.in_order(torch.arange(3), 3, timeout=1))
    assert list(EpochLoader(batches, True).batches(0, 99, stopping=lambda: True)) == []
    assert list(EpochLoader(batches, True).batches(0, 99, stopping=After(1))) == []


class After:
    """True when some seconds are over."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def __call__(self) -> bool:
        return time.monotonic() > self.end


def test_tars_hold_what_folders_hold(photos, tmp_path):
    for split, where in (("train", "train"), ("val", "test")):  # clip_benchmark says test
        write_tars(photos, tmp_path / where, split)
        table, packed = load_photos(photos, split, 0), load_photos(tmp_path, split, 0)
        rows = torch.arange(len(packed))
        one, two = (next(t.in_order(rows, len(rows))) for t in (table, packed))
        order = torch.tensor([*range(0, len(rows), 2), *range(1, len(rows), 2)])
        assert torch.equal(one.images[order], two.images)
        assert torch.equal(one.labels[order], two.labels)
    run = run_photos(tmp_path, "student", "--model=resnet18", "--final", "--workers=1")
    assert content(run)["metrics"]["acc5"] == 1
    (tmp_path / "classnames.txt").write_text("tench\ngoldfish\n")
    with pytest.raises(UsageError, match="names 2 classes, and there is a label 2"):
        load_photos(tmp_path, "train", 0)
    shard = tmp_path / "train" / "1.tar"
    shard.write_bytes(shard.read_bytes()[:-9000])
    with pytest.raises(UsageError, match=r"1\.tar.*truncated"):
        load_photos(tmp_path, "train", 0)


def test_a_blank_line_among_the_class_names_keeps_its_place_as_in_clip_benchmark(photos, tmp_path):
    write_tars(photos, tmp_path / "train", "train", shards=1)
    (tmp_path / "train" / "nshards.txt").write_text("1\n")
    (tmp_path / "classnames.txt").write_text("tench\n\n great white shark \n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}\n\n")
    stock = build_wds_dataset("any", None, "train", str(tmp_path)).classes
    assert stock == ["tench", "", "great white shark"]
    assert list(load_photos(tmp_path, "train", 0).class_names) == stock
    assert open_folder(tmp_path.parent, tmp_path.name, "train").classnames == stock


def test_a_label_is_not_cut_and_makes_no_more_classes_than_there_may_be(photos, tmp_path):
    image = next((photos / "train" / CLASSES[0]).iterdir()).read_bytes()
    (tmp_path / "train").mkdir()

    def refused(label: bytes, message: str) -> None:
        with tarfile.open(tmp_path / "train" / "0.tar", "w") as tar:
            for name, data in (("a.jpg", image), ("a.cls", label)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        with pytest.raises(UsageError, match=message):
            load_photos(tmp_path, "train", 0)

    refused(b"0" * 20 + b"123456", r"'a\.cls' has 26 bytes, a label at most 20")
    refused(b"1000000000000", r"expected a class from 0 to 1048575")


def test_classes_without_names_are_compared_by_their_number(photos):
    test = load_photos(photos, "val", 0)
    names = test.class_names
    nameless = replace(test, class_names=("0", "1", "2"), named=False)
    check_classes(photos, test, names, 3)
    check_classes(photos, test, None, 3)
    check_classes(photos, nameless, names, 3)
    for split, trained in ((test, None), (nameless, [*names, "n02"]), (nameless, None)):
        with pytest.raises(UsageError, match=r"not those trained on: it has 3, not 4$"):
            check_classes(photos, split, trained, 4)
    with pytest.raises(UsageError, match="it lacks a, b, c and 1 more and it has n01440764, n0"):
        check_classes(photos, test, list("abcd"), 4)
    with pytest.raises(UsageError, match=r"not those trained on: they come in another order$"):
        check_classes(photos, test, names[::-1], 3)


def test_a_test_split_is_looked_for_and_its_classes_checked_before_training(photos, tmp_path):
    data = copied(photos, tmp_path)

    def refused(message: str) -> None:
        with pytest.raises(UsageError, match=message):
            run_photos(data, "student", "--model=cnn2", "--final")
        assert not (data / "runs" / "student").exists(), "it has begun"

    other = (data / "val" / "n01443537").rename(data / "val" / "n02")
    refused("classes are not those trained on: it lacks n01443537 and it has n02$")
    shutil.rmtree(other)
    refused("classes are not those trained on: it lacks n01443537$")
    shutil.rmtree(data / "val")
    refused("there is no val/ with a folder per class")
    run_photos(data, "student", "--model=cnn2")  # which needs none


def test_a_photo_that_can_not_be_decoded_is_named(photos, tmp_path):
    copied(photos, tmp_path)
    broken = next((tmp_path / "train" / "n01443537").iterdir())
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(UsageError, match=f"{broken.name}.* image: broken"):
        run_photos(tmp_path, "student", "--model=cnn2")


def test_the_layout_trains_under_a_live_teacher(photos, known):
    under = f"--teacher={known[0]}"
    rates = ["--rdm-form=reconstruct", "--rates=1000", "--embedding-loss=smooth_l1"]
    rdm = run_photos(photos, "rdm", "--method=rdm", under, *rates)
    flags = ["--method=cifd", "--model=mobilenetv1_100", under, f"--rdm-bank={rdm}", "--final"]
    student = run_photos(photos, "student", *flags, "--workers=1")
    assert content(student)["metrics"]["acc5"] == 1, "with three classes all are among five"
    record = json.loads((student / "data.json").read_text())["train"]
    assert record["classes"] == list(CLASSES) and record["samples"] == 9
