"""Teachers that run on every batch, and what models need of the loader."""

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from torch import Tensor

from cifd_clip import Teacher
from cifd_clip.losses import Features
from training.clip.config import modality_of
from training.clip.models import quiet
from training.data.index import Sources
from training.data.loader import Batch, Fetcher
from training.data.stored import libraries
from training.data.views import ImageSpec, View, eval_view, normalise, stored_view, train_view
from training.engine.environment import versions
from training.errors import UsageError

DRAWN_BY = ("torch", "torchvision", "open_clip_torch", "transformers", "ftfy")
NEWEST = 1000  # batches whose keys are kept, to name samples that can't be used


class Transforms:
    """The distinct image transforms and tokenizers that a run's models need.

    Models whose images differ only in mean and std share one uint8 image, unless the augmentation
    works on normalised images.

    Args:
        aug_cfg: ``--aug-cfg``.
        backend: ``--image-backend`` of the training views.

    Attributes:
        normalised: whether the training views are, and are floats.
        stored: whether training views are stored, and no more than resized.
    """

    def __init__(self, aug_cfg: dict | None = None, backend: str = "pil"):
        self.aug_cfg, self.backend = aug_cfg, backend
        self.stored = False
        try:
            view = train_view(ImageSpec(), aug_cfg, backend)
            self.normalised = bool(view.finish)
            view.example()
        except (TypeError, ValueError, RuntimeError) as error:
            shown = " ".join(f"{key}={value}" for key, value in aug_cfg.items())
            raise UsageError(f"--aug-cfg {shown}: OpenCLIP can't use it: {error}") from error
        self.specs: list[ImageSpec] = []
        self.tokenizers: list[Callable[[list[str]], Tensor]] = []
        self._tokenizer_keys: list[tuple] = []

    def add_images(self, spec: ImageSpec) -> int:
        """The place in ``Batch.images`` of a model's images."""
        known = [self._shared(s) for s in self.specs]
        if self._shared(spec) not in known:
            self.specs.append(spec)
            return len(known)
        return known.index(self._shared(spec))

    def _shared(self, spec: ImageSpec) -> ImageSpec:
        """What models that share an image agree in."""
        return spec if self.normalised else replace(spec, mean=(), std=())

    def add_texts(self, name: str, config: dict) -> int:
        """The place in ``Batch.texts`` of a model's tokens."""
        text = config.get("text_cfg", {})
        length, source = text.get("context_length"), text.get("hf_tokenizer_name", "")
        with quiet():
            if modality_of(name):
                tokenizer = HFTokenizer(source, context_length=length)
            else:
                tokenizer = open_clip.get_tokenizer(name, context_length=length)
        options = repr(sorted(text.get("tokenizer_kwargs", {}).items()))
        key = (type(tokenizer).__name__, tokenizer.context_length, source, options)
        if key not in self._tokenizer_keys:
            self._tokenizer_keys.append(key)
            self.tokenizers.append(tokenizer)
        return self._tokenizer_keys.index(key)

    def recipe(self) -> dict:
        """What the training views and tokens depend on, as JSON values."""
        return {
            "images": [repr(self._shared(spec)) for spec in self.specs],
            "texts": [list(key) for key in self._tokenizer_keys],
            "aug_cfg": self.aug_cfg,
            "image_backend": self.backend,
            "stored": self.stored,
            "libraries": libraries() | versions(*DRAWN_BY),
        }

    def train_views(self) -> list[View]:
        """The augmenting transforms, or those of stored views."""
        if self.stored:
            return [stored_view(spec) for spec in self.specs]
        return [train_view(spec, self.aug_cfg, self.backend) for spec in self.specs]

    def eval_views(self) -> list[View]:
        """The transforms without augmentation."""
        return [eval_view(spec) for spec in self.specs]


class LiveTeachers:
    """Teachers that run on the batch's own images and texts."""

    def __init__(self, teachers: list[Teacher], configs: list[dict], transforms: Transforms):
        self.teachers = teachers
        self.specs = [
            ImageSpec.of(t.preprocess) if "image" in t.modalities else None for t in teachers
        ]
        self.images = [spec and transforms.add_images(spec) for spec in self.specs]
        self.texts = [
            transforms.add_texts(t.name, c) if "text" in t.modalities else None
            for t, c in zip(teachers, configs)
        ]
        self._bad: Tensor | None = None  # how many samples, and which of the newest
        self._newest: deque[tuple[list[str], Tensor]] = deque(maxlen=NEWEST)

    @property
    def dims(self) -> list[int]:
        """T of each teacher."""
        return [t.dim for t in self.teachers]

    @property
    def identities(self) -> list[dict]:
        """Who they are."""
        return [t.identity for t in self.teachers]

    def fetchers(self, sources: Sources, held_out: bool = False) -> list[Fetcher]:
        """Nothing that the loader would have to deliver."""
        return []

    def answers(self, batch: Batch) -> bool:
        """Whether they know the batch: a cache knows training views alone."""
        return True

    def images_of(self, sources: Sources) -> Sources:
        """Where a data set's samples are read from: there."""
        return sources

    def features(self, batch: Batch) -> list[Features]:
        """Every teacher's features of a batch, whatever they are."""
        return [
            teacher(
                spec and normalise(batch.images[image], spec),
                None if text is None else batch.texts[text],
            )
            for teacher, spec, image, text in zip(
                self.teachers, self.specs, self.images, self.texts
            )
        ]

    def __call__(self, batch: Batch) -> list[Features]:
        """Every teacher's features of a batch.

        A sample of which some are not finite can't be used: the first good one's images, texts and
        features take its place, in the batch too.
        """
        every = self.features(batch)
        if not every:
            return every
        finite = [getattr(f, m).isfinite().all(dim=-1) for f in every for m in f.modalities]
        bad = ~torch.stack(finite).all(dim=0)
        self._bad = bad.sum() + (0 if self._bad is None else self._bad)
        self._newest.append((batch.keys, bad))
        rows = torch.arange(len(batch), device=bad.device)
        rows = torch.where(bad, (~bad).int().argmax(), rows)
        batch.images = [images[rows] for images in batch.images]
        batch.texts = [texts[rows] for texts in batch.texts]
        return [f.map(lambda x: x[rows]) for f in every]

    def bad_samples(self) -> Counter[str]:
        """Samples replaced since it was last called; reads the device."""
        count = 0 if self._bad is None else int(self._bad)
        if count:
            keys = [k for keys, bad in self._newest for k, b in zip(keys, bad.tolist()) if b]
            logging.warning("the teacher's features are not finite: %s", sorted(set(keys)))
        self._bad = None
        self._newest.clear()
        return Counter({"teacher: features not finite": count}) if count else Counter()
