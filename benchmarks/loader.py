"""``python -m benchmarks.loader``: this project's reader against OpenCLIP's and torchvision's.

All read the same shards, decode every image, draw OpenCLIP's training crop at the same size and
tokenise the captions with the same tokenizer: OpenCLIP's own loader; WebDataset with torchvision's
decoder and v2 transforms; and ours, by Pillow, by torch, and from stored views. With at most one
worker each measurement is one pass in a process of its own, pinned to one core with the files in
the page cache; the readers take turns, and ratios are taken within each turn. Ours and torchvision
hand out uint8 and leave the normalisation to the device. ``--workers 8 16`` asks what so many
processes deliver, unpinned.
"""

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import command_line, ratios, record, spelled
from experiments.shards import encoded, write_shards
from experiments.study import output
from training.data.index import Sources, index_shards
from training.data.loader import Loader, Reader, Recipe
from training.data.order import Order
from training.data.shard import index_shard
from training.data.stored import StoredViews, ViewWriter
from training.data.views import ImageSpec, stored_view, train_view
from training.errors import UsageError, cli

FLICKR = Path("../shared/data/flickr8k/train")
READERS = ("open_clip", "torchvision v2", "ours", "ours, torch", "ours, stored")


def main(argv: list[str]) -> None:
    """Measure and print."""
    parser = command_line("loader", __doc__, rounds=5)
    add = parser.add_argument
    add("--data", metavar="SHARDS", help=f"plain tars to read [those of {FLICKR}, if there]")
    add("--images", type=int, default=1024, help="to generate, of each size; 4,096 for 16 workers")
    add("--size", type=int, default=224, help="pixels of a training image")
    add("--batch-size", type=int, default=64, help="of all")
    add("--workers", type=int, nargs="+", default=[0, 1], help="processes of each reader")
    add("--readers", nargs="+", default=READERS, choices=READERS, metavar="NAME", help="which")
    add("--one", help=argparse.SUPPRESS)  # a measurement: the arguments of `measure`
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(**json.loads(args.one))))
        return
    if "open_clip" in args.readers and importlib.util.find_spec("pandas") is None:
        raise UsageError(
            "OpenCLIP's own loader needs pandas: pip install 'cifd_clip[bench]', or name other "
            "--readers"
        )
    result = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sets = {
            f"generated {low}-{high} px": generate(folder / str(low), args.images, low, high)
            for low, high in ((256, 512), (512, 512))
        }
        if args.data:
            sets = {args.data: args.data} | sets
        elif FLICKR.is_dir():
            sets = {"Flickr8k": f"{FLICKR}/{{00000..00003}}.tar"} | sets
        for number, (name, urls) in enumerate(sets.items()):
            print(f"\n{name}")
            result[name] = compare(urls, args, folder / f"views{number}")
    record("loader", args, {"data": result})


def compare(urls: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Paired measurements of one data set."""
    sources = index_shards(urls, cache_dir=folder)
    views = store(sources, args.size, args.seed, folder)
    job = {"urls": urls, "folder": str(folder), "size": args.size, "batch": args.batch_size}
    for shard in [*sources.shards, *views]:  # into the page cache
        Path(shard.path).read_bytes()
    result = {"fingerprint": sources.fingerprint(), "passes": {}}
    for workers in args.workers:
        passes: dict[str, list[dict]] = {who: [] for who in args.readers}
        for turn in range(args.rounds):
            for who in args.readers if turn % 2 else args.readers[::-1]:
                one = job | {"who": who, "workers": workers, "seed": args.seed}
                done = output("benchmarks.loader", "--one", json.dumps(one))
                passes[who].append(json.loads(done.splitlines()[-1]))
        result["passes"][f"{workers} workers"] = passes
        seconds = {
            who: [one["seconds"] / one["images"] for one in own] for who, own in passes.items()
        }
        for who, own in seconds.items():
            line = f"{workers} worker(s)  {who:15s} {1 / statistics.median(own):7.1f} /s"
            for other in {"open_clip", "torchvision v2"} & passes.keys() - {who}:
                line += f"   x {other} {spelled(ratios(seconds, other, who))}"
            print(line, flush=True)
    return result


def measure(
    who: str, urls: str, folder: str, size: int, batch: int, workers: int, seed: int
) -> dict[str, float]:
    """One pass over the data in this process, on one core where at most one worker reads."""
    if workers < 2:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    from open_clip import get_tokenizer

    sources = index_shards(urls, cache_dir=folder)
    inputs = (sources, ImageSpec(size=size), get_tokenizer("ViT-B-32"), batch, workers, seed)
    readers = {"open_clip": _open_clip, "torchvision v2": _torchvision}
    batches = readers[who](*inputs) if who in readers else _ours(who, folder, *inputs)
    for _ in range(2 * workers):
        next(batches)  # made while the workers started
    start, images = time.perf_counter(), 0
    for item in batches:
        images += len(item[0]) if who in readers else len(item)
    return {"images": images, "seconds": time.perf_counter() - start}


def _ours(who, folder, sources, spec, tokenizer, batch, workers, seed) -> Iterator:
    view = train_view(spec, backend="torch" if who == "ours, torch" else "pil")
    if who == "ours, stored":
        tars = [index_shard(str(_tar(folder, n))) for n in range(len(sources.shards))]
        sources = StoredViews(sources, {n: [tar] for n, tar in enumerate(tars)})
        view = stored_view(spec)
    loader = Loader(
        Order(sources, seed), sources, [view], [tokenizer],
        seed=seed, global_batch=batch, views=1, workers=workers,
    )  # fmt: skip
    return loader.batches(0, sources.num_samples // batch)  # its workers end with the process


def _open_clip(sources, spec, tokenizer, batch, workers, seed) -> Iterator:
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    args = SimpleNamespace(
        train_data="::".join(shard.path for shard in sources.shards),
        train_num_samples=sources.num_samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=seed,
        batch_size=batch,
        world_size=1,
        workers=workers,
    )
    preprocess = image_transform(spec.size, is_train=True, mean=spec.mean, std=spec.std)
    data = get_wds_dataset(args, preprocess, True, floor=True, tokenizer=tokenizer)
    return iter(data.dataloader)


def _torchvision(sources, spec, tokenizer, batch, workers, seed) -> Iterator:
    import webdataset
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import InterpolationMode, v2

    crop = v2.RandomResizedCrop(
        spec.size, scale=(0.9, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True
    )

    def sample(members: dict[str, bytes]):
        data = torch.frombuffer(bytearray(members["jpg"]), dtype=torch.uint8)
        return crop(decode_jpeg(data, ImageReadMode.RGB)), tokenizer([members["txt"].decode()])[0]

    urls = [shard.path for shard in sources.shards]
    data = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).map(sample)
    return iter(torch.utils.data.DataLoader(data, batch, num_workers=workers, drop_last=True))


def generate(folder: Path, images: int, low: int, high: int) -> str:
    """Four shards of photo-like JPEGs of ``low`` to ``high`` pixels, of which 256 differ."""
    generators = map(np.random.default_rng, range(min(images, 256)))
    photos = cycle([_photo(generator, low, high) for generator in generators])
    captions = [f"a picture of clouds, number {n}, wide and soft and grey" for n in range(images)]
    members = (
        {"jpg": image, "txt": text.encode(), "json": json.dumps({"caption": text}).encode()}
        for image, text in zip(photos, captions)
    )
    write_shards(folder, members, -(-images // 4), "{:09}", "{:05}")
    return str(folder)


def _photo(rng: np.random.Generator, low: int, high: int) -> bytes:
    """Noise of many scales."""
    width, height = (int(side) for side in rng.integers(low, high + 1, 2))
    total = np.zeros((height, width, 3), dtype=np.float32)
    for cells in (4, 8, 16, 32, 64, 128, 256):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((width, height))) / np.float32(cells**0.8)
    pixels = 120 + 50 * (total - total.mean()) / total.std()
    return encoded(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), "JPEG", quality=92)


def store(sources: Sources, size: int, seed: int, folder: Path) -> list:
    """One stored view of each sample."""
    recipe = Recipe([train_view(ImageSpec(size=size))], [], seed)
    jobs = [(n, 0, _tar(folder, n)) for n in range(len(sources.shards))]
    writer = ViewWriter(Reader(sources, recipe), jobs, quality=90)
    return [writer[n] for n in range(len(jobs))]


def _tar(folder: str | Path, shard: int) -> Path:
    return Path(folder) / f"{shard}.view0.tar"


if __name__ == "__main__":
    cli(main)
