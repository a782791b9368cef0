"""Shards in MobileCLIP's layout, written as stored views and caches (`training.reinforced`)."""

import os
from argparse import Namespace
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from training.clip.cache import (
    MODALITIES,
    are_unit,
    begin_cache,
    is_complete,
    shard_name,
    view_path,
    write_shard,
)
from training.data.decode import BadSample, Caps, choose_caption, decode_image
from training.data.index import index_shards
from training.data.pixels import tensor
from training.data.reinforced import NEEDED, SIZE, reapplied, reinforcements
from training.data.shard import Shard, index_shard, split_name
from training.data.stored import SUBSAMPLING, encoded, view_tar
from training.data.tar import BadTar, members, open_regular
from training.data.workers import data_loader, end, iterate
from training.errors import UsageError

#: The teachers in the order of their embeddings, each of this width and with this temperature.
TEACHERS = (("ViT-L-14", "openai"), ("ViT-L-14", "datacomp_xl_s13b_b90k"))
WIDTH, LOGIT_SCALE = 768, 100.0
SEED, QUALITY = 0, 90  # of the choice of captions, and of JPEGs


@dataclass
class Converter(Dataset):
    """Number of a shard -> it is written; how many of its samples are left out, by reason.

    Attributes:
        shards: to write.
        folders: of the caches.
        views, synthetic: see `training.reinforced.parse`.
    """

    shards: list[Shard]
    folders: list[Path]
    views: int
    synthetic: float

    def __getitem__(self, number: int) -> Counter[str]:
        shard = self.shards[number]
        paths = [view_path(self.folders[0], shard, view) for view in range(self.views)]
        shape = (len(MODALITIES), self.views, shard.samples, len(self.folders) * WIDTH)
        embeddings, skipped, spans = np.full(shape, np.nan, np.float16), Counter(), beside(shard)
        with ExitStack() as stack:
            tars = [stack.enter_context(view_tar(path)) for path in paths]
            for row, record in enumerate(shard.records):
                key = record["key"]
                try:
                    views, embeddings[:, :, row] = self._sample(shard, record, spans.get(key, {}))
                except BadSample as reason:
                    skipped[str(reason)] += 1
                    continue
                except ValueError as error:
                    name = key.decode("utf-8", "replace")
                    raise UsageError(f"{shard.path}: KEY {name}: {error}") from error
                name = key.decode("utf-8", "surrogateescape")
                for add, (jpeg, caption) in zip(tars, views):
                    add({f"{name}.jpg": jpeg, f"{name}.txt": caption.encode()})
            if skipped.total() == shard.samples:
                raise UsageError(f"{shard.path}: no sample can be used: {dict(skipped)}")
        stored = [index_shard(str(path), check=True) for path in paths]
        for folder, part in zip(self.folders, np.split(embeddings, len(self.folders), axis=-1)):
            own = {m: torch.from_numpy(rows.copy()) for m, rows in zip(MODALITIES, part)}
            write_shard(folder, shard_name(shard), own, stored if folder == self.folders[0] else ())
        return skipped

    def _sample(
        self, shard: Shard, record: np.void, spans: dict[str, tuple[int, int]]
    ) -> tuple[list[tuple[bytes, str]], np.ndarray]:
        """Each view's JPEG and caption, and (2, V, T) embeddings of both by all teachers."""
        if "npz" not in spans and "pth.gz" in spans:
            raise ValueError("its embeddings are pickled (pth.gz) and not read: take a set of npz")
        if lacking := [kind for kind in NEEDED if kind not in spans]:
            raise BadSample(f"no KEY.{lacking[0]}")
        own = {"image": record["image"].tolist(), "txt": record["text"].tolist()}
        wanted = own | {kind: spans[kind] for kind in NEEDED}
        if max(size for _, size in wanted.values()) > Caps.max_bytes:
            raise BadSample("sample: too many bytes")
        read = {kind: shard.read(*span) for kind, span in wanted.items()}
        augmentations, captions, images, texts = reinforcements(read, len(self.folders) * WIDTH)
        if len(augmentations) < self.views:
            raise ValueError(f"it has {len(augmentations)} augmentations for --views {self.views}")
        # A caption for each view, and the embeddings of both.
        views, weights = range(self.views), {"txt": 1 - self.synthetic, "syn": self.synthetic}
        fields = {"txt": captions[:1], "syn": [*filter(None, captions[1:])] or captions[:1]}
        chosen = [choose_caption(fields, weights, SEED, view, record["key"]) for view in views]
        rows = [captions.index(caption) for caption in chosen]
        embeddings = np.stack([images[: self.views], texts[rows]])
        if not are_unit(embeddings.reshape(-1, WIDTH)).all():
            raise ValueError("KEY.npz: the teachers' parts of its rows are no unit vectors")
        # The views.
        image = decode_image(read["image"], Caps())
        augmented = [tensor(reapplied(image, augmentations[view])) for view in views]
        return [(encoded(a, QUALITY), text) for a, text in zip(augmented, chosen)], embeddings


def beside(shard: Shard) -> dict[bytes, dict[str, tuple[int, int]]]:
    """(offset, size) of what a shard's index leaves out, by key and extension."""
    spans: dict[bytes, dict[str, tuple[int, int]]] = {}
    with open_regular(shard.path) as file, suppress(BadTar):  # what comes before is good
        for member in members(partial(os.pread, file.fileno()), shard.bytes):
            part = split_name(member.name)
            if part and part[1] is None:
                extension = member.name[len(part[0]) + 1 :].decode("latin-1").lower()
                spans.setdefault(part[0], {})[extension] = (member.offset, member.size)
    return spans


def begin(args: Namespace) -> list[Path]:
    """The folders of the caches, with their configurations."""
    folders = [Path(folder) for folder in args.teacher_cache.split(",")]
    if len(folders) != len(TEACHERS):
        raise UsageError(
            f"--teacher-cache names {len(folders)} folders, expected one for each of the "
            f"{len(TEACHERS)} teachers: {', '.join(map(':'.join, TEACHERS))}"
        )
    description = {
        "view_seed": SEED,
        "views": args.views,
        "captions": "first",
        "aug_cfg": {},
        "image_backend": "pil",
        "stored_views": {"size": SIZE, "quality": QUALITY, "subsampling": SUBSAMPLING},
        "synthetic": args.synthetic,
    }
    for folder, (name, weights) in zip(folders, TEACHERS):
        # Known by its name: there are no weights to hash.
        teacher = {"model": name, "weights": f"{name}:{weights}", "dim": WIDTH}
        teacher |= {"logit_scale": LOGIT_SCALE, "logit_bias": None}
        begin_cache(folder, {"teacher": teacher, **description}, weights)
    return folders


def convert(args: Namespace) -> int:
    """Write what is not there yet; see `training.reinforced.parse` for the flags."""
    shards = index_shards(args.train_data).shards
    folders = begin(args)
    left = [s for s in shards if not all(is_complete(f, shard_name(s)) for f in folders)]
    converter = Converter(left, folders, args.views, args.synthetic)
    loader = data_loader(converter, range(len(left)), args.workers, None, False, 2, False)
    written, skipped = iterate(loader), Counter()
    try:
        for reasons in tqdm(written, total=len(left), unit="shard", disable=None):
            skipped.update(reasons)
    finally:
        end(written)
    for reason, count in skipped.items():
        print(f"{count} samples left out: {reason}")
    print(f"{args.teacher_cache}: {len(left)} shards written, {len(shards)} are there")
    return 0
