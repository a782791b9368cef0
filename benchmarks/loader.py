"""Images per second on one core: this project's reader against OpenCLIP's own WebDataset loader.

    python -m benchmarks.loader [--data SHARDS] [--pairs 5] [--json results/loader.json]

Both read the same shards, decode every image, apply OpenCLIP's training transform at the same size
and tokenise the captions with the same tokenizer. Each measurement is one pass in a process of its
own, pinned to one core with the files in the page cache; the two loaders take turns, and the ratio
is taken within each pair. Ours hands out uint8 and normalises on the device, so it is measured
twice: as it is handed out, and with the normalisation done on the same core.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import record
from training.data.decode import Caps, decode_image
from training.data.index import index_shards
from training.data.loader import Loader
from training.data.order import Order
from training.data.views import ImageSpec, draw, normalise, train_view
from training.errors import UsageError, cli

FLICKR = "../shared/data/flickr8k/train"
FLICKR_SHARDS = FLICKR + "/{00000..00003}.tar"
SEED = 0
# by number of workers; with one, batches also travel between processes, as in a run
CONTENDERS = {0: ("ours", "open_clip"), 1: ("ours", "ours+normalise", "open_clip")}


def main(argv: list[str]) -> int:
    """Measure, print a table, save JSON."""
    args = _parser().parse_args(argv)
    try:
        import open_clip_train.data  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"OpenCLIP's own loader needs {error.name}: pip install 'cifd_clip[bench]'"
        ) from None
    if args.one:
        print(json.dumps(measure(**json.loads(args.one))))
        return 0
    result = {"seed": SEED, "size": args.size, "batch": args.batch, "data": {}}
    with tempfile.TemporaryDirectory() as folder:
        sets = {"generated 256-512 px": generate(Path(folder) / "generated", args.images)}
        data = args.data or (FLICKR_SHARDS if Path(FLICKR).is_dir() else None)
        if data:
            sets = {data if args.data else "Flickr8k": data} | sets
        for name, urls in sets.items():
            print(f"\n{name}")
            result["data"][name] = compare(urls, args, folder)
    record("loader", result, args.json)
    return 0


def compare(urls: str, args: argparse.Namespace, cache_dir: str) -> dict:
    """Paired measurements of one data set."""
    sources = index_shards(urls, cache_dir=cache_dir)
    check_equal_pixels(sources, args.size)
    result = {"fingerprint": sources.fingerprint(), "pairs": []}
    print(f"pixels equal; {sources.num_samples} images")
    job = {"urls": urls, "cache_dir": cache_dir, "size": args.size, "batch": args.batch}
    for shard in sources.shards:  # into the page cache
        Path(shard.path).read_bytes()
    for workers, contenders in CONTENDERS.items():
        rounds = []
        for pair in range(args.pairs):
            turn = contenders if pair % 2 else contenders[::-1]
            rounds.append({who: _run(job | {"who": who, "workers": workers}) for who in turn})
        result["pairs"].append({"workers": workers, "rounds": rounds})
        for who in contenders:
            speeds = [runs[who]["images_per_s"] for runs in rounds]
            ratios = [
                runs[who]["images_per_s"] / runs["open_clip"]["images_per_s"] for runs in rounds
            ]
            line = (
                f"{workers} worker(s)  {who:15s} {statistics.median(speeds):7.1f} images/s   "
                f"x {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )
            if workers == 0:
                read = statistics.median(runs[who]["bytes_per_image"] for runs in rounds)
                line += f"   {read / 1e3:6.1f} KB read per image"
            print(line, flush=True)
    return result


def measure(who: str, urls: str, cache_dir: str, size: int, batch: int, workers: int) -> dict:
    """One pass over the data on one core, in this process."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    from open_clip import get_tokenizer

    tokenizer = get_tokenizer("ViT-B-32")
    spec = ImageSpec(size=size)
    sources = index_shards(urls, cache_dir=cache_dir)
    if who == "open_clip":
        batches = _stock(sources, spec, tokenizer, batch, workers)
    else:
        loader = Loader(
            Order(sources, SEED),
            sources,
            [train_view(spec)],
            [tokenizer],
            seed=SEED,
            global_batch=batch,
            workers=workers,
        )
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
    return {
        "images_per_s": images / seconds,
        "images": images,
        "seconds": seconds,
        # a worker's reads are its own, so they are counted without workers
        "bytes_per_image": read / images if workers == 0 else None,
    }


def check_equal_pixels(sources, size: int, samples: int = 50) -> None:
    """Both pipelines turn the same bytes and the same draw into the same float images."""
    from open_clip.transform import image_transform
    from webdataset.autodecode import ImageHandler

    spec = ImageSpec(size=size)
    ours, decode = train_view(spec), ImageHandler("pilrgb")
    stock = image_transform(size, is_train=True, mean=spec.mean, std=spec.std)
    for row in range(0, sources.num_samples, max(1, sources.num_samples // samples)):
        shard, place = sources.locate(row)
        offset, length = shard.records[place]["image"]
        with open(shard.path, "rb") as file:
            file.seek(offset)
            data = file.read(length)
        mine = normalise(draw(ours, decode_image(data, Caps()), SEED, 0, b"%d" % row)[None], spec)
        theirs = draw(stock, decode("x.jpg", data), SEED, 0, b"%d" % row)
        assert torch.equal(mine[0], theirs), f"row {row}: pixels differ"


def generate(folder: Path, images: int, shards: int = 4) -> str:
    """Shards of photo-like JPEGs (noise of all scales), 256 to 512 px, quality 92."""
    folder.mkdir()
    per_shard = -(-images // shards)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * per_shard, (shard + 1) * per_shard):
                caption = f"a picture of clouds, number {number}, wide and soft and grey"
                for ext, data in (
                    ("jpg", _clouds(number)),
                    ("txt", caption.encode()),
                    ("json", json.dumps({"caption": caption}).encode()),
                ):
                    info = tarfile.TarInfo(f"{number:09d}.{ext}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(folder)


def _clouds(seed: int) -> bytes:
    rng = np.random.Generator(np.random.Philox(seed))
    width, height = (int(side) for side in rng.integers(256, 513, 2))
    total = np.zeros((height, width, 3), dtype=np.float32)
    for cells in (4, 8, 16, 32, 64, 128, 256):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((width, height))) / np.float32(cells**0.8)
    total = (total - total.mean()) / total.std() * 50 + 120
    buffer = io.BytesIO()
    Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def _stock(sources, spec: ImageSpec, tokenizer, batch: int, workers: int):
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    args = SimpleNamespace(
        train_data="::".join(shard.path for shard in sources.shards),
        train_num_samples=sources.num_samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=SEED,
        batch_size=batch,
        world_size=1,
        workers=workers,
    )
    preprocess = image_transform(spec.size, is_train=True, mean=spec.mean, std=spec.std)
    return get_wds_dataset(args, preprocess, True, floor=True, tokenizer=tokenizer).dataloader


def _run(job: dict) -> dict:
    command = [sys.executable, "-m", "benchmarks.loader", "--one", json.dumps(job)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def _bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__)
    parser.add_argument("--data", help=f"plain tars to read (default: {FLICKR_SHARDS}, if there)")
    parser.add_argument("--images", type=int, default=1024, help="images to generate")
    parser.add_argument("--size", type=int, default=224, help="pixels of a training image")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each")
    parser.add_argument("--json", type=Path, help="save the figures here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    cli(main)
