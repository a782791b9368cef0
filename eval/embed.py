"""Unit embeddings of images, captions and classes, in batches."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from eval.datasets import Folder, Gap, Images
from eval.models import Evaluated

DTYPES = {"fp32": None, "amp_bf16": torch.bfloat16, "amp": torch.float16}


@dataclass(frozen=True)
class Forward:
    """How models are run; similarities are float32 whatever the precision."""

    device: torch.device
    precision: str = "fp32"
    batch_size: int = 256
    workers: int = 0

    def autocast(self) -> AbstractContextManager:
        dtype = DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext()


@torch.no_grad()
def embed_images(model: Evaluated, folder: Folder, forward: Forward) -> Tensor:
    """Unit embeddings (N, D) of every image, in the folder's order."""
    images = Images(folder.samples, model.transform)
    loader = DataLoader(images, forward.batch_size, num_workers=forward.workers)
    with forward.autocast():
        batches = [
            model.encode_image(batch.to(forward.device)) for batch in progress(loader, folder.name)
        ]
    return finite(torch.cat(batches), "image", model)


@torch.no_grad()
def embed_texts(model: Evaluated, texts: list[str], forward: Forward) -> Tensor:
    """Unit embeddings (M, D) of captions."""
    size, device = forward.batch_size, forward.device
    with forward.autocast():
        batches = [
            model.encode_text(texts[start : start + size], device)
            for start in progress(range(0, len(texts), size), "captions")
        ]
    return finite(torch.cat(batches), "text", model)


class Classifiers:
    """Embeddings of classes, each made once: ImageNet's variants share most of theirs."""

    def __init__(self, model: Evaluated, forward: Forward, batch_size: int = 1024):
        self.model, self.forward, self.batch_size = model, forward, batch_size
        self.known: dict[tuple[str, tuple[str, ...]], Tensor] = {}

    @torch.no_grad()
    def __call__(self, classnames: list[str], templates: list[str]) -> Tensor:
        """The classifier (classes, D): the normalised mean over templates of unit embeddings."""
        templates = tuple(templates)
        missing = [c for c in dict.fromkeys(classnames) if (c, templates) not in self.known]
        step = max(1, self.batch_size // len(templates))
        with self.forward.autocast():
            for start in progress(range(0, len(missing), step), "classes"):
                names = missing[start : start + step]
                texts = [template.format(c=name) for name in names for template in templates]
                vectors = self.model.encode_text(texts, self.forward.device)
                vectors = finite(vectors, "text", self.model).view(len(names), len(templates), -1)
                mean = F.normalize(vectors.mean(dim=1), dim=-1)
                self.known.update({(c, templates): v for c, v in zip(names, mean)})
        return torch.stack([self.known[c, templates] for c in classnames])


def finite(embeddings: Tensor, kind: str, model: Evaluated) -> Tensor:
    """The embeddings (N, D), if all of them are finite: NaN compares with nothing.

    Raises:
        Gap: saying how many are not.
    """
    bad = int((~embeddings.isfinite()).any(dim=-1).sum())
    if bad:
        raise Gap(
            f"{bad} of {len(embeddings)} {kind} embeddings of {model.name} are not finite: its "
            "weights are, or --precision overflows"
        )
    return embeddings


def progress(items: Iterable, title: str) -> Iterable:
    """A progress bar on a terminal, nothing elsewhere."""
    return tqdm(items, desc=title, leave=False, disable=None)
