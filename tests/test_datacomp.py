"""DataComp's suite: which tasks, which metric of each, and what of it is missing."""

import io
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from demo import scenes
from eval import benchmark, datacomp, datasets
from eval.datasets import Gap
from shards import write_tar
from test_eval_benchmark import classification_set, model_folder, tiny_images

CLASSES = [f"kind {number}" for number in range(7)]


def test_the_suite_has_all_tasks_but_the_game():
    names = datasets.names(["datacomp"])
    assert len(names) == len(datacomp.TASKS) == 37
    assert set(datacomp.MAIN) | set(datacomp.WORST_GROUP) <= set(names)
    assert {"imagenet1k", "flickr30k", "wilds/fmow", "geode"} < set(names)


def grouped_set(root, name, count=24, groups=(3, 3, 0, 7)):
    """A data set with a group for each image, in DataComp's layout; its labels and groups."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, len(CLASSES), count).tolist()
    of = [groups[number % len(groups)] for number in range(count)]
    extra = {}
    for number, group in enumerate(of):
        buffer = io.BytesIO()
        np.save(buffer, np.array([group, 2015, labels[number]]))
        extra[f"{number:05}.npy"] = buffer.getvalue()
    folder = root / f"wds_{name.replace('/', '-')}_test"
    images = [picture for picture in different_images(count)]
    classification_set(folder, CLASSES, images, labels, extra)
    return labels, of


def different_images(count):
    artist = scenes.Artist("test", np.random.default_rng(0))
    for _ in range(count):
        buffer = io.BytesIO()
        artist.draw(artist.pair()).save(buffer, "WEBP", lossless=True)
        yield buffer.getvalue()


def logits_of(count):
    return torch.randn(count, len(CLASSES), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "k"), [("wilds/fmow", 1), ("geode", 1), ("dollar_street", 5)])
def test_the_worst_group_is_that_with_the_fewest_hits(name, k, tmp_path):
    labels, groups = grouped_set(tmp_path, name)
    folder = datasets.open_folder(tmp_path, name, "test")
    assert (folder.targets, folder.groups) == (labels, groups)
    logits = logits_of(len(labels))
    shares = []
    for group in set(groups):
        rows = [row for row, of in enumerate(groups) if of == group]
        hits = [labels[row] in logits[row].topk(k).indices for row in rows]
        shares.append(sum(hits) / len(hits))
    assert len(set(shares)) > 1, "groups that are alike show nothing"
    found = datacomp.own_metrics(name, logits, torch.tensor(labels), folder.groups)
    assert found == {datacomp.MAIN[name]: pytest.approx(min(shares))}


def test_iwildcam_is_scored_by_the_f1_of_the_species_that_are_there():
    labels, logits = torch.tensor([0, 0, 2, 2, 5]), logits_of(5)
    guesses = logits.argmax(1)
    each = []
    for species in (0, 2, 5):
        hits = int(((guesses == species) & (labels == species)).sum())
        each.append(2 * hits / int((guesses == species).sum() + (labels == species).sum()))
    found = datacomp.own_metrics("wilds/iwildcam", logits, labels, [])
    assert found == {"F1-macro_all": pytest.approx(sum(each) / 3)}
    stock = f1_score(labels, guesses, average="macro", labels=[0, 2, 5])
    assert found["F1-macro_all"] == pytest.approx(stock)


def test_a_group_that_is_missing_or_pickled_is_a_gap(tmp_path):
    grouped_set(tmp_path, "geode", 8)
    path = tmp_path / "wds_geode_test" / "test" / "0.tar"
    image = tiny_images(1)[0]
    write_tar(path, {"a.webp": image, "a.cls": b"0"})
    with pytest.raises(Gap, match=r"sample 'a' of '0.tar' needs a \.npy that tells its group"):
        datasets.open_folder(tmp_path, "geode", "test")
    buffer = io.BytesIO()
    np.save(buffer, np.array([print], dtype=object), allow_pickle=True)
    write_tar(path, {"a.webp": image, "a.cls": b"0", "a.npy": buffer.getvalue()})
    with pytest.raises(Gap, match="allow_pickle=False"):
        datasets.open_folder(tmp_path, "geode", "test")


def test_a_models_mean_is_over_the_tasks_that_are_there_and_the_others_are_named(tmp_path, capsys):
    root, out = tmp_path / "data", tmp_path / "out"
    grouped_set(root, "geode")
    classification_set(root / "cifar10", CLASSES, list(different_images(10)), [0] * 5 + [1] * 5)
    model = model_folder(tmp_path / "model")
    words = [str(model), "--data-root", str(root), "--datasets", "datacomp", "--out", str(out)]
    assert benchmark.main([*words, "--workers=0", "--device=cpu"]) == 1, "35 gaps"
    said = capsys.readouterr()
    results = {(one := json.loads(p.read_text()))["dataset"]: one for p in out.glob("*.json")}
    assert set(results) == {"geode", "cifar10"}
    scores = results["geode"]["metrics"]["acc_wg"], results["cifar10"]["metrics"]["acc1"]
    line = said.out.splitlines()[-1]
    assert f"DataComp: mean {sum(scores) / 2:.4f} of 2 of 38 tasks; missing: vtab/cal" in line
    assert "wilds/fmow" in line and line.endswith("winogavil") and " geode" not in line
    assert results["cifar10"]["provenance"]["protocol"] == "10 images of 10000"
