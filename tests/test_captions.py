"""Captions of several fields: each in its share, one caption of a view, in caches too."""

import json
from collections import Counter

import numpy as np
import pytest
from safetensors.torch import load_file

from demo.scenes import pairs
from runs import CONFIGS, lines
from shards import Letters, sample, write_tar
from training.cache_teacher import main as write_cache
from training.clip.flags import parse_args
from training.data.decode import choose_caption
from training.data.index import index_shards
from training.data.loader import Loader
from training.data.order import Order
from training.errors import UsageError
from training.main import main

SHARES = {"txt": 0.4, "json:syn": 0.6}
FIELDS = {"txt": ["original"], "json:syn": ["synthetic"]}


def test_fields_come_in_their_shares_over_samples_and_evenly_over_a_samples_views():
    keys = [f"{number:06d}".encode() for number in range(3000)]
    for view in range(3):
        counts = Counter(choose_caption(FIELDS, SHARES, 0, view, key) for key in keys)
        assert counts["original"] / len(keys) == pytest.approx(0.4, abs=0.03)
    for key in keys[:200]:
        drawn = [choose_caption(FIELDS, SHARES, 0, view, key) for view in range(10)]
        assert 3 <= drawn.count("original") <= 5
        assert all(len(set(drawn[view : view + 3])) == 2 for view in range(8)), "one is left out"
    turned = {name: FIELDS[name] for name in reversed(FIELDS)}, dict(reversed(SHARES.items()))
    for key in keys[:200]:
        assert choose_caption(*turned, 0, 0, key) == choose_caption(FIELDS, SHARES, 0, 0, key)
    other = [choose_caption(FIELDS, SHARES, 1, 0, key) for key in keys]
    assert other != [choose_caption(FIELDS, SHARES, 0, 0, key) for key in keys]


@pytest.mark.parametrize("shares", [{"json:syn": 3, "txt": 1}, {"json:syn": 1}])
def test_the_loader_takes_the_fields_that_a_sample_has(shares, tmp_path):
    members = {}
    for number in range(40):
        key = f"{number:06d}"
        members |= sample(key, number) | {f"{key}.txt": f"original {key}".encode()}
        fields = ({"syn": f"syn {key}"}, {"syn": [f"syn {key}"]}, {})[number % 3]
        members[f"{key}.json"] = json.dumps(fields).encode()
    del members["000039.json"]
    write_tar(tmp_path / "0.tar", members)
    sources = index_shards(str(tmp_path))
    loader = Loader(
        Order(sources, 0), sources, [], [Letters()], seed=0, global_batch=40, captions=shares
    )
    (batch,) = loader.batches(0, 1)
    texts = [bytes(row.tolist()).rstrip(b"\0").decode() for row in batch.texts[0]]
    kinds = dict(zip(batch.keys, texts))
    for key, text in kinds.items():
        kind, of = text.split()
        assert of == key and (kind == "original" or (int(key) % 3 < 2 and key != "000039"))
    with_field = [text for key, text in kinds.items() if int(key) % 3 < 2 and key != "000039"]
    originals = sum(text.startswith("original") for text in with_field)
    assert 0 < originals < len(with_field) / 2 if "txt" in shares else originals == 0


def test_a_cached_view_has_its_caption_and_all_of_them_are_embedded(teacher, tmp_path):
    members = {}
    rng = np.random.default_rng(0)
    for number, pair in enumerate(pairs("train", 48, rng)):
        fields = json.loads(pair["json"]) | {"syn": f"a picture of scene {number}"}
        members[f"{number:06d}.png"], members[f"{number:06d}.txt"] = pair["png"], pair["txt"]
        members[f"{number:06d}.json"] = json.dumps(fields).encode()
    (tmp_path / "data").mkdir()
    write_tar(tmp_path / "data" / "0.tar", members)
    flags = [
        *("--train-data", str(tmp_path / "data"), "--model-config", *CONFIGS, "--epochs", "3"),
        *("--batch-size", "24", "--workers", "0", "--precision", "fp32", "--device", "cpu"),
        *("--model", "tiny-student", "--logs", str(tmp_path), "--log-every-n-steps", "1"),
        *("--views", "3", "--caption-keys", "txt=0.4", "json:syn=0.6"),
    ]
    cache = ["--teacher-cache", str(tmp_path / "cache")]
    assert write_cache([*flags, *cache, "--distill-model", teacher]) == 0
    (path,) = (tmp_path / "cache").glob("*.safetensors")
    texts = load_file(path)["text"].float()
    assert texts.shape[0] == 3
    distinct = [len({tuple(view.tolist()) for view in texts[:, row]}) for row in range(48)]
    assert distinct == [2] * 48, "of each sample's two captions one is embedded in no view"
    assert main([*flags, *cache, "--distill", "fd", "--name", "cached"]) == 0
    live = ["--distill", "fd", "--distill-model", teacher, "--name", "live"]
    assert main([*flags, *live]) == 0
    for a, b in zip(lines(tmp_path / "cached"), lines(tmp_path / "live"), strict=True):
        assert a["text_embedding_loss"] == pytest.approx(b["text_embedding_loss"], rel=2e-3)
    with pytest.raises(UsageError, match="its captions is"):
        main([*flags, *cache, "--caption-keys", "txt=1", "--distill", "fd", "--name", "other"])


@pytest.mark.parametrize("wrong", ["text=1", "json:=1", "txt=0", "txt=-1", "txt=often"])
def test_a_field_that_is_none_is_refused(wrong):
    with pytest.raises(UsageError, match=f"--caption-keys {wrong}: expected txt"):
        parse_args(["--train-data", "x", "--caption-keys", wrong, "json:syn=0.5"])
