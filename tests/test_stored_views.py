"""Stored views stand where the originals would: the same keys and captions, pixels drawn once."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from safetensors.torch import load_file

import training.data.loader
from runs import assert_bit_equal, final, lines
from shards import Letters, overwrite, sample, write_shards, write_tar
from training.cache_teacher import main as write_cache
from training.check_data import check
from training.clip.cache import view_path
from training.clip.flags import parse_args
from training.clip.models import build_teachers
from training.data.index import index_shards
from training.data.loader import Loader, Reader, Recipe
from training.data.order import Order
from training.data.pixels import Pixels
from training.data.stored import StoredViews, ViewWriter, encoded
from training.data.views import ImageSpec, normalise, stored_view, train_view
from training.errors import Failure, UsageError
from training.main import main

SPEC, SIZE = ImageSpec(size=8), (8, 8)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Two shards of 20 samples, each with a broken image and an odd name among them."""
    folder = tmp_path_factory.mktemp("originals")
    for number in range(2):
        members = {}
        for i in range(20):
            members |= sample(f"d/{number}-{i:03d}", i)
        members[f"d/{number}-003.jpg"] = b"no image"
        odd = f"caf\udce9-{number}-{'x' * 150}"
        members |= {name.replace("odd", odd): data for name, data in sample("odd", 1).items()}
        write_tar(folder / f"{number}.tar", members, errors="surrogateescape")
    return index_shards(str(folder))


@pytest.fixture(scope="module")
def stored(originals, tmp_path_factory):
    """Two views of them."""
    folder = tmp_path_factory.mktemp("stored")
    jobs = [(n, v, folder / f"{n}.view{v}.tar") for n in range(2) for v in range(2)]
    writer = ViewWriter(Reader(originals, Recipe([train_view(SPEC)], [], 5)), jobs, 90)
    tars = [writer[number] for number in range(len(jobs))]
    return StoredViews(originals, {0: tars[:2], 1: tars[2:]})


def batches(sources, steps, ranks=1, workers=0, transform=None):
    """(keys, pixels, tokens, skipped) of each global batch."""
    parts = []
    for rank in range(ranks):
        loader = Loader(
            Order(sources, 5), sources, [transform or stored_view(SPEC)], [Letters()],
            seed=5, global_batch=6, views=2, rank=rank, world_size=ranks, workers=workers,
            start_method="fork" if workers else None,
        )  # fmt: skip
        parts.append(list(loader.batches(0, steps)))
        loader.close()
    return [
        {
            "keys": [key for batch in step for key in batch.keys],
            "pixels": torch.cat([batch.images[0] for batch in step]),
            "texts": torch.cat([batch.texts[0] for batch in step]),
            "skipped": sum(sum(batch.skipped.values()) for batch in step),
        }
        for step in zip(*parts)
    ]


def test_batches_of_stored_views_are_those_of_the_originals_but_for_jpegs_rounding(
    originals, stored
):
    expected = batches(originals, 14, transform=train_view(SPEC))
    for one, other in zip(batches(stored, 14), expected):
        assert one["keys"] == other["keys"] and one["skipped"] == other["skipped"]
        assert torch.equal(one["texts"], other["texts"])
        for pixels, drawn in zip(one["pixels"], other["pixels"]):
            decoded = np.array(Image.open(io.BytesIO(encoded(drawn, 90))))
            assert torch.equal(pixels, torch.from_numpy(decoded).permute(2, 0, 1))


def test_they_depend_on_no_worker_or_rank(stored):
    alone = batches(stored, 8)
    assert_bit_equal(batches(stored, 8, workers=2), alone)
    assert_bit_equal(batches(stored, 8, ranks=3, workers=1), alone)


def test_tars_are_the_same_bytes_again_and_kept_where_they_are(originals, stored, tmp_path):
    first = Path(stored.views[0][0].path)
    writer = ViewWriter(Reader(originals, Recipe([train_view(SPEC)], [], 5)), [], 90)
    writer.jobs = [(0, 0, tmp_path / "0.tar")]
    assert writer[0].content == stored.views[0][0].content
    assert (tmp_path / "0.tar").read_bytes() == first.read_bytes()
    writer.jobs = [(0, 1, tmp_path / "0.tar")]  # if it were written, it would be another view
    assert writer[0].content == stored.views[0][0].content


def test_a_tar_of_views_is_a_data_set_for_anyone(originals, stored):
    tars = [shard.path for shard in stored.views[0] + stored.views[1]]
    assert check("::".join(tars), deep=True)["clean"]
    key = "d/0-005"
    (found,) = [
        s for s in webdataset.WebDataset(tars[0], shardshuffle=False) if s["__key__"] == key
    ]
    assert found["txt"] == sample(key, 5)[f"{key}.txt"]
    assert json.loads(found["json"])["key"] == key
    assert Image.open(io.BytesIO(found["jpg"])).size == SIZE


def test_open_clips_own_reader_reads_a_tar_of_views(stored):
    pytest.importorskip("pandas", reason="OpenCLIP's reader imports it")
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    args = SimpleNamespace(
        train_data=stored.views[0][0].path, train_num_samples=20,
        train_data_upsampling_factors=None,
        dataset_resampled=False, seed=0, batch_size=5, world_size=1, workers=0,
    )  # fmt: skip
    data = get_wds_dataset(args, image_transform(8, is_train=True), True, tokenizer=Letters())
    assert sum(len(images) for images, _ in data.dataloader) == 20


# -- through the commands ------------------------------------------------------------------------


def counted(monkeypatch) -> list[tuple[int, int]]:
    """The sizes of images, as they are decoded."""
    sizes = []

    def counting(decode):
        def count(*args):
            image = decode(*args)
            sizes.append(image.whole if isinstance(image, Pixels) else image.size)
            return image

        return count

    for name in ("decode_image", "decode_pixels"):
        decode = getattr(training.data.loader, name)
        monkeypatch.setattr(training.data.loader, name, counting(decode))
    return sizes


@pytest.fixture(scope="module")
def command(flags, teacher):
    return [*flags, "--distill-model", teacher, "--views", "2", "--store-views"]


@pytest.fixture(scope="module")
def cache(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    assert write_cache([*command, "--teacher-cache", str(folder)]) == 0
    return folder


def test_the_teacher_embeds_the_pixels_that_the_student_sees(cache, scenes, teacher):
    config = parse_args(["--train-data=-", "--distill", "kd", "--distill-model", teacher])
    (model,) = build_teachers(config, torch.device("cpu"))
    (shard,) = index_shards(str(scenes / "train")).shards
    (embeddings,) = [load_file(path) for path in cache.glob("*.safetensors")]
    spec = ImageSpec.of(model.model.visual.preprocess_cfg)
    for view in range(2):
        with tarfile.open(view_path(cache, shard, view)) as tar:
            images = [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")]
        pixels = np.stack([np.array(Image.open(io.BytesIO(image))) for image in images])
        assert pixels.shape[1:] == (32, 32, 3)
        pixels = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2), spec)
        features = torch.nn.functional.normalize(model.model.encode_image(pixels), dim=-1)
        assert torch.allclose(embeddings["image"][view].float(), features, atol=2e-3)


def test_a_student_reads_stored_views_and_nothing_of_the_originals(
    cache, flags, tmp_path, monkeypatch
):
    sizes = counted(monkeypatch)
    read = [*flags, "--distill", "fd", "--teacher-cache", str(cache), "--logs", str(tmp_path)]
    assert main([*read, "--name", "alone"]) == 0
    assert set(sizes) == {(32, 32)} and len(sizes) == 96
    assert main([*read, "--name", "workers", "--workers", "2"]) == 0
    assert_bit_equal(final(tmp_path / "workers"), final(tmp_path / "alone"))
    assert lines(tmp_path / "alone")[-1]["loss"] > 0


def test_a_damaged_tar_is_refused_before_a_view_of_it_is_used(cache, flags, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "cache")
    damaged = sorted(copy.glob("*.view0.tar"))[0]
    overwrite(damaged, damaged.read_bytes()[5000:5100], bytes(100))
    os.utime(damaged)
    read = [*flags, "--distill", "fd", "--teacher-cache", str(copy), "--logs", str(tmp_path)]
    with pytest.raises(Failure, match=r"view0.tar is damaged"):
        main(read)


def test_a_cache_names_the_backend_that_its_students_read_with(command, flags, cache, tmp_path):
    folder = str(tmp_path / "c")
    assert write_cache([*command, "--teacher-cache", folder, "--image-backend", "torch"]) == 0
    read = [*flags, "--distill", "fd", "--teacher-cache", folder, "--logs", str(tmp_path)]
    assert main([*read, "--name", "run", "--workers", "1"]) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["image_backend"] == "torch"
    with pytest.raises(UsageError, match="its image_backend is 'torch'"):
        main([*read, "--name", "pil", "--image-backend", "pil"])


def test_writing_goes_on_where_it_was_stopped_and_mends_a_damaged_tar(command, cache, tmp_path):
    again = [*command, "--teacher-cache", str(tmp_path)]
    first = sorted(cache.glob("*.view?.tar"))
    (tmp_path / first[0].name).write_bytes(first[0].read_bytes())  # of a run that was killed
    assert write_cache(again) == 0
    for path in [*first, *cache.glob("*.safetensors")]:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    damaged = tmp_path / first[1].name
    content = bytearray(damaged.read_bytes())
    content[2000] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(Failure, match=r"view1.tar is damaged"):
        write_cache(again)
    assert write_cache(again) == 0
    assert damaged.read_bytes() == first[1].read_bytes()


def test_parts_and_workers_write_the_files_that_one_process_writes(command, tmp_path):
    data = write_shards(tmp_path / "data", [9, 14, 5])
    write = [*command, "--train-data", data, "--batch-size", "8", "--teacher-cache"]
    assert write_cache([*write, str(tmp_path / "one")]) == 0
    for part in ("2/2", "1/2"):
        again = [*write, str(tmp_path / "two"), "--part", part, "--workers", "2"]
        assert write_cache(again) == 0
    for pattern, count in {"*.view?.tar": 6, "*.safetensors": 3, "00*.json": 6}.items():
        files = sorted((tmp_path / "one").glob(pattern))
        assert len(files) == count
        for path in files:
            if "verified" not in path.name:  # which has times
                assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_dry_run_writes_nothing_and_foretells_the_size(command, cache, tmp_path, capsys):
    assert write_cache([*command, "--teacher-cache", str(tmp_path / "c"), "--dry-run"]) == 0
    assert not (tmp_path / "c").exists()
    assert "0 of 1 shards are there; 192 image passes" in capsys.readouterr().out
    sources = index_shards(command[command.index("--train-data") + 1])
    recipe = Recipe([train_view(ImageSpec(32))], [], 0)
    each = ViewWriter(Reader(sources, recipe), [], 90).bytes_of(range(32))
    size = sum(path.stat().st_size for path in cache.glob("*.tar"))
    assert 192 * each == pytest.approx(size, rel=0.1)


def test_models_of_other_sizes_resize_what_is_stored_at_the_largest(
    command, flags, teacher, tmp_path
):
    larger = [*command, "--teacher-cache", str(tmp_path / "c"), "--force-image-size", "48"]
    assert write_cache(larger) == 0
    config = json.loads((tmp_path / "c/config.json").read_text())
    assert config["stored_views"] == {"size": [48, 48], "quality": 90, "subsampling": "4:2:0"}
    read = [*flags, "--distill", "fd", "--teacher-cache", str(tmp_path / "c")]
    assert main([*read, "--logs", str(tmp_path), "--name", "small"]) == 0


def test_what_can_not_be_stored_or_mixed_is_refused(command, flags, cache, tmp_path):
    erasing = ["--aug-cfg", "use_timm=True", "re_prob=0.5"]
    with pytest.raises(UsageError, match=r"--store-views: .*random erasing"):
        write_cache([*command, *erasing, "--teacher-cache", str(tmp_path / "a")])
    with pytest.raises(UsageError, match=r"its stored_views is .*'quality': 90.*'quality': 80"):
        write_cache([*command, "--teacher-cache", str(cache), "--view-quality", "80"])
    plain = [part for part in command if part != "--store-views"]
    assert write_cache([*plain, "--teacher-cache", str(tmp_path / "plain")]) == 0
    both = f"{cache},{tmp_path / 'plain'}"
    with pytest.raises(UsageError, match="its stored_views is None"):
        main([*flags, "--distill", "mobileclip", "--teacher-cache", both])


def test_several_teachers_are_cached_in_one_pass_over_the_images(
    command, cache, teacher, tmp_path, monkeypatch
):
    decoded = counted(monkeypatch)
    two = ["--distill-model", f"{teacher},{teacher}"]
    folders = [tmp_path / "a", tmp_path / "b"]
    names = ",".join(map(str, folders))
    assert write_cache([*command, *two, "--teacher-cache", names]) == 0
    passes = {"stored": 192, "embedded": 192, "verified": 24}
    assert len(decoded) == sum(passes.values()) + 32, "32 foretell the size"
    for folder in folders:
        for path in cache.glob("*.safetensors"):
            assert_bit_equal(load_file(folder / path.name), load_file(path))
    assert len(list(folders[0].glob("*.tar"))) == 2 and not list(folders[1].glob("*.tar"))
    read = ["--distill", "mobileclip", "--teacher-cache", names, "--logs", str(tmp_path)]
    flags = command[: command.index("--distill-model")]
    assert main([*flags, *read, "--name", "run"]) == 0
    # The second's bank reads no view, and the student is told which of the two pulls how much.
    read[1:2] = ["cifd", "--rates", "30", "--rdm-epochs", "1"]
    assert main([*flags, *read, "--name", "cifd"]) == 0
    assert lines(tmp_path / "cifd")[-1].keys() >= {"teacher0", "teacher1"}
