"""Zero-shot classification and retrieval of one model on one data set."""

import base64
import importlib.metadata
import io
from typing import Any

import torch
from torch import Tensor

from eval import datasets, metrics
from eval.datasets import Folder
from eval.embed import Classifiers, Forward, embed_images, embed_texts
from eval.models import Evaluated
from eval.result import Examples, Query, Retrieved
from training.engine.environment import origin
from training.engine.result import UNPUBLISHED, WHOLE, Metrics, Provenance, Result

PACKAGES = ("torch", "open_clip_torch", "clip-benchmark", "timm", "transformers", "numpy", "Pillow")
EXAMPLES, NEAREST, SIDE = 9, 5, 96


def evaluate(
    model: Evaluated, folder: Folder, classifiers: Classifiers
) -> tuple[Result, Examples | None]:
    """The result of a model on a data set, and of retrieval some examples.

    Raises:
        Gap: an image can't be decoded, or embeddings are not finite.
    """
    forward, examples = classifiers.forward, None
    if folder.task == "zeroshot_classification":
        values, held = classify(model, folder, classifiers)
    else:
        values, held, examples = retrieve(model, folder, forward)
    result = Result(
        task=folder.task,
        dataset=folder.name,
        split=folder.split,
        model=model.name,
        pretrained=model.weights[:10],
        metrics=values,
        provenance=Provenance(
            **origin(),
            weights=model.weights,
            source=model.source,
            data={folder.split: folder.fingerprint},
            held=held,
            protocol=protocol(folder, held),
            preprocessing=model.preprocessing,
            precision=forward.precision,
            device=forward.device.type,
            parameters=model.parameters,
            versions=versions(),
        ),
    )
    return result, examples


def classify(
    model: Evaluated, folder: Folder, classifiers: Classifiers
) -> tuple[Metrics, dict[str, int]]:
    """Metrics of classification, and what the data set holds."""
    classes = classifiers(folder.classnames, folder.templates)
    images = embed_images(model, folder, classifiers.forward)
    counts = {"classes": len(folder.classnames), "templates": len(folder.templates)}
    return classification(images, classes, folder), {"images": len(images), **counts}


def classification(images: Tensor, classes: Tensor, folder: Folder) -> Metrics:
    """Metrics of unit embeddings (N, D) of a folder's images and (classes, D) of its classes."""
    logits = 100.0 * metrics.similarities(images, classes)
    return metrics.classification_metrics(logits.cpu(), torch.tensor(folder.labels()))


def retrieve(
    model: Evaluated, folder: Folder, forward: Forward
) -> tuple[Metrics, dict[str, int], Examples]:
    """Metrics of retrieval both ways, what the data set holds, and examples."""
    captions, image_of = captions_of(folder)
    image_of = image_of.to(forward.device)
    images = embed_images(model, folder, forward)
    texts = embed_texts(model, captions, forward)
    held = {"images": len(images), "captions": len(captions)}
    values = metrics.retrieval_metrics(images, texts, image_of)
    return values, held, _examples(model.name, folder, captions, images, texts, image_of.tolist())


def captions_of(folder: Folder) -> tuple[list[str], Tensor]:
    """All captions, and the image of each: (M,) places in the folder."""
    by_image = folder.captions()
    image_of = torch.tensor([i for i, some in enumerate(by_image) for _ in some])
    return [caption for some in by_image for caption in some], image_of


def protocol(folder: Folder, held: dict[str, int]) -> str:
    """Whether a known set's test split is whole; where it is not, how it differs."""
    known = datasets.PROTOCOLS.get(folder.name)
    if known is None or folder.split != "test":
        return UNPUBLISHED
    wanted = {"images": known.images, "classes": known.classes, "captions": known.captions}
    wrong = [f"{held.get(k, 0)} {k} of {v}" for k, v in wanted.items() if v and held.get(k) != v]
    return "; ".join(wrong) or WHOLE


def versions(*more: str) -> dict[str, str]:
    """Versions of the packages that figures depend on."""
    return {name: importlib.metadata.version(name) for name in (*PACKAGES, *more)}


def identity(model: Evaluated, folder: Folder, precision: str) -> dict[str, Any]:
    """What a figure depends on: a result is repeated exactly when all of this is."""
    return {
        "model": model.name,
        "weights": model.weights,
        "preprocessing": model.preprocessing,
        "data": folder.fingerprint,
        "split": folder.split,
        "precision": precision,
    }


def _examples(
    model: str, folder: Folder, captions: list[str], images: Tensor, texts: Tensor, image_of: list
) -> Examples:
    """A few captions, evenly spaced over the set, each with its image and those retrieved."""
    chosen = torch.linspace(0, len(captions) - 1, min(EXAMPLES, len(captions))).long().tolist()
    scores = metrics.similarities(texts[chosen], images)
    nearest = scores.sort(dim=1, descending=True, stable=True).indices[:, :NEAREST].tolist()
    queries = []
    for caption, answers in zip(chosen, nearest):
        own = image_of[caption]
        retrieved = (Retrieved(image=_thumbnail(folder, i), hit=i == own) for i in answers)
        queries.append(
            Query(
                caption=captions[caption],
                image=_thumbnail(folder, own),
                retrieved=tuple(retrieved),
            )
        )
    return Examples(model=model, queries=tuple(queries))


def _thumbnail(folder: Folder, index: int) -> str:
    """A small PNG of an image, base64."""
    image = datasets.picture(folder.samples[index])
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
