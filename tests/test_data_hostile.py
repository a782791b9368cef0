"""Bad input is used right, or skipped and counted by reason: never executed, never a hang.

Each bad sample ``bad`` lies between two good ones, which must still be read.
"""

import gzip
import io
import json
import os
import pickle
import random
import struct
import tarfile
import time
import zlib
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from shards import Letters, encode, picture, sample, write_tar
from training.check_data import check
from training.data.decode import BadSample, Caps, decode_image
from training.data.decode import _scans as scans_of
from training.data.index import index_shards
from training.data.loader import sequential
from training.data.pixels import Pixels, decode_pixels, tensor
from training.data.shard import LOST, STRAY, NotAShard, build_index
from training.data.stream import read_shard
from training.data.tar import BadTar, members
from training.data.views import ImageSpec, View, eval_view, train_view
from training.errors import Failure, UsageError

TRAPS = []


def spring(what):
    TRAPS.append(what)


class Trap:
    """Calls `spring` when unpickled."""

    def __reduce__(self):
        return spring, ("unpickled",)


def read(folder, captions="first", view=None, caps=None):
    """(keys, captions, images, skipped) of a folder of shards: from the index and on reading."""
    sources = index_shards(str(folder))
    skipped = dict(sources.skipped)
    keys, texts, images = [], [], []
    options = dict(batch_size=4, captions=captions, caps=caps)
    for batch in sequential(sources, [view or eval_view(ImageSpec(8))], [Letters(64)], **options):
        keys += batch.keys
        texts += [bytes(row.tolist()).rstrip(b"\0").decode() for row in batch.texts[0]]
        images += list(batch.images[0])
        for reason, count in batch.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    assert TRAPS == []
    return keys, texts, images, skipped


def bad_sample(**parts: bytes):
    """The members of ``bad``, changed."""
    changed = {f"bad.{ext}": data for ext, data in parts.items()}
    return {k: v for k, v in (sample("bad", 1) | changed).items() if v is not None}


def huge_png(side: int) -> bytes:
    """A few KB that decode to side x side pixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"IDAT", zlib.compress(b"\0" * 100_000)),
            chunk(b"IEND", b""),
        ]
    )


def huge_webp(side: int) -> bytes:
    """A header that claims side x side pixels."""
    edge = (side - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + edge + edge
    return b"RIFF" + struct.pack("<I", len(body)) + body


def object_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Trap()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def exif_rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(picture(1, (16, 8)), exif=exif.tobytes())


TRAP = pickle.dumps(Trap())
JPEG = encode(picture(1, (40, 30)))
USED = None
TORCH = train_view(ImageSpec(8), backend="torch")

# name: (members of the sample, why it is skipped or USED)
SAMPLES = {
    "zero-byte image": (bad_sample(jpg=b""), "empty image"),
    "broken JPEG": (bad_sample(jpg=b"\xff\xd8\xff\xe0" + b"garbage" * 50), "image: broken"),
    "JPEG cut short": (bad_sample(jpg=JPEG[: len(JPEG) // 2]), "image: broken"),
    "text as an image": (bad_sample(jpg=b"<html>404 not found</html>"), "image: broken"),
    "GIF as an image": (bad_sample(jpg=encode(picture(1), "GIF")), "image: broken"),
    "PNG of 2.5 gigapixels": (bad_sample(jpg=None, png=huge_png(50_000)), "image: too many pixels"),
    "WebP of 268 megapixels": (bad_sample(jpg=huge_webp(16_383)), "image: too many pixels"),
    "image over the byte cap": (bad_sample(jpg=JPEG + b"\0" * 70_000), "image: too many bytes"),
    "PNG with a broken chunk": (bad_sample(jpg=encode(picture(1), "PNG")[:-30]), "image: broken"),
    "wrong extension": (bad_sample(jpg=encode(picture(1), "PNG")), USED),
    "capital extension": ({"bad.JPG": JPEG, "bad.TXT": b"caption"}, USED),
    "WebP": (bad_sample(jpg=None, webp=encode(picture(1), "WEBP")), USED),
    "CMYK": (bad_sample(jpg=encode(picture(1, mode="CMYK"))), USED),
    "grey": (bad_sample(jpg=encode(picture(1, mode="L"))), USED),
    "16-bit grey": (bad_sample(jpg=encode(picture(1, mode="I;16"), "PNG")), USED),
    "palette": (bad_sample(jpg=encode(picture(1, mode="P"), "PNG")), USED),
    "transparent": (bad_sample(jpg=encode(picture(1, mode="RGBA"), "PNG")), USED),
    "animated": (
        bad_sample(jpg=encode(picture(1), "WEBP", save_all=True, append_images=[picture(2)])),
        USED,
    ),
    "EXIF-rotated": (bad_sample(jpg=exif_rotated()), USED),
    "one pixel": (bad_sample(jpg=encode(picture(1, (1, 1)))), USED),
    "very wide": (bad_sample(jpg=encode(picture(1, (2000, 1)))), USED),
    "two images": (bad_sample(png=b"never read"), USED),
    "no image": (bad_sample(jpg=None), "no image"),
    "no caption": (bad_sample(txt=None), "no caption"),
    "zero-byte caption": (bad_sample(txt=b""), "empty caption"),
    "blank caption": (bad_sample(txt=b" \n\t"), "caption: empty"),
    "caption of zeros": (bad_sample(txt=bytes(20)), "caption: empty"),
    "1 MB caption": (bad_sample(txt=b"word " * 200_000), "caption: too long"),
    "caption that is not UTF-8": (bad_sample(txt=b"caf\xe9"), "caption: not UTF-8"),
    "caption with NUL and emoji": (bad_sample(txt="a\0b \N{GRINNING FACE}".encode()), USED),
    "no JSON": (bad_sample(json=None), USED),
    "pickle beside": (bad_sample(pkl=TRAP, pickle=TRAP, pyd=TRAP, pth=TRAP), USED),
    "object array beside": (bad_sample(npy=object_array(), npz=object_array()), USED),
    "pickle for an image": (bad_sample(jpg=None, pyd=TRAP), "no image"),
    "pickle called an image": (bad_sample(jpg=TRAP), "image: broken"),
    "gzip members": (
        {"bad.jpg.gz": gzip.compress(JPEG), "bad.txt": b"caption"},
        "no image",
    ),
    "longer extension": ({"bad.small.jpg": JPEG, "bad.txt": b"caption"}, "no image"),
    "nested folders": ({"a/b.c/bad.jpg": JPEG, "a/b.c/bad.txt": b"caption"}, USED),
    "very long name": (
        {"d/" * 100 + "bad.jpg": JPEG, "d/" * 100 + "bad.txt": b"caption"},
        USED,
    ),
    "name beyond the limit": (
        {"d" * 2000 + ".jpg": JPEG, "d" * 2000 + ".txt": b"caption"},
        "unsafe name",
    ),
    "'..' in the name": ({"../../bad.jpg": JPEG, "../../bad.txt": b"x"}, "unsafe name"),
    "absolute name": ({"/etc/bad.jpg": JPEG, "/etc/bad.txt": b"x"}, "unsafe name"),
    "name that is not UTF-8": (
        {"b\udce9d.jpg": JPEG, "b\udce9d.txt": b"caption"},
        USED,
    ),
    "members out of order": ({"bad.json": b"{}", "bad.txt": b"caption", "bad.jpg": JPEG}, USED),
}


def test_the_trap_of_these_tests_would_spring():
    pickle.loads(TRAP)
    assert TRAPS.pop() == "unpickled"


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
@pytest.mark.parametrize("view", [eval_view(ImageSpec(8)), TORCH], ids=["pil", "torch"])
def test_a_bad_sample_is_used_right_or_counted(tmp_path, name, format, view):
    bad, reason = SAMPLES[name]
    all_members = [*sample("a").items(), *bad.items(), *sample("z").items()]
    write_tar(tmp_path / "0.tar", all_members, format=format, errors="surrogateescape")
    keys, _, images, skipped = read(tmp_path, view=view, caps=Caps(max_bytes=60_000))
    assert keys[0] == "a" and keys[-1] == "z"
    assert skipped == ({} if reason is USED else {reason: 1})
    assert len(keys) == len(images) == (3 if reason is USED else 2)


@pytest.mark.parametrize(
    "name", ["CMYK", "grey", "16-bit grey", "palette", "transparent", "animated", "EXIF-rotated"]
)
def test_unusual_images_have_stock_open_clips_pixels(tmp_path, name):
    from webdataset.autodecode import ImageHandler

    data = SAMPLES[name][0]["bad.jpg"]
    write_tar(tmp_path / "0.tar", bad_sample(jpg=data))
    _, _, (image,), _ = read(tmp_path, view=View(()))
    stock = np.array(ImageHandler("pilrgb")("x.jpg", data))
    assert (image.permute(1, 2, 0).numpy() == stock).all()


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (b"{", "json: broken"),
        (b"[" * 100_000, "json: broken"),
        (b"\xff\xfe", "json: broken"),
        (b'"' + b"x" * (1 << 20) + b'"', "json: too many bytes"),
        (json.dumps({"captions": 1}).encode(), "json: captions are not a list of strings"),
        (json.dumps({"captions": "one"}).encode(), USED),
        (json.dumps({"captions": [1, None]}).encode(), "json: captions are not a list of strings"),
        (json.dumps({"captions": ["x" * 20_000]}).encode(), "caption: too long"),
        (json.dumps({"captions": []}).encode(), USED),
        (json.dumps(["no object"]).encode(), USED),
        (b"", "json: broken"),
    ],
    ids=range(11),
)
def test_bad_json_counts_only_where_captions_come_from_it(tmp_path, document, reason):
    write_tar(tmp_path / "0.tar", sample("a") | bad_sample(json=document))
    assert read(tmp_path)[3] == {}
    keys, _, _, skipped = read(tmp_path, captions="all")
    assert skipped == ({} if reason is USED else {reason: 1})
    assert len(keys) == (2 if reason is USED else 1)


def test_of_a_duplicate_key_the_first_is_used(tmp_path):
    again = sample("a") | {"a.txt": b"another"}
    write_tar(tmp_path / "0.tar", [*sample("a").items(), *sample("b").items(), *again.items()])
    keys, texts, _, skipped = read(tmp_path)
    assert keys == ["a", "b"] and texts[0] == "caption 0 of a"
    assert skipped == {"duplicate key": 1}


def test_members_of_a_sample_may_lie_apart(tmp_path):
    everything = sample("a") | sample("b")
    by_kind = sorted(everything.items(), key=lambda item: item[0][-3:])
    write_tar(tmp_path / "0.tar", by_kind)
    keys, texts, _, skipped = read(tmp_path)
    assert (keys, texts, skipped) == (["a", "b"], ["caption 0 of a", "caption 0 of b"], {})


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_not_followed(tmp_path, kind):
    link = tarfile.TarInfo("bad.jpg")
    link.type, link.linkname = kind, "/etc/passwd"
    write_tar(tmp_path / "0.tar", [*sample("a").items(), (link, b""), ("bad.txt", b"caption")])
    keys, _, _, skipped = read(tmp_path)
    assert keys == ["a"] and skipped == {"link member": 1}


def test_folders_devices_and_metadata_are_passed_over(tmp_path):
    folder, fifo = tarfile.TarInfo("a"), tarfile.TarInfo("pipe.jpg")
    folder.type, fifo.type = tarfile.DIRTYPE, tarfile.FIFOTYPE
    write_tar(
        tmp_path / "0.tar",
        [
            (folder, b""),
            (fifo, b""),
            ("__meta__.json", b"{}"),
            ("._a.jpg", b"x"),
            ("README", b"x"),
            *sample("a").items(),
        ],
    )
    assert read(tmp_path)[::3] == (["a"], {})


def whole_tar(tmp_path):
    tar = write_tar(tmp_path / "0.tar", sample("a") | sample("b") | sample("c"))
    with tarfile.open(tar) as opened:
        ends = [m.offset_data + m.size for m in opened]
    return tar, tar.read_bytes(), ends


def test_a_tar_cut_in_the_data_keeps_what_is_whole(tmp_path):
    tar, data, ends = whole_tar(tmp_path)
    tar.write_bytes(data[: ends[6] - 10])  # within c.jpg
    assert read(tmp_path)[::3] == (["a", "b"], {"truncated": 1, LOST: 1})
    (problem,) = index_shards(str(tar)).shards[0].problems
    assert "truncated in the data" in problem


def test_a_tar_cut_in_a_header_keeps_what_is_whole(tmp_path):
    tar, data, ends = whole_tar(tmp_path)
    tar.write_bytes(data[: -(-ends[5] // 512) * 512 + 100])  # within the header of c.jpg
    assert read(tmp_path)[::3] == (["a", "b"], {LOST: 1})
    (problem,) = index_shards(str(tar)).shards[0].problems
    assert "truncated in a header" in problem


def test_a_damaged_header_ends_the_shard_there(tmp_path):
    tar, data, ends = whole_tar(tmp_path)
    place = -(-ends[5] // 512) * 512
    tar.write_bytes(data[:place] + b"\xff" * 512 + data[place + 512 :])
    keys, _, _, skipped = read(tmp_path)
    assert keys == ["a", "b"] and skipped[LOST] >= 1
    assert "damaged header" in index_shards(str(tar)).shards[0].problems[0]


def test_a_shard_cut_after_it_was_indexed_is_noticed(tmp_path):
    tar, data, ends = whole_tar(tmp_path)
    sources = index_shards(str(tar))
    tar.write_bytes(data[: ends[4]])
    with pytest.raises(Failure, match=r"0.tar was changed after it was indexed"):
        list(sequential(sources, [eval_view(ImageSpec(8))], [Letters()], batch_size=3))
    assert index_shards(str(tar)).num_samples == 2, "and it is indexed anew"


def whole_tar_of(*keys):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key in keys:
            for name, content in sample(key).items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zeroed(data, start, size):
    return data[:start] + bytes(size) + data[start + size :]


DAMAGES = {
    "zeroed header": (lambda data, second: zeroed(data, second, 512), 3),
    "zeroed page": (lambda data, second: zeroed(data, second, 4096), 3),
    "zeroed end": (lambda data, second: data[:second] + bytes(11_776), 1),
    "joined by cat": (lambda data, second: data + whole_tar_of("d", "e", "f"), 6),
    "unfinished": (lambda data, second: zeroed(data * 20, second, len(data) * 20 - second), 60),
    "end mark within": (lambda data, second: data[:second] + bytes(1024) + data[second:], 3),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_samples_behind_an_end_mark_are_counted_as_lost(tmp_path, name):
    tar, data, ends = whole_tar(tmp_path)
    damage, samples = DAMAGES[name]
    tar.write_bytes(damage(data, -(-ends[2] // 512) * 512))  # where b begins
    keys, _, _, skipped = read(tmp_path)
    assert keys[0] == "a" and skipped[LOST] >= 1
    assert len(keys) + sum(skipped.values()) >= samples
    assert "byte" in index_shards(str(tar)).shards[0].problems[0]
    with pytest.raises(BadTar):
        list(read_shard(str(tar), Caps()))


@pytest.mark.parametrize("zeros", [0, 512, 1024, 10_240, 1 << 18], ids=str)
def test_an_end_mark_of_one_block_or_two_and_padding_lose_nothing(tmp_path, zeros):
    tar, data, ends = whole_tar(tmp_path)
    end = -(-ends[-1] // 512) * 512
    record = max(512, zeros)  # writers fill whole records
    tar.write_bytes(data[:end] + bytes(512 + (-(end + 512) % record if zeros > 512 else zeros)))
    assert read(tmp_path)[::3] == (["a", "b", "c"], {})
    assert index_shards(str(tar)).problems == []


@pytest.mark.parametrize(
    ("members", "listed", "counted"),
    [
        ({"a.b.jpg": JPEG, "a.b.txt": b"x", "a.c.jpg": JPEG, "a.c.txt": b"x"}, 0, {STRAY: 2}),
        ({"x.gif": b"x", "y.npy": b"x", "y.cls": b"1"}, 0, {STRAY: 2}),
        ({"x.gif": b"x", "x.txt": b"caption"}, 0, {"no image": 1}),
        (sample("x") | {"x.npy": b"x", "x.seg.png": b"x", "x.jpg.gz": b"x"}, 1, {}),
        ({"x.npy": b"x", "x.seg.png": b"x"} | sample("x"), 1, {}),
    ],
    ids=["dots", "other kinds", "GIF", "others after", "others before"],
)
def test_what_no_sample_uses_is_counted_by_key(tmp_path, members, listed, counted):
    write_tar(tmp_path / "0.tar", sample("a0") | members)
    assert (len(read(tmp_path)[0]) - 1, read(tmp_path)[3]) == (listed, counted)
    streamed = list(read_shard(str(tmp_path / "0.tar"), Caps()))
    assert sorted(s for s in streamed if isinstance(s, str)) == sorted(Counter(counted).elements())


def test_random_damage_never_loses_a_sample_in_silence(tmp_path):
    keys = [f"{i:03d}" for i in range(12)]
    whole = whole_tar_of(*keys)
    tar = tmp_path / "0.tar"
    random.seed(0)
    for trial in range(2000):
        damaged, place = bytearray(whole), random.randrange(len(whole))
        match trial % 4:
            case 0:
                for _ in range(random.choice([1, 2, 8])):
                    damaged[random.randrange(len(whole))] ^= 1 << random.randrange(8)
            case 1:
                del damaged[place:]
            case 2:
                damaged[place:place] = random.randbytes(random.choice([1, 100, 512, 5000]))
            case 3:
                size = random.choice([1, 512, 4096])
                damaged[place : place + size] = bytes(len(damaged[place : place + size]))
        tar.write_bytes(damaged)
        try:
            records, meta = build_index(str(tar))
        except NotAShard:
            continue
        assert len(records) == len(keys) or meta["skipped"], (trial, meta)
        if len(damaged) >= len(whole):  # what a file that was cut has lost, it can't tell
            assert len(records) + sum(meta["skipped"].values()) >= len(keys), (trial, meta)


def many_scans(scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = encode(picture(1, (40, 30)), progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (scans - data.count(b"\xff\xda") + 1) + data[-2:]


def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded(tmp_path):
    write_tar(tmp_path / "0.tar", sample("a") | bad_sample(jpg=many_scans(1000)))
    assert read(tmp_path)[::3] == (["a"], {"image: too many scans": 1})
    for scans in (10, 64):
        decode_image(many_scans(scans), Caps())
    for flood in (b"\xff" * 10**6, b"\xff\x01" * 10**6, JPEG * 1000):
        start = time.monotonic()
        assert scans_of(b"\xff\xd8" + flood) >= 0
        assert time.monotonic() - start < 1


def test_torch_decodes_what_pillow_decodes_to_the_same_pixels_and_nothing_else():
    bases = [
        encode(picture(1, (40, 30))),
        encode(picture(2, (33, 47)), subsampling=0, restart_marker_blocks=2),
        encode(picture(3, (50, 40)), progressive=True),
        encode(picture(4, (30, 30), "CMYK")),
        encode(picture(5, (30, 30)), "PNG"),
        encode(picture(6, (30, 30)), "WEBP"),
        many_scans(100),
    ]
    rng = random.Random(0)
    outcomes = Counter()
    for trial in range(1500):
        data = bytearray(rng.choice(bases))
        place = rng.randrange(len(data))
        kind = rng.randrange(4)
        if kind == 0:
            del data[place:]
        elif kind == 1:
            data[place:place] = rng.randbytes(rng.choice([1, 30]))
        else:
            for _ in range(rng.choice([0, 1, 3, 30])):
                data[rng.randrange(len(data))] = rng.randrange(256)
        caps = Caps(max_pixels=1 << 16)
        decided = []
        for decode in (decode_image, partial(decode_pixels, least=1 << 10)):
            try:
                image = decode(bytes(data), caps)
                pixels = image.image if isinstance(image, Pixels) else tensor(image)
                decided.append(pixels)
            except BadSample as reason:
                decided.append(str(reason))
        if isinstance(decided[0], str):
            assert decided[0] == decided[1], trial
        else:
            assert torch.equal(*decided), trial
        outcomes[decided[0] if isinstance(decided[0], str) else "used"] += 1
    assert outcomes["used"] > 200 and outcomes["image: broken"] > 200
    assert outcomes["image: too many scans"] and outcomes["image: too many pixels"]


@pytest.mark.parametrize("size", [(1, 65_000), (65_000, 1)], ids=str)
def test_an_image_too_long_to_resize_is_refused_before_it_is_resized(tmp_path, size):
    write_tar(tmp_path / "0.tar", sample("a") | bad_sample(jpg=encode(picture(1, size))))
    keys, _, _, skipped = read(tmp_path, view=eval_view(ImageSpec(224)))
    assert (keys, skipped) == (["a"], {"image: too long for its width": 1})
    assert len(read(tmp_path, view=train_view(ImageSpec(224)))[0]) == 2, "a crop of it is small"


def test_a_fifo_is_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(UsageError, match=r"0.tar: not a regular file"):
        index_shards(str(tmp_path / "0.tar"))
    with pytest.raises(NotAShard, match=r"0.tar: not a regular file"):
        build_index(str(tmp_path / "0.tar"))
    with pytest.raises(OSError, match="not a regular file"):
        next(read_shard(str(tmp_path / "0.tar"), Caps()))
    assert check(str(tmp_path / "0.tar"))["problems"] == {"shard: unreadable": 1}


@pytest.mark.parametrize(
    ("text", "first", "every"),
    [
        (b" one caption\n", "one caption", {"one caption"}),
        ("one\u2028caption\r\n".encode(), "one\u2028caption", {"one\u2028caption"}),
        (b"\none\n\n two \r\nthree\n", "one", {"one", "two", "three"}),
    ],
    ids=["one line", "other separators", "retrieval layout"],
)
def test_each_line_of_a_text_is_a_caption(tmp_path, text, first, every):
    members = {}
    for i in range(40):
        members |= {f"{i}.jpg": JPEG, f"{i}.txt": text}
    write_tar(tmp_path / "0.tar", members)
    assert set(read(tmp_path)[1]) == {first}
    assert set(read(tmp_path, captions="all")[1]) == every


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("0.tar", gzip.compress(b"\0" * 10_000), "gzip"),
        ("0.tar", b"\x28\xb5\x2f\xfd" + b"\0" * 1000, "zstd"),
        ("0.tar", b"PK\x03\x04" + b"\0" * 1000, "zip"),
        ("0.tar", b"version https://git-lfs.github.com/spec/v1\n" * 20, "not a tar"),
        ("0.tar", b"short", "truncated in a header"),
        ("0.tar", b"", "no usable sample"),
        ("0.tar", b"\0" * 10_240, "no usable sample"),
    ],
    ids=["gzip", "zstd", "zip", "LFS pointer", "short", "zero bytes", "empty tar"],
)
def test_a_file_that_is_no_tar_is_refused_by_name(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=message) as caught:
        index_shards(str(tmp_path / name))
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ("{tmp}/9.tar", "9.tar: no such file"),
        ("{tmp}/{{0..3}}.tar", r"1.tar \(and 2 more\): no such file"),
        ("{tmp}/nowhere", "nowhere: no such file"),
        ("{tmp}/*.tgz", "no shard found"),
        ("{tmp}/{{0..3.tar", "unbalanced braces|no such file"),
        ("{tmp}/0.tar::", "no shard found|no such file"),
    ],
)
def test_a_missing_shard_is_refused_by_name(tmp_path, urls, message):
    write_tar(tmp_path / "0.tar", sample("a"))
    with pytest.raises(UsageError, match=message):
        index_shards(urls.format(tmp=tmp_path))


def extension_header(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "tail",
    [
        extension_header(b"L", 1 << 40),
        extension_header(b"x", 20) + b"99999999999 path=x\n".ljust(512, b"\0"),
        extension_header(b"x", 20) + b"0 path=x\n".ljust(512, b"\0"),
        extension_header(b"x", 20) + b"20 size=-5\n".ljust(512, b"\0"),
        extension_header(b"L", 512) + b"a" * 512,
        extension_header(b"L", 10) + b"a" * 10,
        extension_header(b"S", 100),
        extension_header(b"0", 8 << 30),
    ],
    ids=["1 TB name", "pax length", "pax zero", "pax size", "no member", "cut", "sparse", "8 GB"],
)
def test_crafted_headers_end_the_walk(tail):
    good = io.BytesIO()
    with tarfile.open(fileobj=good, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    data = good.getvalue()[:512] + tail
    found = []
    with pytest.raises(BadTar):
        for member in members(lambda size, place: data[place : place + size], len(data)):
            found.append(member.name)
    assert found[0] == b"a.jpg" and len(found) <= 2


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path, format):
    names = ["a.jpg", "d" * 60 + "/" + "e" * 60 + ".txt", "x/y.json", "é.png"]
    tar = write_tar(tmp_path / "0.tar", [(n, b"x" * i * 300) for i, n in enumerate(names)],
                    format=format)  # fmt: skip
    data = tar.read_bytes()
    found = list(members(lambda size, place: data[place : place + size], len(data)))
    with tarfile.open(tar) as opened:
        expected = [(m.name.encode(), m.offset_data, m.size) for m in opened]
    assert [(m.name, m.offset, m.size) for m in found] == expected
