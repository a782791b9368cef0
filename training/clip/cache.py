"""The teacher cache: a frozen teacher's embeddings, computed once for V views of every sample.

A cache is a folder: ``config.json`` says whose embeddings these are and of which views; each shard
has ``NAME.safetensors`` with ``image`` (V, samples, T) and ``text`` (V or 1, samples, T), float16
or coded (`training.clip.coded`), where views are stored ``NAME.viewN.tar``
(`training.data.stored`), and ``NAME.json`` with the files' hashes, written last. NAME holds the
shard's own digest, so a cache serves any data set made of shards it has, in any order. A sample
that could not be used is all NaN, and in no tar.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from cifd_clip.files import BadFile, file_hash, read_json, write_json, write_tensors
from cifd_clip.losses import Features
from training.clip.config import CACHE_FORMAT, TeacherName, read_cache_config
from training.data.decode import BadSample
from training.data.index import Sources
from training.data.loader import Batch, Fetcher
from training.data.shard import Shard, index_shard
from training.data.stored import StoredViews, libraries
from training.errors import Failure, UsageError

if TYPE_CHECKING:
    from training.clip.coded import CodedRows

MODALITIES = ("image", "text")
HELD_OUT = "-held-out"  # ends the name of a held-out shard
#: How far float16 may move the square of a unit vector's norm.
NORM_TOLERANCE = 0.01


def shard_name(shard: Shard, held_out: bool = False) -> str:
    """A shard's name in a cache: its file's stem and the digest of its content's layout.

    Of a held-out shard the images are not augmented, so it may be there beside a training shard.
    """
    return f"{Path(shard.path).stem}-{shard.digest[:16]}{HELD_OUT if held_out else ''}"


def view_path(directory: Path, shard: Shard, view: int) -> Path:
    """The tar of a shard's stored view."""
    return directory / f"{shard_name(shard)}.view{view}.tar"


def check_config(directory: Path, wanted: dict[str, Any]) -> None:
    """Refuse a cache of another teacher, transform, seed or number of views.

    Args:
        directory: the cache.
        wanted: entries its ``config.json`` must agree with; of ``views``, at least as many.
    """
    config = read_cache_config(directory)
    for name, value in wanted.items():
        fits = config[name] >= value if name == "views" else config.get(name) == value
        if not fits:
            raise UsageError(
                f"--teacher-cache '{directory}' is stale: its {name} is {config.get(name)!r}, this "
                f"run needs {value!r}; write another with `python -m training.cache_teacher`"
            )


def begin_cache(directory: Path, description: dict[str, Any], pretrained: str | None) -> None:
    """Write a cache's ``config.json``, or refuse a folder that holds another cache.

    Args:
        directory: the cache.
        description: all that a run compares.
        pretrained: what the weights were called, for who reads the cache with a name.
    """
    path, description = directory / "config.json", json.loads(json.dumps(description))
    if not path.is_file():
        write_json(path, {**description, "pretrained": pretrained}, CACHE_FORMAT)
        return
    check_config(directory, description)
    if read_cache_config(directory)["views"] != description["views"]:
        raise UsageError(
            f"--teacher-cache '{directory}' holds another number of views than --views "
            f"{description['views']}"
        )


def is_complete(directory: Path, name: str) -> bool:
    """Whether a shard's files are all there, whole."""
    manifest = directory / f"{name}.json"
    if not manifest.is_file():
        return False
    files = read_json(manifest, CACHE_FORMAT, files=dict)["files"]
    return all(
        (directory / file).is_file() and (directory / file).stat().st_size == entry["bytes"]
        for file, entry in files.items()
    )


def write_shard(
    directory: Path,
    name: str,
    embeddings: dict[str, Tensor],
    views: Sequence[Shard] = (),
    not_finite: Sequence[str] = (),
) -> None:
    """Write one shard's embeddings; its manifest appears last.

    Args:
        directory: the cache.
        name: of the shard, see `shard_name`.
        embeddings: ``image`` (V, samples, T), ``text`` (V or 1, samples, T).
        views: the stored ones, if they are.
        not_finite: keys of samples of which the teacher made no finite features.
    """
    path = directory / f"{name}.safetensors"
    write_tensors(path, embeddings)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)}}
    files |= {Path(v.path).name: {"bytes": v.bytes, "sha256": v.content} for v in views}
    content = {"not_finite": list(not_finite), "files": files, "libraries": libraries()}
    write_json(directory / f"{name}.json", content, CACHE_FORMAT)


def verify_shard(directory: Path, name: str, anew: bool = False) -> None:
    """Compare a shard's files with its manifest, unless they are as they were last time.

    Args:
        directory, name: of the shard.
        anew: compare them in any case.

    Raises:
        Failure: a file is damaged.
    """
    files = read_json(directory / f"{name}.json", CACHE_FORMAT, files=dict)["files"]
    stats = {file: (directory / file).stat() for file in files}
    stamp = {f: [stat.st_size, stat.st_mtime_ns, files[f]["sha256"]] for f, stat in stats.items()}
    stamp_file = directory / f"{name}.verified.json"
    with contextlib.suppress(BadFile):
        if not anew and read_json(stamp_file) == stamp:
            return
    for file, entry in files.items():
        if file_hash(directory / file) != entry["sha256"]:
            raise Failure(
                f"{directory / file} is damaged: run `python -m training.cache_teacher` again, "
                "which replaces it"
            )
    with contextlib.suppress(OSError):  # a cache may be read-only
        write_json(stamp_file, stamp)


def are_unit(rows: np.ndarray) -> np.ndarray:
    """Which rows (..., T) are unit vectors; those with a NaN are none."""
    rows = rows.astype(np.float32)
    return abs((rows * rows).sum(axis=-1) - 1) < NORM_TOLERANCE


def read_embeddings(path: Path) -> "dict[str, np.ndarray | CodedRows]":
    """A shard's embeddings, whose values are read from the file when they are looked at."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if len(tensors) > len(MODALITIES):
        from training.clip.coded import coded_rows

        return coded_rows(path.parent, tensors)
    return {modality: tensors[modality].numpy() for modality in MODALITIES}


def missing(rows: "np.ndarray | CodedRows", view: int, place: int) -> str | None:
    """What is wrong with a stored row, if something is."""
    if not isinstance(rows, np.ndarray):
        return None if rows.counts[view, place] else "nothing stored"
    if are_unit(rows[view, place]):
        return None
    return "nothing stored" if np.isnan(rows[view, place]).all() else "no unit vector"


@dataclass
class CacheFetcher(Fetcher):
    """Reads the embeddings of rows and views; one per teacher.

    Args:
        directory: the cache.
        sources: the data set whose rows are asked for.
        space: index of the teacher.
        held_out: whether these are held-out data.
    """

    directory: Path
    sources: Sources
    space: int
    held_out: bool = False
    names: list[str] = field(init=False)

    def __post_init__(self):
        shards = self.sources.shards
        self.names = [shard_name(shard, self.held_out) for shard in shards]
        missing = [
            shard.path
            for shard, name in zip(shards, self.names)
            if not is_complete(self.directory, name)
        ]
        if missing:
            flag = "--val-data" if self.held_out else "--train-data"
            raise UsageError(
                f"--teacher-cache '{self.directory}' lacks {len(missing)} of {len(shards)} shards "
                f"of {flag} (the first: {missing[0]}); run `python -m training.cache_teacher` with "
                "it, to its end"
            )

    def check(self, row: int, view: int) -> None:
        shard, place = self.sources.place(row)
        _verified(self.directory, self.names[shard])
        for modality in MODALITIES:
            array = self._array(shard, modality)
            if what := missing(array, view % len(array), place):
                raise BadSample(f"teacher cache: {what}")

    def __call__(self, rows: Tensor, views: Tensor) -> dict[str, Tensor]:
        rows, views = rows.numpy(), views.numpy()
        shards = np.searchsorted(self.sources.first_row, rows, side="right") - 1
        places = rows - self.sources.first_row[shards]
        embeddings = {}
        for modality in MODALITIES:
            width = self._array(int(shards[0]), modality).shape[-1]
            out = np.empty((len(rows), width), np.float16)
            for shard in np.unique(shards):
                mine = shards == shard
                array = self._array(int(shard), modality)
                out[mine] = array[views[mine] % len(array), places[mine]]
            embeddings[f"teacher{self.space}/{modality}"] = torch.from_numpy(out)
        return embeddings

    def _array(self, shard: int, modality: str) -> "np.ndarray | CodedRows":
        return _mapped(self.directory / f"{self.names[shard]}.safetensors")[modality]


# once in each process
_verified, _mapped = cache(verify_shard), lru_cache(maxsize=512)(read_embeddings)


class CachedTeachers:
    """Stands where the live teachers would, without any teacher in memory.

    Args:
        directories: one cache per teacher.
        names: the architecture and weights of each teacher that the command line names, if it does.
        wanted: this run's view_seed, views, captions, aug_cfg and image_backend, which the caches
            must match.
    """

    def __init__(self, directories: list[Path], names: list[TeacherName], wanted: dict[str, Any]):
        if names and len(names) != len(directories):
            raise UsageError(
                f"--teacher-cache names {len(directories)} caches for {len(names)} teachers"
            )
        self.directories = directories
        self.configs = [read_cache_config(d) for d in directories]
        for directory, config, (name, weights) in zip(directories, self.configs, names):
            if config["teacher"]["model"] != name:
                raise UsageError(
                    f"--teacher-cache '{directory}' belongs to {config['teacher']['model']}, "
                    f"--distill-model names {name}"
                )
            written = config["pretrained"]  # a file may have moved since
            if written and weights and Path(written).name != Path(weights).name:
                raise UsageError(
                    f"--teacher-cache '{directory}' was written with the weights '{written}', "
                    f"--distill-pretrained names '{weights}': leave it out, or write another cache"
                )
        wanted = {**wanted, "stored_views": self.configs[0]["stored_views"]}
        for directory in directories:
            check_config(directory, wanted)

    @property
    def stored(self) -> bool:
        """Whether views are stored, in the first cache, and not drawn from the originals."""
        return self.configs[0]["stored_views"] is not None

    def images_of(self, sources: Sources) -> Sources:
        """Where a data set's samples are read from."""
        if not self.stored:
            return sources
        views = range(self.configs[0]["views"])
        shards = {
            n: [index_shard(str(view_path(self.directories[0], s, v))) for v in views]
            for n, s in enumerate(sources.shards)
        }
        return StoredViews(sources, shards)

    @property
    def dims(self) -> list[int]:
        """T of each teacher."""
        return [config["teacher"]["dim"] for config in self.configs]

    @property
    def identities(self) -> list[dict]:
        """Who they are, and what their embeddings are coded with."""
        coded = [{"code": config["code"]} if config.get("code") else {} for config in self.configs]
        return [config["teacher"] | code for config, code in zip(self.configs, coded)]

    def fetchers(self, sources: Sources, held_out: bool = False) -> list[CacheFetcher]:
        """What the loader needs to deliver the embeddings."""
        return [CacheFetcher(d, sources, i, held_out) for i, d in enumerate(self.directories)]

    def bad_samples(self) -> Counter[str]:
        """None: what is stored is looked at when it is read."""
        return Counter()

    def answers(self, batch: Batch) -> bool:
        """Whether their features of the batch are stored, as they are of training views."""
        return bool(batch.extras)

    def __call__(self, batch: Batch) -> list[Features]:
        """Every teacher's stored features of a batch."""
        return [self._features(batch, i, t) for i, t in enumerate(self.identities)]

    def _features(self, batch: Batch, space: int, identity: dict) -> Features:
        image, text = (
            F.normalize(batch.extras[f"teacher{space}/{m}"].float(), dim=-1) for m in MODALITIES
        )
        # new_full, not new_tensor, which would copy from the host and wait for it in every step
        scale = image.new_full((), identity["logit_scale"])
        bias = identity["logit_bias"]
        bias = None if bias is None else image.new_full((), bias)
        return Features(image, text, scale, bias, space, space)
