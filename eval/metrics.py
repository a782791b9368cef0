"""Zero-shot metrics as clip_benchmark defines them, from similarities whose precision is fixed."""

import torch
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor

RECALL_AT = (1, 5, 10)


def similarities(queries: Tensor, gallery: Tensor) -> Tensor:
    """Dot products (Q, N) of rows (Q, D) and (N, D), rounded to float32.

    From float64: a float32 product depends on its place in the matrix, which would break ties
    between equal embeddings by chance.
    """
    return (queries.double() @ gallery.double().T).float()


def accuracies(logits: Tensor, labels: Tensor, ks: tuple[int, ...]) -> list[float]:
    """Top-k accuracies of logits (N, classes), for ascending k: how often the label is among k.

    Equal logits are in ``torch.topk``'s order for the largest k, as in clip_benchmark, whose own
    function breaks under numpy 2.4.
    """
    hits = logits.topk(ks[-1], dim=1).indices == labels[:, None]
    return [hits[:, :k].sum().item() / len(labels) for k in ks]


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Top-1, top-5 (None under five classes) and mean per-class recall of logits (N, classes)."""
    ks = (1, 5) if logits.shape[1] >= 5 else (1,)
    top1, *top5 = accuracies(logits, labels, ks)
    recall = float(balanced_accuracy_score(labels.cpu(), logits.argmax(dim=1).cpu()))
    return {"acc1": top1, "acc5": top5[0] if top5 else None, "mean_per_class_recall": recall}


def first_hits(
    queries: Tensor, gallery: Tensor, query_of: Tensor, gallery_of: Tensor, chunk: int = 256
) -> Tensor:
    """How many gallery items come before each query's first match, (Q,).

    A match is an item of the same image: ``query_of`` (Q,) and ``gallery_of`` (N,) are image
    numbers. Items are ordered by similarity, equal ones by their place in the gallery, so that a
    model that maps everything to one point gets the recall of chance.
    """
    place = torch.arange(len(gallery), device=gallery.device)
    hits = []
    for q, own in zip(queries.split(chunk), query_of.split(chunk)):
        scores = similarities(q, gallery)
        match = own[:, None] == gallery_of[None]
        best = scores.masked_fill(~match, -torch.inf).amax(dim=1, keepdim=True)
        at = torch.where(match & (scores == best), place, len(gallery)).amin(dim=1, keepdim=True)
        hits.append((scores > best).sum(dim=1) + ((scores == best) & (place < at)).sum(dim=1))
    return torch.cat(hits)


def retrieval_metrics(images: Tensor, texts: Tensor, image_of: Tensor) -> dict[str, float]:
    """Recall at 1, 5, 10 both ways, of embeddings (N, D), (M, D) and each text's image (M,).

    As in the CLIP literature a query is a hit when any of its matches is among the first k.
    """
    own = torch.arange(len(images), device=images.device)
    ways = {
        "image_retrieval": first_hits(texts, images, image_of, own),
        "text_retrieval": first_hits(images, texts, own, image_of),
    }
    return {
        f"{way}_recall@{k}": (hits < k).double().mean().item()
        for k in RECALL_AT
        for way, hits in ways.items()
    }
