"""Remote and piped shards: the same members and limits, resumed by shard."""

import logging
import time

import pytest

from shards import Letters, encode, picture, sample, write_shards, write_tar
from training.data.decode import Caps
from training.data.index import is_remote
from training.data.stream import StreamLoader, read_shard, stream_fingerprint
from training.data.views import ImageSpec, eval_view
from training.errors import Failure, UsageError
from training.masking import masked

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def stream(urls, **options):
    options = dict(seed=0, global_batch=5, shuffle=4) | options
    return StreamLoader(urls, [eval_view(ImageSpec(8))], [Letters()], **options)


def piped(folder, n):
    return f"pipe:cat {folder}/{{00000..{n - 1:05d}}}.tar"


@pytest.mark.parametrize(
    ("url", "remote"),
    [
        ("pipe:cat x.tar", True),
        ("https://example.org/{000..010}.tar", True),
        ("s3://bucket/x.tar", True),
        ("a.tar::s3://bucket/x.tar", True),
        ("/data/x.tar", False),
        ("data/{000..010}.tar::more/0.tar", False),
    ],
)
def test_remote_sources_are_told_from_local_ones(url, remote):
    assert is_remote(url) is remote


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_full_batches_of_every_sample(tmp_path, workers):
    write_shards(tmp_path, [10, 10, 10, 10])
    loader = stream(piped(tmp_path, 4), workers=workers, start_method="fork" if workers else None)
    batches = list(loader.batches(0, 8)) + list(loader.batches(8, 24))
    loader.close()
    assert all(len(batch) == 5 == len(batch.images[0]) == len(batch.texts[0]) for batch in batches)
    assert all((batch.rows == -1).all() for batch in batches)
    assert len({key for batch in batches for key in batch.keys}) == 40


def test_a_large_batch_of_a_stream_is_put_together_of_its_workers_chunks(tmp_path):
    write_shards(tmp_path, [40] * 4)
    loader = stream(piped(tmp_path, 4), global_batch=512, workers=2, start_method="fork")
    batches = list(loader.batches(0, 1)) + list(loader.batches(1, 3))
    loader.close()
    assert [len(batch) for batch in batches] == [512] * 3 == [len(b.images[0]) for b in batches]
    first = batches[0].keys
    assert set(first[:128]).isdisjoint(first[128:256]), "two workers, each with shards of its own"
    assert 0 < loader.shards_consumed <= 3 * 512 // 40


def test_ranks_share_the_shards_of_a_pass(tmp_path):
    write_shards(tmp_path, [10, 10])
    keys = [
        key
        for rank in range(2)
        for batch in stream(
            piped(tmp_path, 2), global_batch=10, rank=rank, world_size=2, shuffle=0
        ).batches(0, 2)
        for key in batch.keys
    ]
    assert sorted(keys) == [f"{i:06d}" for i in range(20)]


def test_a_stream_resumes_at_the_shard_it_was_reading(tmp_path):
    write_shards(tmp_path, [10] * 6)
    urls = piped(tmp_path, 6)
    loader = stream(urls, shuffle=0)
    before = [key for batch in loader.batches(0, 6) for key in batch.keys]
    consumed = loader.shards_consumed
    assert consumed == 2, "30 samples: two shards done, the third just read"
    after = stream(urls, shuffle=0, shards_consumed=consumed)
    keys = [key for batch in after.batches(6, 14) for key in batch.keys]
    assert len(set(before[:20] + keys)) == 60, "nothing is lost of this pass"
    assert len(set(before) & set(keys)) == 10, "and only the open shard is read again"


def test_streaming_is_announced_once(tmp_path, caplog):
    write_shards(tmp_path, [5])
    with caplog.at_level(logging.WARNING):
        for rank in range(2):
            stream(piped(tmp_path, 1), global_batch=10, rank=rank, world_size=2)
    assert [record.message for record in caplog.records] == [caplog.messages[0]]
    assert "resume at a shard" in caplog.messages[0]


def test_streamed_members_are_an_allow_list_within_limits(tmp_path):
    tar = write_tar(
        tmp_path / "0.tar",
        {
            **sample("a"),
            "a.pyd": b"\x80\x04.",
            **sample("../b"),
            **sample("c"),
            "c.pkl": b"\x80\x04.",
            **(sample("d") | {"d.jpg": b"x" * 5000}),
            "e.jpg": b"x",
        },
    )
    found = list(read_shard(f"pipe:cat {tar}", Caps(max_bytes=4000)))
    names = [s if isinstance(s, str) else s["key"] for s in found]
    assert names == [b"a", "unsafe name", b"c", "image: too many bytes", "no caption"]
    assert set(found[0]) == {"key", "image", "text", "json"}


def test_a_damaged_or_missing_remote_shard_is_counted_and_left(tmp_path):
    write_shards(tmp_path, [10, 10])
    whole = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(whole[: len(whole) // 2])
    loader = stream(piped(tmp_path, 3), shuffle=0)  # and the third does not exist
    skipped = [reason for batch in loader.batches(0, 10) for reason in batch.skipped]
    assert "shard: damaged or unreadable" in skipped


def test_streams_without_a_sample_end_with_an_error(tmp_path):
    with pytest.raises(Failure, match="3 shards in a row without a usable sample"):
        next(stream(piped(tmp_path, 2)).batches(0, 1))


@pytest.mark.parametrize("shards", [1, 3])
def test_streams_whose_samples_all_fail_end_with_an_error(tmp_path, shards):
    for shard in range(shards):
        members = {}
        for i in range(10):
            members |= sample(str(i)) | {f"{i}.jpg": encode(picture(i), "GIF")}
        write_tar(tmp_path / f"{shard:05d}.tar", members)
    loader = stream(piped(tmp_path, shards))
    with pytest.raises(Failure, match=r"shards in a row without a usable sample.*image: broken"):
        next(loader.batches(0, 1))
    loader.close()


def test_a_bad_shard_among_good_ones_is_counted_not_given_up(tmp_path):
    write_shards(tmp_path, [200, 200, 200])
    members = {}
    for i in range(200):
        members |= sample(str(i)) | {f"{i}.jpg": b"no image"}
    write_tar(tmp_path / "00001.tar", members)
    loader = stream(piped(tmp_path, 3), global_batch=50)
    skipped = sum(batch.skipped.get("image: broken", 0) for batch in loader.batches(0, 24))
    loader.close()
    assert 400 <= skipped <= 800, "three passes"


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ("s3://bucket/{000..009}.tar", "s3: can't be opened, only .*pipe.*aws s3 cp"),
        ("pipe:cat x.tar::hdfs://name/x.tar", "hdfs: can't be opened"),
        ("gs://bucket/x.tar", "gs: needs the program gsutil, which is not here"),
        ("pipe:cat {0..9999999999}.tar", "names 10,000,000,000 shards"),
    ],
)
def test_a_scheme_that_cannot_be_opened_is_refused_before_anything_is_read(
    urls, message, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))  # no program is here
    with pytest.raises(UsageError, match=message):
        stream(urls)


def test_local_files_may_stand_beside_streams(tmp_path):
    write_shards(tmp_path, [10, 10])
    loader = stream(f"{tmp_path}/00000.tar::file://{tmp_path}/00001.tar::{piped(tmp_path, 1)}")
    keys = {key for batch in loader.batches(0, 12) for key in batch.keys}
    loader.close()
    assert len(keys) == 20


SECRETS = {
    "https://user:SECRET@host/x.tar": "https://***@host/x.tar",
    "https://host/x.tar?X-Amz-Expires=SECRET&X-Amz-Signature=SECRET": "https://host/x.tar?***",
    "https://host/x.tar?sv=SECRET&sig=SECRET": "https://host/x.tar?***",
    "https://host/x.tar?part=3": "https://host/x.tar?part=3",
    "pipe:curl -H 'Authorization: Bearer SECRET' https://host/x.tar": (
        "pipe:curl -H 'Authorization: Bearer ***' https://host/x.tar"
    ),
    "pipe:TOKEN=SECRET get https://host/x.tar": "pipe:TOKEN=*** get https://host/x.tar",
    "pipe:curl -H X-Api-Key:SECRET host/x.tar": "pipe:curl -H X-Api-Key:*** host/x.tar",
    "pipe:get --token hf_SECRET x.tar": "pipe:get --token hf_*** x.tar",
}


@pytest.mark.parametrize("url", SECRETS)
def test_a_stream_is_known_by_its_url_without_what_is_secret(url):
    assert masked(url) == SECRETS[url]
    renewed = stream_fingerprint(url.replace("SECRET", "RENEWED1"))
    assert renewed == stream_fingerprint(url)
    assert renewed != stream_fingerprint(url.replace("x.tar", "y.tar"))
    assert renewed["samples"] == renewed["usable"] == "not counted"


def test_secrets_are_in_no_message_of_a_stream(caplog):
    loader = stream("pipe:exit 3; echo hf_SECRET")
    with pytest.raises(Failure) as caught:
        next(loader.batches(0, 1))
    assert "hf_***" in str(caught.value) and "SECRET" not in str(caught.value) + caplog.text
    with pytest.raises(UsageError) as refused:
        stream("s3://user:SECRET@bucket/x.tar")
    assert "SECRET" not in str(refused.value)


def test_a_stalled_stream_is_given_up_with_its_name_or_for_a_stop(tmp_path):
    loader = stream("pipe:sleep 1000 && echo hf_SECRET")
    assert list(loader.batches(0, 1, stopping=lambda: True)) == []
    with pytest.raises(Failure, match=r"no batch for 1 seconds.*reads pipe:sleep 1000.*hf_\*\*\*"):
        next(loader.batches(0, 1, timeout=1))
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 12
