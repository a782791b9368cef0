"""The index: made once, kept beside the shard, made anew when the shard changes."""

import os
import random
import re
import shutil

import numpy as np
import pytest

from shards import FLICKR, needs_flickr, overwrite, sample, write_shards, write_tar
from training.check_data import check
from training.data import shard
from training.data.index import index_shards
from training.data.shard import LOST, verify
from training.errors import Failure, UsageError


def test_sources_are_folders_globs_braces_and_joins(tmp_path):
    a, b = write_shards(tmp_path / "a", [2, 3]), write_shards(tmp_path / "b", [4])
    forms = [f"{a}::{b}", f"{a}/*.tar::{b}/00000.tar", f"{a}/{{00000..00001}}.tar::{b}"]
    found = [index_shards(urls) for urls in forms]
    assert [list(sources.counts) for sources in found] == [[2, 3, 4]] * 3
    assert list(found[0].source) == [0, 0, 1]
    assert found[0].num_samples == 9 and found[0].rows_of(1) == range(2, 5)
    assert found[0].place(4) == (1, 2) and found[0].record(4, view=0)[1]["key"] == b"000004"


def test_upsampling_factors_are_one_per_source(tmp_path):
    a, b = write_shards(tmp_path / "a", [1]), write_shards(tmp_path / "b", [1])
    assert index_shards(f"{a}::{b}", weights="1::2.5").weights == [1.0, 2.5]
    for wrong in ("1", "1::0", "1::x", "1::nan", "1::2::3"):
        with pytest.raises(UsageError, match="--train-data-upsampling-factors"):
            index_shards(f"{a}::{b}", weights=wrong)


def test_an_index_is_made_once(tmp_path, monkeypatch):
    folder = write_shards(tmp_path, [3])
    before = index_shards(folder).fingerprint()
    monkeypatch.setattr(shard, "build_index", lambda path: pytest.fail("headers read again"))
    assert index_shards(folder).fingerprint() == before


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not a zip", None])
def test_a_damaged_index_is_made_anew(tmp_path, damage):
    folder = write_shards(tmp_path, [3])
    before = index_shards(folder).fingerprint()
    place = tmp_path / "00000.tar.index.npz"
    place.write_bytes(place.read_bytes()[:300] if damage is None else damage)
    assert index_shards(folder).fingerprint() == before


def test_an_index_damaged_at_any_place_lists_the_same_samples(tmp_path):
    folder = write_shards(tmp_path, [30])
    before = index_shards(folder).shards[0].records
    place = tmp_path / "00000.tar.index.npz"
    whole = place.read_bytes()
    random.seed(0)
    for trial in range(300):
        damaged = bytearray(whole)
        if trial % 3:
            damaged[random.randrange(len(whole))] ^= 1 << random.randrange(8)
        else:
            start = random.randrange(len(whole))
            damaged[start : start + 512] = bytes(len(damaged[start : start + 512]))
        place.write_bytes(damaged)
        shard._records.cache_clear()
        assert np.array_equal(index_shards(folder).shards[0].records, before), trial


def test_an_index_that_is_gone_or_another_shards_is_not_trusted_by_a_reader(tmp_path):
    folder = write_shards(tmp_path, [3])
    sources = index_shards(folder)
    expected = sources.shards[0].records.copy()
    write_tar(tmp_path / "other.tar", sample("x"))
    index_shards(str(tmp_path / "other.tar"))
    for damage in (os.remove, lambda place: shutil.copy(tmp_path / "other.tar.index.npz", place)):
        damage(tmp_path / "00000.tar.index.npz")
        shard._records.cache_clear()
        assert np.array_equal(sources.shards[0].records, expected)
    write_tar(tmp_path / "00000.tar", sample("y"))
    shard._records.cache_clear()
    with pytest.raises(Failure, match=r"00000.tar was changed after it was indexed"):
        len(sources.shards[0].records)


def test_content_is_verified_against_what_check_data_found(tmp_path):
    folder = write_shards(tmp_path, [3, 2])
    with pytest.raises(UsageError, match=r"--verify-data: .*00000.tar.index.npz has no hash"):
        verify(index_shards(folder).shards)
    check(folder)
    verify(index_shards(folder).shards)
    overwrite(tmp_path / "00001.tar", b"caption 0 of 000004", b"caption 0 of 00000X")
    with pytest.raises(UsageError, match=r"--verify-data: .*00001.tar or its index was altered"):
        verify(index_shards(folder).shards)


def test_a_pattern_does_not_match_indexes(tmp_path):
    write_shards(tmp_path, [2, 3])
    assert index_shards(f"{tmp_path}/*").num_samples == 5
    (tmp_path / "00000.tar.index.npz.host-1.tmp").write_bytes(b"of a process that was killed")
    assert index_shards(f"{tmp_path}/*").num_samples == 5


@pytest.mark.parametrize("names", ["{00000..9999999999}", "{0..99999}{0..99}", "{0..9}" * 9])
def test_a_pattern_of_too_many_shards_is_refused_before_it_is_expanded(names):
    with pytest.raises(UsageError, match="more than 1,000,000"):
        index_shards(f"data/{names}.tar")


def test_a_cut_shard_has_lost_what_it_lacks_to_the_others(tmp_path):
    folder = write_shards(tmp_path, [50, 50, 50])
    tar = tmp_path / "00001.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 10])
    sources = index_shards(folder)
    assert sources.num_samples + sum(sources.skipped.values()) == 150
    assert sources.num_samples < 110 and sources.skipped[LOST] > 40
    assert len(sources.problems) == 1 and re.search("00001.tar: .*truncated", sources.problems[0])


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
    for place, workers in (("a", 0), ("b", 2)):
        assert check(folder, cache_dir=str(tmp_path / place), workers=workers)["clean"]
    alone, together = (index_shards(folder, cache_dir=tmp_path / place) for place in "ab")
    assert together.fingerprint() == alone.fingerprint()
    for a, b in zip(alone.shards, together.shards):
        assert np.array_equal(a.records, b.records) and a.content == b.content
    assert not list((tmp_path / "b").rglob("*.tmp")), "no temporary file stays"


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
