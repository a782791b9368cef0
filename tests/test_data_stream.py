"""Remote and piped shards: the same members and limits, resumed by shard."""

import logging

import pytest

from shards import Letters, sample, write_shards, write_tar
from training.data.decode import Caps
from training.data.index import is_remote
from training.data.stream import StreamLoader, read_shard
from training.data.views import ImageSpec, eval_view
from training.errors import Failure

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
    with pytest.raises(Failure, match="2 shards in a row without a usable sample"):
        next(stream(piped(tmp_path, 2)).batches(0, 1))
