"""The demo's data set: deterministic, held apart, readable by the layouts' own readers."""

import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from demo import scenes
from training.errors import UsageError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    scenes.write(out, train=60, val=20, scenes=30)
    return out


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(data, tmp_path):
    for seed in (0, 1):
        scenes.write(tmp_path / str(seed), train=60, val=20, scenes=30, seed=seed)
    files = sorted(p.relative_to(data) for p in data.rglob("*") if p.is_file())
    assert [(tmp_path / "0" / f).read_bytes() for f in files] == [
        (data / f).read_bytes() for f in files
    ]
    shard = "train/00000.tar"
    assert (tmp_path / "1" / shard).read_bytes() != (data / shard).read_bytes()


@pytest.mark.parametrize(
    "given", [["--train", "0"], ["--val", "-1"], ["--scenes", "12641"]], ids=str
)
def test_numbers_that_there_are_not_are_refused_before_anything_is_drawn(given, tmp_path):
    with pytest.raises(UsageError, match="12640 --scenes at most"):
        scenes.main([str(tmp_path / "out"), *given])


def test_no_handwriting_of_a_held_out_split_is_drawn_in_another():
    rows = {}
    for split in scenes.BLOCKS:
        _, values, first = scenes.handwriting(split)
        rows[split] = set(range(first, first + len(values)))
    assert sum(map(len, rows.values())) == 1797 == len(set.union(*rows.values()))
    artist = scenes.Artist("train", np.random.default_rng(0))
    drawn = {digit.row for _ in range(300) for digit in artist.pair().digits}
    assert drawn <= rows["train"]


def test_pairs_lie_in_img2dataset_layout_and_the_caption_tells_the_scene(data):
    files = members(data / "train" / "00000.tar")
    keys = sorted({name.split(".")[0] for name in files})
    assert len(keys) == 60
    for key in keys:
        facts = json.loads(files[f"{key}.json"])
        caption = files[f"{key}.txt"].decode()
        assert facts["caption"] == caption
        assert all(scenes.WORDS[digit["value"]] in caption for digit in facts["digits"])
        assert files[f"{key}.png"].startswith(b"\x89PNG")


def test_a_digit_is_drawn_in_its_colour_where_its_caption_says():
    artist = scenes.Artist("train", np.random.default_rng(0))
    red, blue = (scenes.Digit(int(artist.values[0]), colour, 0) for colour in ("red", "blue"))
    for arrangement, axis in (("row", 1), ("column", 0)):
        pixels = np.asarray(artist.draw(scenes.Scene((red, blue), arrangement))).astype(int)
        assert pixels.shape == (scenes.SIZE, scenes.SIZE, 3)
        where = {
            name: np.argwhere(pixels[..., channel] > pixels[..., 2 - channel] + 80)[:, axis]
            for name, channel in (("red", 0), ("blue", 2))
        }
        assert where["red"].mean() < scenes.SIZE / 2 < where["blue"].mean()


def test_scenes_of_different_meaning_share_no_caption_and_one_scene_has_no_caption_twice():
    artist = scenes.Artist("train", np.random.default_rng(0))
    told = {}
    for _ in range(2000):
        scene = artist.pair()
        captions = scenes.captions(scene)
        assert len(set(captions)) == len(captions)
        for caption in captions:
            # a scene told from either side is one meaning
            assert told.setdefault(caption, scene.meaning) == scene.meaning


def test_the_retrieval_set_has_no_caption_twice(data):
    folder = data / "benchmark" / "digit_scenes"
    assert (folder / "dataset_type.txt").read_text().strip() == "retrieval"
    for split in ("val", "test"):
        files = members(folder / split / "0.tar")
        captions = [
            line
            for name, content in files.items()
            if name.endswith(".txt")
            for line in content.decode().splitlines()
        ]
        assert len(captions) == 30 * 4 == len(set(captions))


def test_classification_shows_every_held_out_digit_once(data):
    folder = data / "benchmark" / "digits"
    assert (folder / "classnames.txt").read_text().split() == list(scenes.WORDS)
    shards = int((folder / "test" / "nshards.txt").read_text())
    labels = [
        int(content)
        for shard in range(shards)
        for name, content in members(folder / "test" / f"{shard}.tar").items()
        if name.endswith(".cls")
    ]
    assert labels == scenes.handwriting("test")[1].tolist()


def test_clip_benchmarks_own_reader_takes_both_benchmarks(data):
    builder = pytest.importorskip(
        "clip_benchmark.datasets.builder", reason="clip_benchmark's builder needs 'requests'"
    )
    root = data / "benchmark"
    digits = builder.build_wds_dataset("digits", lambda image: image, data_dir=f"{root}/digits")
    image, label = next(iter(digits))
    assert isinstance(image, Image.Image) and label in range(10)
    assert digits.classes == list(scenes.WORDS)
    retrieval = builder.build_wds_dataset("x", lambda im: im, data_dir=f"{root}/digit_scenes")
    assert len(next(iter(retrieval))[1]) == 4
