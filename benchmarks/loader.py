"""``python -m benchmarks.loader``: this project's reader against OpenCLIP's own, on one core.

Both read the same shards, decode every image, apply OpenCLIP's training transform at the same size
and tokenise the captions with the same tokenizer. Each measurement is one pass in a process of its
own, pinned to one core with the files in the page cache; the two loaders take turns, and the ratio
is taken within each pair. Ours hands out uint8 and normalises on the device, so it is measured
twice: as it is handed out, and with the normalisation done on the same core.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.fabricate import Pictures
from benchmarks.harness import command_line, ratios, record, spelled
from experiments.shards import write_shards
from experiments.study import output
from training.data.decode import Caps, decode_image
from training.data.index import index_shards
from training.data.loader import Loader
from training.data.order import Order
from training.data.views import ImageSpec, draw, normalise, train_view
from training.errors import UsageError, cli

FLICKR = Path("../shared/data/flickr8k/train")
# by number of workers; with one, batches also travel between processes, as in a run
CONTENDERS = {0: ("ours", "open_clip"), 1: ("ours", "ours+normalise", "open_clip")}


def main(argv: list[str]) -> None:
    """Measure and print."""
    parser = command_line("loader", __doc__, rounds=5)
    add = parser.add_argument
    add("--data", metavar="SHARDS", help=f"plain tars to read [those of {FLICKR}, if there]")
    add("--images", type=int, default=1024, help="images to generate")
    add("--size", type=int, default=224, help="pixels of a training image")
    add("--batch-size", type=int, default=64, help="of both")
    add("--one", help=argparse.SUPPRESS)  # a measurement: the arguments of `measure`
    args = parser.parse_args(argv)
    try:
        import open_clip_train.data  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"OpenCLIP's own loader needs {error.name}: pip install 'cifd_clip[bench]'"
        ) from None
    if args.one:
        print(json.dumps(measure(**json.loads(args.one))))
        return
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        sets = {"generated 256-512 px": generate(Path(folder) / "generated", args.images)}
        if args.data:
            sets = {args.data: args.data} | sets
        elif FLICKR.is_dir():
            sets = {"Flickr8k": f"{FLICKR}/{{00000..00003}}.tar"} | sets
        for name, urls in sets.items():
            print(f"\n{name}")
            result[name] = compare(urls, args, folder)
    record("loader", args, {"data": result})


def compare(urls: str, args: argparse.Namespace, cache_dir: str) -> dict[str, Any]:
    """Paired measurements of one data set."""
    sources = index_shards(urls, cache_dir=cache_dir)
    check_equal_pixels(sources, args.size, args.seed)
    print(f"pixels equal; {sources.num_samples} images")
    job = {"urls": urls, "cache_dir": cache_dir, "size": args.size, "batch": args.batch_size}
    for shard in sources.shards:  # into the page cache
        Path(shard.path).read_bytes()
    result = {"fingerprint": sources.fingerprint(), "passes": {}}
    for workers, contenders in CONTENDERS.items():
        passes: dict[str, list[dict]] = {who: [] for who in contenders}
        for turn in range(args.rounds):
            for who in contenders if turn % 2 else contenders[::-1]:
                one = job | {"who": who, "workers": workers, "seed": args.seed}
                done = output("benchmarks.loader", "--one", json.dumps(one))
                passes[who].append(json.loads(done.splitlines()[-1]))
        result["passes"][f"{workers} workers"] = passes
        seconds = {who: [one["seconds"] for one in own] for who, own in passes.items()}
        for who, own in passes.items():
            speed = own[0]["images"] / statistics.median(seconds[who])
            ratio = spelled(ratios(seconds, "open_clip", who))
            line = f"{workers} worker(s)  {who:15s} {speed:7.1f} images/s   x {ratio}"
            if workers == 0:
                read = statistics.median(one["bytes_per_image"] for one in own)
                line += f"   {read / 1e3:6.1f} KB read per image"
            print(line, flush=True)
    return result


def measure(
    who: str, urls: str, cache_dir: str, size: int, batch: int, workers: int, seed: int
) -> dict:
    """One pass over the data on one core, in this process."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    from open_clip import get_tokenizer

    tokenizer = get_tokenizer("ViT-B-32")
    spec = ImageSpec(size=size)
    sources = index_shards(urls, cache_dir=cache_dir)
    if who == "open_clip":
        batches = _stock(sources, spec, tokenizer, batch, workers, seed)
    else:
        loader = Loader(
            Order(sources, seed), sources, [train_view(spec)], [tokenizer],
            seed=seed, global_batch=batch, workers=workers,
        )  # fmt: skip
        batches = loader.batches(0, sources.num_samples // batch)
    before, start, images = _bytes_read(), time.perf_counter(), 0
    for item in batches:
        if who == "ours+normalise":
            normalise(item.images[0], spec)
        images += len(item[0] if who == "open_clip" else item)
    seconds = time.perf_counter() - start
    read = _bytes_read() - before
    if who != "open_clip":
        loader.close()
    # a worker's reads are its own: this figure is of no use with workers
    return {"images": images, "seconds": seconds, "bytes_per_image": read / images}


def check_equal_pixels(sources, size: int, seed: int, samples: int = 50) -> None:
    """Both pipelines turn the same bytes and the same draw into the same float images."""
    from open_clip.transform import image_transform
    from webdataset.autodecode import ImageHandler

    spec = ImageSpec(size=size)
    ours, decode = train_view(spec), ImageHandler("pilrgb")
    stock = image_transform(size, is_train=True, mean=spec.mean, std=spec.std)
    for row in range(0, sources.num_samples, max(1, sources.num_samples // samples)):
        shard, record = sources.record(row, view=0)
        offset, length = record["image"]
        with open(shard.path, "rb") as file:
            file.seek(offset)
            data = file.read(length)
        mine = normalise(draw(ours, decode_image(data, Caps()), seed, 0, b"%d" % row)[None], spec)
        theirs = draw(stock, decode("x.jpg", data), seed, 0, b"%d" % row)
        assert torch.equal(mine[0], theirs), f"row {row}: pixels differ"


def generate(folder: Path, images: int) -> str:
    """Four shards of photo-like JPEGs (noise of many scales), 256 to 512 px."""
    scales = (4, 8, 16, 32, 64, 128, 256)
    pictures = Pictures(images, 256, 512, scales=scales, power=0.8, contrast=50, quality=92)
    captions = (f"a picture of clouds, number {n}, wide and soft and grey" for n in range(images))
    samples = (
        {"jpg": image, "txt": text.encode(), "json": json.dumps({"caption": text}).encode()}
        for image, text in zip(pictures("JPEG"), captions)
    )
    write_shards(folder, samples, -(-images // 4), "{:09}", "{:05}")
    return str(folder)


def _stock(sources, spec: ImageSpec, tokenizer, batch: int, workers: int, seed: int):
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
    return get_wds_dataset(args, preprocess, True, floor=True, tokenizer=tokenizer).dataloader


def _bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


if __name__ == "__main__":
    cli(main)
