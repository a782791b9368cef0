"""``python -m training.calibrate``: choose the rates R by what their RDMs keep of the teacher.

One bank with a sweep of rates is trained in one pass on a teacher cache. Its RDMs are then asked
held-out training pairs: the caption of an image among N. A rate's share is its accuracy over the
teacher's own; the rate of a wanted share is read off the monotone curve through the sweep, between
its points on a logarithmic scale. What is held out are rows of the cache: no test split is looked
at, no label is needed.

Takes the flags of `training.main` (a recipe serves both); written: FILE.json with the curve and how
it was made, and FILE.args for ``training.main @FILE.args``. Asked again for other shares, it reads
the curve from FILE.json.
"""

import json
import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.isotonic import isotonic_regression
from torch import Tensor
from tqdm import tqdm

from cifd_clip import Noise, RDMBank, RDMTask
from cifd_clip.noise import derive_seed
from training.clip.cache import MODALITIES, file_hash, read_config, shard_name
from training.clip.flags import _defaults, parser
from training.clip.stages import bank_widths
from training.data.index import index_shards
from training.engine.control import start_processes
from training.engine.optim import make_optimizer, make_schedule
from training.engine.run import environment
from training.errors import NonFinite, UsageError

#: Flags that the curve depends on, beside the cache.
SETTINGS = (
    "sweep", "seed", "steps", "batch_size", "lr", "wd", "density_lr", "beta1", "beta2", "eps",
    "warmup", "lr_scheduler", "epochs_cooldown", "lr_cooldown_end", "lr_cooldown_power",
    "rdm_hidden", "rdm_channels", "among", "held_out", "samples",
)  # fmt: skip
EXACT = "donot_use_mm_for_euclid_dist"
SWEEP = [10.0, 22.0, 46.0, 100.0, 220.0, 460.0, 1000.0, 2200.0, 4600.0, 10000.0]


class Pairs(NamedTuple):
    """Cached unit embeddings of N samples in V views, float16."""

    image: Tensor
    """(V, N, T)"""
    text: Tensor
    """(V or 1, N, T)"""

    def rows(self, rows: Tensor, view: int = 0) -> tuple[Tensor, Tensor]:
        """Float32 unit embeddings (B, T) of images and texts of rows (B,) at one view."""
        pick = rows.to(self.image.device)
        return tuple(F.normalize(x[view % len(x), pick].float(), dim=-1) for x in self)


class Point(NamedTuple):
    """What the RDMs of one rate keep."""

    rate: float
    accuracy: float
    """Top-1 of held-out captions among N, both embeddings reconstructed."""
    bits: dict[str, float]
    distortion: dict[str, float]


def main(argv: list[str]) -> int:
    """Train the sweep, read the rates off its curve, and write them."""
    args = _parse(argv)
    world, device = start_processes(args)
    if world.size > 1:
        raise UsageError(f"calibration is one process's work, got {world.size}: start it plainly")
    directory, out = Path(args.teacher_cache), Path(args.out)
    config = read_config(directory)
    shards = find_shards(directory, args.train_data, args.index_dir)
    made = how(args, config, shards)
    found = read(out, made)
    if found is None:
        among, own, curve = sweep(args, shards, config["teacher"], device)
        found = {"made": made, "among": among, "teacher_accuracy": own, "curve": curve}
        found["environment"] = environment()
        write(out, found)  # a share that can't be reached must not lose it
    own, among, curve = found["teacher_accuracy"], found["among"], found["curve"]
    check_teacher(directory, own, among)  # older commands wrote a curve before they asked
    print(f"image → text top-1 among {among} held-out pairs: the teacher {100 * own:.1f} %")
    for point in curve:
        bits = ", ".join(f"{v:.0f} bits per {m}" for m, v in point["bits"].items())
        kept = f"{100 * point['accuracy']:5.1f} %, share {point['share']:.3f}, {bits}"
        print(f"  R = {point['rate']:<8g} {kept}")
    rates = rates_for(args.shares, *([point[k] for point in curve] for k in ("rate", "share")))
    write(out, {"shares": args.shares, "rates": rates, **found})
    flags = f"--rates {' '.join(f'{rate:g}' for rate in rates)}"
    out.with_suffix(".args").write_text(f"# training.calibrate, see {out.name}\n{flags}\n")
    print(f"{out}, {out.with_suffix('.args')}")
    print(f"keeping {' '.join(f'{k:g}' for k in args.shares)}: {flags}")
    return 0


def how(args: Namespace, config: dict, shards: list[str]) -> dict:
    """All that a curve hangs on, as JSON values."""
    directory = Path(args.teacher_cache)
    return {
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "cache": {
            **config,
            "shards": {name: file_hash(directory / f"{name}.json")[:16] for name in shards},
        },
    }


def read(out: Path, made: dict) -> dict | None:
    """What an earlier command has measured in the same way and left in ``out``, without its rates.

    None if there is no such file, or it is of other data or settings.
    """
    if not out.is_file():
        return None
    content = json.loads(out.read_text())
    if content.get("made") != made:
        return None
    print(f"{out} holds the curve of this cache and these settings: read", flush=True)
    return {name: value for name, value in content.items() if name not in ("shares", "rates")}


def write(out: Path, content: dict) -> None:
    """The JSON, whole or not at all; a flag file of earlier rates goes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".args").unlink(missing_ok=True)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.rename(out)


def sweep(
    args: Namespace, shards: list[str], teacher: dict, device: torch.device
) -> tuple[int, float, list[dict]]:
    """Train the sweep and measure it.

    Returns:
        How many captions an image chose from, the teacher's accuracy, and the points of the curve
        with their shares of it.

    Raises:
        UsageError: the teacher's accuracy is nearly none, which is known before any training.
    """
    directory = Path(args.teacher_cache)
    pairs = read_pairs(directory, shards, args.samples, args.seed)
    training, held_out = split(pairs.image.shape[1], args.held_out, args.among, args.seed)
    among = min(args.among, len(held_out))
    print(
        f"{directory}: {len(training):,} pairs to train on, {len(held_out):,} held out, "
        f"{len(args.sweep)} rates in {args.steps} steps of {args.batch_size}",
        flush=True,
    )
    pairs = Pairs(*(x.to(device) for x in pairs))
    asked = pairs.rows(held_out)
    own = teacher_accuracy(*asked, among)
    check_teacher(directory, own, among)
    bank = train_sweep(args, pairs, training, teacher).eval()
    curve = measure(bank, *asked, among)
    return among, own, [{**p._asdict(), "share": p.accuracy / own} for p in curve]


def check_teacher(directory: Path, own: float, among: int) -> None:
    """Refuse a teacher that hardly knows more than chance.

    Args:
        directory: its cache.
        own: its top-1.
        among: captions that each image chose from.

    Raises:
        UsageError: so it is.
    """
    if own < 3 / among:
        raise UsageError(
            f"--teacher-cache '{directory}': the teacher finds {100 * own:.1f} % of the captions "
            f"among {among}, hardly more than chance: there is no accuracy to keep a share of"
        )


def find_shards(directory: Path, train_data: str | None, index_dir: str | None = None) -> list[str]:
    """Names of a cache's shards: those of a data set, or all.

    Raises:
        UsageError: a shard of the data set is not in the cache, or there is none.
    """
    there = sorted(path.stem for path in directory.glob("*.json") if path.stem != "config")
    there = [name for name in there if (directory / f"{name}.image.npy").is_file()]
    if train_data:
        wanted = [
            shard_name(shard) for shard in index_shards(train_data, cache_dir=index_dir).shards
        ]
        if missing := set(wanted) - set(there):
            raise UsageError(
                f"--teacher-cache '{directory}' lacks {len(missing)} of {len(wanted)} shards of "
                f"--train-data (one is {min(missing)}); run `python -m training.cache_teacher`"
            )
        return wanted
    if not there:
        raise UsageError(
            f"--teacher-cache '{directory}' holds no finished shard; run "
            "`python -m training.cache_teacher`"
        )
    return there


def read_pairs(directory: Path, shards: list[str], most: int, seed: int) -> Pairs:
    """At most ``most`` usable samples, spread over all shards, each in all its views."""
    arrays = {
        m: [np.load(directory / f"{s}.{m}.npy", mmap_mode="r") for s in shards] for m in MODALITIES
    }
    usable = [~np.isnan(a[:, :, 0]).any(axis=0) for a in arrays["image"]]
    shard_of = np.repeat(np.arange(len(shards)), [len(u) for u in usable])
    place = np.concatenate([np.arange(len(u)) for u in usable])
    rows = np.flatnonzero(np.concatenate(usable))
    generator = torch.Generator().manual_seed(derive_seed(seed, "calibrate", "samples"))
    rows = np.sort(rows[torch.randperm(len(rows), generator=generator)[:most].numpy()])
    taken = [(n, place[rows[shard_of[rows] == n]]) for n in range(len(shards))]
    return Pairs(
        *(
            torch.from_numpy(np.concatenate([arrays[m][n][:, p] for n, p in taken], axis=1))
            for m in MODALITIES
        )
    )


def split(samples: int, held_out: int, among: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and held-out rows, a whole number of groups of ``among`` where possible.

    Raises:
        UsageError: too few samples.
    """
    held = min(held_out, samples // 5)
    held -= held % among if held >= among else 0
    if held < 20:
        raise UsageError(
            f"--teacher-cache holds {samples} usable samples; calibration needs a few hundred"
        )
    generator = torch.Generator().manual_seed(derive_seed(seed, "calibrate", "held out"))
    order = torch.randperm(samples, generator=generator)
    return order[held:], order[:held]


def train_sweep(args: Namespace, pairs: Pairs, rows: Tensor, teacher: dict) -> RDMBank:
    """One bank with all rates of the sweep, trained as stage 1 trains."""
    device = pairs.image.device
    generator = torch.Generator().manual_seed(derive_seed(args.seed, "bank"))
    bank = RDMBank(
        teacher,
        args.sweep,
        teacher["dim"],
        bank_widths(args, teacher["dim"]),
        generator=generator,
    )
    task = RDMTask(bank).to(device).train()
    optimizer = make_optimizer(args, task)
    schedule = make_schedule(args, optimizer, args.steps)
    size = min(args.batch_size, len(rows))
    bar = tqdm(range(args.steps), "the sweep", unit="step", disable=None, dynamic_ncols=True)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = schedule(step) * group["lr_scale"]
        draws = torch.Generator().manual_seed(derive_seed(args.seed, "calibrate", step))
        batch = rows[torch.randint(len(rows), (size,), generator=draws)]
        losses, _ = bank(*pairs.rows(batch, step), Noise(args.seed, step))
        optimizer.zero_grad(set_to_none=True)
        loss = sum(losses.values())
        loss.backward()
        optimizer.step()
        done = step + 1
        if bar.disable and 10 * done // args.steps > 10 * step // args.steps:  # no terminal
            print(f"the sweep: step {done:,} of {args.steps:,}, loss {loss:.4g}", flush=True)
    if not math.isfinite(loss.item()):
        raise NonFinite(f"the sweep's loss is {loss.item()} after {args.steps} steps; lower --lr")
    return bank


@torch.no_grad()
def teacher_accuracy(images: Tensor, texts: Tensor, among: int) -> float:
    """The teacher's top-1 on held-out pairs (N, T): what `measure` is of its RDMs."""
    groups = _groups(images, texts, among)
    return sum(top1_hits(image, text, same) for image, text, same in groups) / len(images)


@torch.no_grad()
def measure(bank: RDMBank, images: Tensor, texts: Tensor, among: int) -> list[Point]:
    """What each rate's RDMs keep, on held-out pairs (N, T).

    Args:
        bank: in evaluation mode: rounding in place of noise, as in stage 2.
        images, texts: unit teacher embeddings.
        among: captions that each image chooses from.
    """
    hits = torch.zeros(len(bank.rates), dtype=torch.float64)
    report: dict[str, Tensor] = {}
    for image, text, same in _groups(images, texts, among):
        spaces = zip(bank.image.reconstruct(image), bank.text.reconstruct(text))
        for k, (x, y) in enumerate(spaces):
            hits[k] += top1_hits(x, y, same)
        for name, value in bank(image, text, None)[1].items():
            report[name] = report.get(name, 0) + value.double().cpu() * len(image)
    accuracy = (hits / len(images)).tolist()
    means = {name: (value / len(images)).tolist() for name, value in report.items()}
    return [
        Point(
            rate,
            accuracy[k],
            {m: means[f"{m}/bits"][k] for m in MODALITIES},
            {m: means[f"{m}/distortion"][k] for m in MODALITIES},
        )
        for k, rate in enumerate(bank.rates)
    ]


def _groups(images: Tensor, texts: Tensor, among: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pairs that are asked together, and which of their captions are the same to the teacher."""
    for image, text in zip(images.split(among), texts.split(among)):
        yield image, text, torch.cdist(text, text, compute_mode=EXACT) < 1e-3


def top1_hits(images: Tensor, texts: Tensor, same: Tensor) -> int:
    """How many images (N, T) have their own caption (N, T) nearest.

    Args:
        same: (N, N) captions that are equal in the teacher's space count as one's own. A tie with
            another caption is a miss, so that what maps everything to one point knows nothing.
    """
    scores = images.double() @ texts.double().T
    own = scores.masked_fill(~same, -torch.inf).amax(dim=1)
    other = scores.masked_fill(same, -torch.inf).amax(dim=1)
    return int((own > other + 1e-9).sum())


def rates_for(wanted: list[float], sweep: list[float], shares: list[float]) -> list[float]:
    """The rate of each wanted share: read off the monotone curve, three significant digits.

    Args:
        wanted: shares of the teacher's accuracy.
        sweep: ascending rates.
        shares: what was measured at them, noise included.

    Raises:
        UsageError: a share is outside of what the sweep reaches.
    """
    fitted, x = isotonic_regression(shares), np.log(sweep)
    rates = []
    for share in wanted:
        if share > fitted[-1]:
            raise UsageError(
                f"--shares {share:g} can't be reached: the largest rate, R = {sweep[-1]:g}, keeps "
                f"{fitted[-1]:.3f}; extend --sweep upwards, raise --steps, or ask for less"
            )
        if share < fitted[0]:
            raise UsageError(
                f"--shares {share:g} can't be reached: the smallest rate, R = {sweep[0]:g}, still "
                f"keeps {fitted[0]:.3f}; extend --sweep downwards, or ask for more"
            )
        i = max(1, int(np.searchsorted(fitted, share)))
        step = fitted[i] - fitted[i - 1]
        part = (share - fitted[i - 1]) / step if step else 0.0
        rates.append(float(f"{math.exp(x[i - 1] + part * (x[i] - x[i - 1])):.3g}"))
    return rates


def _parse(argv: list[str]) -> Namespace:
    p = parser()
    p.prog, p.description = "python -m training.calibrate", __doc__
    p.usage = (
        "python -m training.calibrate [@recipe.args] --teacher-cache DIR --shares X [X ...]\n"
        "           [--sweep R R ...] [--steps N] [--out FILE.json] [flags]"
    )
    g = p.add_argument_group("calibration")
    g.add_argument(
        "--shares", type=float, nargs="+", help="of the teacher's accuracy, such as 0.95 0.85 0.7"
    )
    g.add_argument(
        "--sweep", type=float, nargs="+", default=SWEEP, metavar="R", help="rates to measure"
    )
    g.add_argument("--steps", type=int, default=2000, help="of the sweep's training")
    g.add_argument("--among", type=int, default=1000, help="captions an image chooses from")
    g.add_argument("--held-out", type=int, default=5000, help="pairs, at most a fifth of all")
    g.add_argument("--samples", type=int, default=200_000, help="pairs read into memory, at most")
    g.add_argument("--out", default="calibration.json", metavar="FILE.json", help="result")
    p.set_defaults(batch_size=1024)
    args = p.parse_args(argv)
    if not args.teacher_cache or "," in args.teacher_cache:
        raise UsageError("--teacher-cache DIR is needed: the cache of one teacher")
    if not args.shares or not all(0 < share < 1 for share in args.shares):
        raise UsageError("--shares needs numbers between 0 and 1, such as --shares 0.95 0.85 0.7")
    args.sweep = sorted(set(args.sweep))
    if len(args.sweep) < 2 or args.sweep[0] <= 0:
        raise UsageError("--sweep needs two positive rates or more")
    for flag in ("steps", "among", "held_out", "samples", "batch_size"):
        if getattr(args, flag) < 1:
            raise UsageError(f"--{flag.replace('_', '-')} must be at least 1")
    if not args.out.endswith(".json"):
        raise UsageError(f"--out '{args.out}': expected a name that ends in .json")
    _defaults(args)
    args.epochs = 1  # of --steps steps
    args.batch_size = getattr(args, "global_batch", None) or args.batch_size
    return args
