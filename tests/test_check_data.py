"""What check_data finds, and how it ends."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from shards import FLICKR, encode, needs_flickr, overwrite, picture, sample, write_shards, write_tar
from training.check_data import check, main
from training.data.index import index_shards
from training.data.shard import LOST, verify
from training.errors import UsageError


def damaged_set(folder):
    """Shards 0 to 6: good, cut, missing, gzip, bad samples, a repeated key, empty."""
    write_shards(folder, [4, 4])
    cut = folder / "00001.tar"
    cut.write_bytes(cut.read_bytes()[:600])
    (folder / "00003.tar").write_bytes(b"\x1f\x8b" + b"\0" * 600)
    write_tar(
        folder / "00004.tar",
        {
            **sample("a"),
            **(sample("b") | {"b.jpg": b"no image"}),
            **(sample("c") | {"c.txt": b"\xff"}),
            "d.jpg": encode(picture()),
            "e.txt": b"alone",
            **(sample("f") | {"f.jpg": encode(picture(1, (90, 90)))[:-400]}),
        },
    )
    write_tar(folder / "00005.tar", sample("a"))
    write_tar(folder / "00006.tar", {})
    return f"{folder}/{{00000..00006}}.tar"


def test_clean_data_end_with_zero(tmp_path, capsys):
    assert main([write_shards(tmp_path, [3, 4]), "--deep", "--workers", "0"]) == 0
    text = capsys.readouterr().out
    assert "2 shards" in text and "7 samples" in text and "no problem found" in text


@pytest.mark.parametrize(("deep", "broken"), [(False, 1), (True, 2)])
def test_each_problem_is_counted_with_an_example(tmp_path, deep, broken):
    report = check(damaged_set(tmp_path), deep=deep)
    problems = report["problems"]
    assert problems.pop("image: broken") == broken, "a cut image shows only when decoded"
    assert problems == {
        "shard: damaged": 1,
        LOST: 1,
        "truncated": 1,
        "shard: missing": 1,
        "shard: unreadable": 1,
        "shard: empty": 1,
        "caption: not UTF-8": 1,
        "no caption": 1,
        "no image": 1,
        "key in several shards": 1,
    }
    assert not report["clean"]
    for reason, key in (("no caption", "d"), ("no image", "e"), ("key in several shards", "a")):
        assert any(p.endswith(f".tar: {key}") for p in report["examples"][reason]), reason
    assert any("00004.tar: b" in place for place in report["examples"]["image: broken"])
    assert "gzip" in report["examples"]["shard: unreadable"][0]


def test_problems_end_with_one_and_wrong_usage_with_two(tmp_path):
    def run(*args):
        command = [sys.executable, "-m", "training.check_data", *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=100)

    found = run(damaged_set(tmp_path), "--json", "--workers", "2")
    assert found.returncode == 1 and json.loads(found.stdout)["problems"]["no image"] == 1
    wrong = run("pipe:cat x.tar")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1


def test_training_is_told_of_shards_what_check_data_finds(tmp_path):
    urls = f"{damaged_set(tmp_path)}".replace("{00000..00006}", "{00000,00001,00004,00006}")
    report, sources = check(urls), index_shards(urls)
    damaged = report["examples"]["shard: damaged"] + report["examples"]["shard: empty"]
    assert sources.problems == damaged and len(damaged) == 2
    assert sources.skipped.items() <= report["problems"].items()
    assert report["problems"][LOST] == sources.skipped[LOST] > 1


def test_content_that_changed_since_it_was_checked_is_found_by_the_next_check(tmp_path):
    folder = write_shards(tmp_path, [3])
    assert check(folder)["clean"]
    overwrite(tmp_path / "00000.tar", b"caption 0 of 000001", b"caption 0 of 00000X")
    report = check(folder)
    assert report["problems"] == {"shard: damaged": 1}
    assert "altered" in report["examples"]["shard: damaged"][0]


def test_checking_does_not_trust_an_index(tmp_path):
    folder = write_shards(tmp_path, [3])
    check(folder)
    place = tmp_path / "00000.tar.index.npz"
    with np.load(place) as index:
        records, meta = index["records"], json.loads(index["meta"].tobytes())
    records["text"] = records["text"][::-1].copy()
    meta["digest"] = hashlib.sha256(records.tobytes()).hexdigest()
    np.savez(place, records=records, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8))
    with pytest.raises(UsageError, match=r"--verify-data: .*00000.tar or its index was altered"):
        verify(index_shards(folder).shards)
    assert check(folder)["problems"] == {"shard: damaged": 1}
    verify(index_shards(folder).shards)


@needs_flickr
def test_flickr8k_is_clean(tmp_path):
    report = check(f"{FLICKR}/{{00000..00003}}.tar", cache_dir=str(tmp_path))
    assert report["clean"] and report["fingerprint"]["usable"] == 2000
