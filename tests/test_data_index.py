"""The index: made once, kept beside the shard, made anew when the shard changes."""

import os
import shutil

import numpy as np
import pytest

from shards import FLICKR, needs_flickr, sample, write_shards, write_tar
from training.data import index
from training.data.index import index_shards
from training.errors import UsageError


def test_sources_are_folders_globs_braces_and_joins(tmp_path):
    a, b = write_shards(tmp_path / "a", [2, 3]), write_shards(tmp_path / "b", [4])
    forms = [f"{a}::{b}", f"{a}/*.tar::{b}/00000.tar", f"{a}/{{00000..00001}}.tar::{b}"]
    found = [index_shards(urls) for urls in forms]
    assert [list(sources.counts) for sources in found] == [[2, 3, 4]] * 3
    assert list(found[0].source) == [0, 0, 1]
    assert found[0].num_samples == 9 and found[0].rows_of(1) == range(2, 5)
    shard, place = found[0].locate(4)
    assert shard.records["key"][place] == b"000004"


def test_upsampling_factors_are_one_per_source(tmp_path):
    a, b = write_shards(tmp_path / "a", [1]), write_shards(tmp_path / "b", [1])
    assert index_shards(f"{a}::{b}", weights="1::2.5").weights == [1.0, 2.5]
    for wrong in ("1", "1::0", "1::x", "1::nan", "1::2::3"):
        with pytest.raises(UsageError, match="--train-data-upsampling-factors"):
            index_shards(f"{a}::{b}", weights=wrong)


def test_an_index_is_made_once(tmp_path, monkeypatch):
    folder = write_shards(tmp_path, [3])
    before = index_shards(folder).fingerprint()
    monkeypatch.setattr(index, "build_index", lambda path: pytest.fail("headers read again"))
    assert index_shards(folder).fingerprint() == before


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not a zip", None])
def test_a_damaged_index_is_made_anew(tmp_path, damage):
    folder = write_shards(tmp_path, [3])
    before = index_shards(folder).fingerprint()
    place = tmp_path / "00000.tar.index.npz"
    place.write_bytes(place.read_bytes()[:300] if damage is None else damage)
    assert index_shards(folder).fingerprint() == before


def test_a_changed_shard_is_indexed_anew(tmp_path):
    folder = write_shards(tmp_path, [3])
    before = index_shards(folder)
    assert before.shards[0].records["key"][0] == b"000000"
    write_tar(tmp_path / "00000.tar", sample("x") | sample("y") | sample("z"))
    os.utime(tmp_path / "00000.tar", ns=(1, 1))  # the same size, and older
    after = index_shards(folder)
    assert after.shards[0].records["key"][0] == b"x"
    assert after.fingerprint()["hash"] != before.fingerprint()["hash"]


def test_the_fingerprint_tells_content_not_place_or_time(tmp_path):
    write_shards(tmp_path / "a", [3, 2])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for tar in (tmp_path / "b").glob("*.tar"):
        os.utime(tar, ns=(1, 1))
    assert (
        index_shards(str(tmp_path / "a")).fingerprint()
        == index_shards(str(tmp_path / "b")).fingerprint()
    )


def test_a_read_only_folder_stays_as_it_is(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    write_shards(folder, [3])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder.chmod(0o555)
    try:
        assert index_shards(str(folder)).num_samples == 3
        assert [path.name for path in folder.iterdir()] == ["00000.tar"]
    finally:
        folder.chmod(0o755)
    assert len(list((tmp_path / "cache").rglob("*.index.npz"))) == 1


def test_many_processes_make_the_same_indexes(tmp_path):
    folder = write_shards(tmp_path / "data", [2] * 6)
    alone = index_shards(folder, cache_dir=tmp_path / "a")
    together = index_shards(folder, cache_dir=tmp_path / "b", workers=2)
    assert together.fingerprint() == alone.fingerprint()
    for a, b in zip(alone.shards, together.shards):
        assert np.array_equal(a.records, b.records)
    assert not list((tmp_path / "b").rglob(".index.*")), "no temporary file stays"


@needs_flickr
def test_flickr8k_is_indexed_whole(tmp_path):
    sources = index_shards(str(FLICKR), cache_dir=tmp_path)
    assert sources.fingerprint() == {
        "shards": 15,
        "samples": 7091,
        "usable": 7091,
        "skipped": {},
        "bytes": 49244160,
        "hash": "7417484b5a1ebeb88c9b465b062bcdba9bdd1dee707329d67179992049d2dc6c",
    }
