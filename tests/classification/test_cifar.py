"""CIFAR-100 in memory: its order, its views, the layouts it is read from, and damaged ones."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from classification.small import table
from training.classifier import cifar
from training.classifier.cifar import Batches, load_cifar100, normalise, split_rows
from training.errors import UsageError


def test_what_is_held_out_does_not_depend_on_the_seed_and_grows_by_adding():
    train, small = split_rows(1000, 50)
    _, large = split_rows(1000, 100)
    assert set(small) <= set(large) and len(small) == 50
    assert sorted([*train, *small]) == list(range(1000))


def test_a_subset_is_of_the_images_that_are_not_held_out():
    whole, held_out = split_rows(1000, 100)
    some, held_beside = split_rows(1000, 100, subset=50)
    assert np.array_equal(held_out, held_beside), "a teacher has seen what is held out here"
    assert len(some) == 50 and set(some) < set(whole)


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


def test_micro_batches_are_consecutive_rows_with_or_without_images():
    data = table(12)
    for images in (True, False):
        (whole,) = Batches(data, np.arange(12), "flip", 0, 12).epoch(0, 0, images)
        parts = whole.split(3)
        assert [len(part) for part in parts] == [4, 4, 4]
        for name in ("rows", "views", "labels"):
            assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
        assert all((part.images is not None) == images for part in parts)


# -- layouts ---------------------------------------------------------------------------------------


def encoded(shade: int, side: int = 32, kind: str = "webp") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), (shade, 0, 0)).save(out, kind, lossless=True)
    return out.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_npz(path: Path, *images: bytes, **arrays: np.ndarray) -> None:
    content = {
        "webp": np.frombuffer(b"".join(images), np.uint8),
        "offsets": np.cumsum([0, *map(len, images)]),
        "labels": np.zeros(len(images), np.int64),
    }
    np.savez_compressed(path, **content | arrays)


@pytest.fixture
def three(monkeypatch) -> None:
    """A test split of three images."""
    monkeypatch.setitem(cifar.SPLITS, "test", 3)


def test_images_of_tars_meet_the_labels_of_their_keys(three, tmp_path):
    labels = {"s0.cls": b"10", "s1.cls": b"11\n"}
    images = {"s1.webp": encoded(110), "s0.png": encoded(100, kind="png")}
    write_tar(tmp_path / "test" / "0.tar", {**labels, **images, "s0.json": b"{}"})
    write_tar(tmp_path / "test" / "1.tar", {"./s0.webp": encoded(20), "./s0.cls": b"2"})
    data = load_cifar100(tmp_path, "test")
    assert data.labels.tolist() == [11, 10, 2]
    assert data.images[:, 0, 0, 0].tolist() == [110, 100, 20]


@pytest.mark.parametrize(
    "members, message",
    [
        ({"a.webp": encoded(1)}, "1 images and 0 labels, .*'a'"),
        ({"a.webp": encoded(1), "b.cls": b"1"}, "1 images and 1 labels, .*'a'"),
        ({"a.webp": encoded(1), "a.png": encoded(1)}, "'a' has two images"),
        ({"a.webp": encoded(1), "a.cls": b"1" * 26}, "'a.cls' has 26 bytes, a label at most 20"),
        ({"a.webp": encoded(1), "a.cls": b"1000000000000"}, "is '1000000000000', expected a class"),
        ({"a.webp": encoded(1), "a.cls": b"-1"}, "'a.cls' is '-1', expected a class"),
        ({"a.webp": encoded(1), "a.cls": b""}, "'a.cls' is '', expected a class"),
    ],
)
def test_what_is_no_label_of_an_image_is_refused_by_its_name(members, message, tmp_path):
    write_tar(tmp_path / "test" / "0.tar", members)
    with pytest.raises(UsageError, match=rf"^--data: {tmp_path}/test/0\.tar .*{message}"):
        load_cifar100(tmp_path, "test")


def test_a_label_member_of_gigabytes_is_refused_unread(tmp_path):
    path = tmp_path / "test" / "0.tar"
    path.parent.mkdir()
    member = tarfile.TarInfo("a.cls")
    member.size = 8 << 30
    with open(path, "wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate((8 << 30) + 4096)
    with pytest.raises(UsageError, match=f"'a.cls' has {8 << 30} bytes, a label at most 20"):
        load_cifar100(tmp_path, "test")


def test_a_packed_split_allocates_no_more_than_a_split_needs(tmp_path):
    write_npz(tmp_path / "cifar100_test.npz", encoded(1), labels=np.zeros(1 << 18, np.int64))
    with pytest.raises(UsageError, match=r"damaged: labels has 2097280 bytes, expected at most"):
        load_cifar100(tmp_path, "test")


@pytest.mark.parametrize("name", ["test/0.tar", "cifar100_test.npz"])
def test_what_is_no_image_never_reaches_another_decoder(name, three, tmp_path):
    """Pillow hands what begins so to Ghostscript."""
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
    if name.endswith("tar"):
        write_tar(tmp_path / name, {"a.webp": script, "a.cls": b"1"})
    else:
        write_npz(tmp_path / name, script)
    with pytest.raises(UsageError, match="is damaged: image: broken"):
        load_cifar100(tmp_path, "test")


def test_a_label_beyond_the_classes_is_refused(three, tmp_path):
    images = [encoded(shade) for shade in range(3)]
    for wrong in (100, -1):
        write_npz(tmp_path / "cifar100_test.npz", *images, labels=np.array([0, 99, wrong]))
        with pytest.raises(UsageError, match="has labels that are not from 0 to 99"):
            load_cifar100(tmp_path, "test")


@pytest.mark.parametrize("layout", ["cifar100_test.npz", "test/0.tar", "cifar-100-python/test"])
@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 was a file", b"nonsense" * 200])
def test_damaged_data_are_named_in_a_sentence(layout, data, tmp_path):
    (tmp_path / layout).parent.mkdir(exist_ok=True)
    (tmp_path / layout).write_bytes(data)
    named = layout.removesuffix("/test")
    with pytest.raises(UsageError, match=rf"^--data: {tmp_path}/{named} is damaged: [^\n]+$"):
        load_cifar100(tmp_path, "test")


def test_an_image_that_is_damaged_or_of_another_size_is_no_traceback(tmp_path):
    path, whole = tmp_path / "cifar100_test.npz", encoded(1)
    for other in (whole[:20], encoded(1, side=31), encoded(1, side=33)):
        write_npz(path, whole, other)
        with pytest.raises(UsageError, match="npz is damaged: "):
            load_cifar100(tmp_path, "test")
    write_npz(path, whole)
    with pytest.raises(UsageError, match=r"has 1 images .* and 1 labels, CIFAR-100's has 10000"):
        load_cifar100(tmp_path, "test")
