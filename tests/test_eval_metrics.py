"""Metrics: clip_benchmark's definitions, brute force in float64, and what happens to ties."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import zeroshot_retrieval

from eval import metrics
from stock import stock_classification


def embeddings(count, dim=24, seed=0):
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)))


def brute_recall(queries, gallery, query_of, gallery_of, k):
    """Sort everything in float64, equal scores by place, and look for a match among the first k."""
    hits = 0
    scores = np.asarray(queries, np.float64) @ np.asarray(gallery, np.float64).T
    for row, own in zip(np.round(scores, 7), query_of):
        order = sorted(range(len(gallery)), key=lambda i: (-row[i], i))
        hits += any(gallery_of[i] == own for i in order[:k])
    return hits / len(queries)


@pytest.fixture(scope="module")
def photos():
    """60 images with five captions each, near their image; some images and captions are equal."""
    images = embeddings(60)
    images[30:40] = images[20:30]
    image_of = torch.arange(60).repeat_interleave(5)
    texts = F.normalize(images[image_of] + 0.25 * torch.randn(300, 24, generator=gen(1)))
    texts[7::11] = texts[3]
    return images, texts, image_of


def gen(seed):
    return torch.Generator().manual_seed(seed)


def test_recall_is_that_of_brute_force_with_five_captions_an_image_and_with_ties(photos):
    images, texts, image_of = photos
    found = metrics.retrieval_metrics(images, texts, image_of)
    own = range(60)
    for k in (1, 5, 10):
        image = brute_recall(texts, images, image_of.tolist(), own, k)
        text = brute_recall(images, texts, own, image_of.tolist(), k)
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(image, abs=1e-12)
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(text, abs=1e-12)


def test_recall_without_ties_is_clip_benchmarks():
    images = embeddings(80)
    image_of = torch.arange(80).repeat_interleave(5)
    texts = F.normalize(images[image_of] + 0.3 * torch.randn(400, 24, generator=gen(2)))
    found = metrics.retrieval_metrics(images, texts, image_of)
    scores = texts @ images.T
    positive = image_of[:, None] == torch.arange(80)[None]
    for k in (1, 5, 10):
        for way, s, p in (("image", scores, positive), ("text", scores.T, positive.T)):
            stock = (zeroshot_retrieval.recall_at_k(s, p, k) > 0).float().mean().item()
            assert found[f"{way}_retrieval_recall@{k}"] == pytest.approx(stock, abs=1e-6)


def test_a_model_that_maps_everything_to_one_point_gets_the_recall_of_chance():
    image_of = torch.arange(50).repeat_interleave(5)
    found = metrics.retrieval_metrics(torch.ones(50, 8), torch.ones(250, 8), image_of)
    assert found["image_retrieval_recall@1"] == pytest.approx(1 / 50)
    assert found["text_retrieval_recall@10"] == pytest.approx(2 / 50)


def test_equal_embeddings_have_equal_similarities_wherever_they_stand():
    gallery = embeddings(1, dim=513).repeat(1037, 1)
    scores = metrics.similarities(embeddings(33, dim=513, seed=1), gallery)
    assert scores.dtype == torch.float32
    assert (scores == scores[:, :1]).all()


def test_bfloat16_embeddings_are_compared_in_float32():
    images, texts = embeddings(8).bfloat16(), embeddings(8, seed=1).bfloat16()
    expected = images.double() @ texts.double().T
    assert torch.equal(metrics.similarities(images, texts), expected.float())


@pytest.mark.parametrize("classes", [5, 12, 100])
@pytest.mark.parametrize("tied", [False, True])
def test_accuracies_are_clip_benchmarks(classes, tied):
    logits = torch.randn(300, classes, generator=gen(0))
    logits = logits.round() if tied else logits
    labels = torch.randint(0, classes, (300,), generator=gen(1))
    stock = stock_classification().accuracy(logits, labels, topk=(1, 3, 5))
    assert metrics.accuracies(logits, labels, (1, 3, 5)) == stock
    found = metrics.classification_metrics(logits, labels)
    assert [found["acc1"], found["acc5"]] == [stock[0], stock[2]]


def test_recall_is_the_mean_over_classes_however_frequent_they_are():
    labels = torch.tensor([0] * 9 + [1])
    logits = torch.eye(5)[torch.zeros(10, dtype=torch.long)]  # everything is class 0
    found = metrics.classification_metrics(logits, labels)
    assert (found["acc1"], found["mean_per_class_recall"]) == (0.9, 0.5)


def test_top5_of_fewer_than_five_classes_is_null_in_strict_json():
    found = metrics.classification_metrics(torch.eye(4), torch.arange(4))
    assert json.loads(json.dumps(found, allow_nan=False))["acc5"] is None
    assert found["acc1"] == 1.0
