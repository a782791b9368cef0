"""Held-out pairs are never trained on, and are measured by how they find each other."""

import json

import numpy as np
import pytest
import torch

from cifd_clip.losses import Features
from shards import sample, write_shards, write_tar
from training.clip.heldout import split
from training.clip.stages import retrieval
from training.data.index import index_shards
from training.data.order import Order
from training.errors import UsageError
from training.main import main


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return index_shards(write_shards(tmp_path_factory.mktemp("data"), [50, 50, 50]))


def keys(sources, rows):
    return {sources.record(row, view=0)[1]["key"] for row in rows}


def test_every_row_is_trained_on_or_held_out_and_a_larger_share_holds_a_smaller(sources):
    kept, held = split(sources, 0.3)
    assert sorted([*kept, *held]) == list(range(150)) and 25 < len(held) < 65
    assert keys(sources, split(sources, 0.1)[1]) < keys(sources, held)


def test_a_share_of_no_pair_is_refused(sources):
    with pytest.raises(UsageError, match="--val-fraction 1e-06 holds out none of 150 samples"):
        split(sources, 1e-6)


def test_a_pair_is_held_out_wherever_it_lies(sources, tmp_path):
    members = {}
    for number in reversed(range(150)):
        members |= sample(f"{number:06d}")
    write_tar(tmp_path / "all.tar", members)
    other = index_shards(str(tmp_path))
    assert keys(other, split(other, 0.3)[1]) == keys(sources, split(sources, 0.3)[1])


@pytest.mark.parametrize("replacement", [False, True])
def test_the_stream_has_the_rows_that_are_kept_and_no_other(sources, replacement):
    kept, held = split(sources, 0.3)
    order = Order(sources, 0, window=40, replacement=replacement, kept=kept)
    rows = order.rows(0, 3 * len(kept))[:, 0]
    assert not set(rows) & set(held)
    assert not {order.any_row("substitute", i) for i in range(300)} & set(held)
    if not replacement:
        assert sorted(rows[: len(kept)]) == kept.tolist()
    everything = Order(sources, 0, window=40, replacement=replacement, kept=np.arange(150))
    plain = Order(sources, 0, window=40, replacement=replacement)
    assert (everything.rows(0, 300) == plain.rows(0, 300)).all()


def test_recall_counts_pairs_of_one_caption_as_matches_and_ties_as_misses():
    one, two, three = torch.eye(3)
    captions = torch.tensor([[1], [2], [1], [3]])
    image = torch.stack([one, two, one, three])
    found = retrieval(Features(image, torch.stack([one, one, one, three]), one), captions)
    # caption 1 finds either of its images; caption 2's nearest images are those of caption 1
    assert found["image_retrieval_recall@1"].tolist() == [1, 0, 1, 1]
    assert found["image_retrieval_recall@5"].tolist() == [1, 1, 1, 1]
    # image two is as near to every caption
    assert found["text_retrieval_recall@1"].tolist() == [0, 0, 0, 1]
    nowhere = retrieval(Features(image[:1].expand(4, 3), image[:1].expand(4, 3), one), captions)
    assert not nowhere["text_retrieval_recall@1"].any(), "a model that knows nothing finds nothing"


def test_a_run_holds_out_a_share_and_says_how_pairs_are_found(flags, tmp_path):
    command = [*flags, "--logs", str(tmp_path), "--name", "run", "--val-fraction", "0.3"]
    assert main(command) == 0
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    (held_out,) = [line for line in lines if line["kind"] == "val"][-1:]
    assert 0 <= held_out["text_retrieval_recall@1"] <= held_out["text_retrieval_recall@10"] <= 1
    assert held_out["contrastive_loss"] > 0
    said = (tmp_path / "run" / "out.log").read_text()
    assert said.count("the first step took") == 1, "validation has no first step"


def test_pairs_that_are_trained_on_and_held_out_are_warned_of(flags, scenes, tmp_path, capsys):
    command = [*flags, "--logs", str(tmp_path), "--name", "run"]
    assert main([*command, "--val-data", str(scenes / "train")]) == 0
    assert "--val-data: 1 of 1 shards are in --train-data too" in capsys.readouterr().err
