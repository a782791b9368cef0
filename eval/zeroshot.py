"""Zero-shot classification and retrieval of one model on one data set."""

import base64
import io
from dataclasses import replace

import torch
from torch import Tensor

from eval import datacomp, datasets, metrics
from eval.datasets import Folder
from eval.embed import Classifiers, Forward, embed_images, embed_texts
from eval.models import Evaluated
from eval.result import Examples, Query, Retrieved
from training.engine.environment import origin, versions
from training.engine.result import UNPUBLISHED, WHOLE, Metrics, Provenance, Result

PACKAGES = ("torch", "open_clip_torch", "clip-benchmark", "timm", "transformers", "numpy", "Pillow")
EXAMPLES, NEAREST, SIDE = 9, 5, 96


def provenance(model: Evaluated, folder: Folder, forward: Forward) -> Provenance:
    """Of a result on a data set, before it is known what the data set holds."""
    return Provenance(
        **origin(),
        weights=model.weights,
        source=model.source,
        data={folder.split: folder.fingerprint},
        preprocessing=model.preprocessing,
        precision=forward.precision,
        device=forward.device.type,
        parameters=model.parameters,
        versions=versions(*PACKAGES),
    )


def evaluate(
    folder: Folder, classifiers: Classifiers, provenance: Provenance
) -> tuple[Result, Examples | None]:
    """The result of a model on a data set, and of retrieval some examples.

    Raises:
        Gap: an image can't be decoded, or embeddings are not finite.
    """
    model, forward, examples = classifiers.model, classifiers.forward, None
    if folder.task == "zeroshot_classification":
        classes = classifiers(folder.classnames, folder.templates)
        images = embed_images(model, folder, forward)
        values = classification(images, classes, folder)
        held = {"images": len(images), "classes": len(classes), "templates": len(folder.templates)}
    else:
        captions, image_of = captions_of(folder)
        image_of = image_of.to(forward.device)
        images = embed_images(model, folder, forward)
        texts = embed_texts(model, captions, forward)
        values = metrics.retrieval_metrics(images, texts, image_of)
        held = {"images": len(images), "captions": len(captions)}
        queries = _queries(folder, captions, images, texts, image_of.tolist())
        examples = Examples(model=model.name, queries=queries)
    result = Result(
        task=folder.task,
        dataset=folder.name,
        split=folder.split,
        model=model.name,
        pretrained=model.weights[:10],
        metrics=values,
        provenance=replace(provenance, held=held, protocol=protocol(folder, held)),
    )
    return result, examples


def classification(images: Tensor, classes: Tensor, folder: Folder) -> Metrics:
    """Metrics of unit embeddings (N, D) of a folder's images and (classes, D) of its classes."""
    logits = 100.0 * metrics.similarities(images, classes)
    labels = torch.tensor(folder.targets)
    own = datacomp.own_metrics(folder.name, logits.cpu(), labels, folder.groups)
    return metrics.classification_metrics(logits.cpu(), labels) | own


def captions_of(folder: Folder) -> tuple[list[str], Tensor]:
    """All captions, and the image of each: (M,) places in the folder."""
    image_of = torch.tensor([i for i, some in enumerate(folder.targets) for _ in some])
    return [caption for some in folder.targets for caption in some], image_of


def protocol(folder: Folder, held: dict[str, int]) -> str:
    """Whether a known set's test split is whole; where it is not, how it differs."""
    known = datasets.PROTOCOLS.get(folder.name)
    if known is None and folder.name in datacomp.TASKS:
        known = datasets.Protocol(datacomp.TASKS[folder.name])
    if known is None or folder.split != "test":
        return UNPUBLISHED
    counts = {kind: count for kind, count in vars(known).items() if count}
    wrong = [f"{held.get(k, 0)} {k} of {v}" for k, v in counts.items() if held.get(k) != v]
    return "; ".join(wrong) or WHOLE


def _queries(
    folder: Folder, captions: list[str], images: Tensor, texts: Tensor, image_of: list[int]
) -> tuple[Query, ...]:
    """A few captions, evenly spaced over the set, each with its image and those retrieved."""
    chosen = torch.linspace(0, len(captions) - 1, min(EXAMPLES, len(captions))).long().tolist()
    scores = metrics.similarities(texts[chosen], images)
    nearest = scores.sort(dim=1, descending=True, stable=True).indices[:, :NEAREST].tolist()
    return tuple(
        Query(
            caption=captions[text],
            image=_thumbnail(folder, image_of[text]),
            retrieved=tuple(
                Retrieved(image=_thumbnail(folder, i), hit=i == image_of[text]) for i in answers
            ),
        )
        for text, answers in zip(chosen, nearest)
    )


def _thumbnail(folder: Folder, index: int) -> str:
    image = datasets.picture(folder.samples[index])
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
