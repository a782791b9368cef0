"""The rates R by what their RDMs keep of the teacher (``python -m training.calibrate``).

One bank with a sweep of rates is trained in one pass on a teacher cache. Its RDMs are then asked
held-out training pairs: the caption of an image among N. A rate's share is its accuracy over the
teacher's own; the rate of a wanted share is read off the monotone curve through the sweep, between
its points on a logarithmic scale. What is held out are rows of the cache: no test split is looked
at, no label is needed.

Written: FILE.json with the curve and how it was measured, and FILE.args for ``training.main
@FILE.args``. Asked again for other shares, it reads the curve from FILE.json.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.isotonic import isotonic_regression
from torch import Tensor
from torch.optim import Optimizer

from cifd_clip import Features, RDMBank, RDMTask
from cifd_clip.files import file_hash, read_json, write_json, write_text
from cifd_clip.noise import derive_seed
from training.clip.cache import (
    HELD_OUT,
    MODALITIES,
    are_unit,
    read_embeddings,
    shard_name,
    verify_shard,
)
from training.clip.config import CalibrationConfig, read_cache_config
from training.clip.flags import calibration_config
from training.clip.stages import make_bank
from training.data.index import index_shards
from training.engine.config import OptimConfig, ProcessConfig
from training.engine.control import start_logging, start_processes
from training.engine.environment import environment
from training.engine.flags import Given, construct
from training.engine.loop import train
from training.engine.optim import one_adamw
from training.engine.stage import Stage
from training.engine.trainer import Trainer
from training.errors import UsageError

FORMAT = 1
#: Flags that the curve depends on, beside the cache.
SETTINGS = (
    "sweep", "seed", "steps", "batch_size", "lr", "wd", "density_lr", "beta1", "beta2", "eps",
    "warmup", "warmup_epochs", "lr_scheduler", "epochs_cooldown", "lr_cooldown_end",
    "lr_cooldown_power", "rdm_hidden", "rdm_channels", "among", "held_out", "samples",
)  # fmt: skip
EXACT = "donot_use_mm_for_euclid_dist"


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


def start(given: Given) -> int:
    """Train the sweep, read the rates off its curve, and write them."""
    world, device = start_processes(construct(ProcessConfig, given))
    start_logging(world)
    if world.size > 1:
        raise UsageError(f"calibration is one process's work, got {world.size}: start it plainly")
    config = calibration_config(given)
    (directory,), out = config.caches, Path(config.out)
    # The curve: an earlier command's, or measured now.
    cache = read_cache_config(directory)
    if cache.get("code"):
        raise UsageError(
            f"--teacher-cache '{directory}' is coded: rates are calibrated on the teacher's own "
            "embeddings, of a cache without --code-with"
        )
    shards = find_shards(directory, config.train_data, config.index_dir)
    settings = conditions(config, cache, shards)
    curve = earlier_curve(out, settings)
    if curve is None:
        curve = sweep(config, shards, cache["teacher"], device)
        curve |= {"conditions": settings, "environment": environment()}
        write(out, curve)  # a share that can't be reached must not lose it
    # What it says.
    teacher, among = curve["teacher_accuracy"], curve["among"]
    print(f"image → text top-1 among {among} held-out pairs: the teacher {100 * teacher:.1f} %")
    for point in curve["curve"]:
        bits = ", ".join(f"{v:.0f} bits per {m}" for m, v in point["bits"].items())
        kept = f"{100 * point['accuracy']:5.1f} %, share {point['share']:.3f}, {bits}"
        print(f"  R = {point['rate']:<8g} {kept}")
    # The rates of the wanted shares.
    measured = ([point[k] for point in curve["curve"]] for k in ("rate", "share"))
    try:
        rates = rates_for(config.shares, *measured)
    except UsageError as error:
        raise UsageError(f"{error}; {out} keeps the curve for other shares") from None
    write(out, {"shares": config.shares, "rates": rates, **curve})
    flags = f"--rdm-reduction sum --rates {' '.join(f'{rate:g}' for rate in rates)}"
    write_text(out.with_suffix(".args"), f"# training.calibrate, see {out.name}\n{flags}\n")
    print(f"{out}, {out.with_suffix('.args')}")
    print(f"keeping {' '.join(f'{k:g}' for k in config.shares)}: {flags}")
    return 0


def conditions(config: CalibrationConfig, cache: dict, shards: list[str]) -> dict:
    """All that a curve depends on, as JSON values."""
    (directory,) = config.caches
    values = {name: getattr(config, name) for name in SETTINGS}
    return {
        "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()},
        "cache": {
            **cache,
            "shards": {name: file_hash(directory / f"{name}.json")[:16] for name in shards},
        },
    }


def earlier_curve(out: Path, settings: dict) -> dict | None:
    """What an earlier command has measured under the same conditions and left in ``out``.

    None if there is no such file, or it is of other data or settings.
    """
    if not out.is_file():
        return None
    content = read_json(out, FORMAT)
    if content.get("conditions") != settings:
        return None
    print(f"{out} holds the curve of this cache and these settings: read", flush=True)
    return {name: value for name, value in content.items() if name not in ("shares", "rates")}


def write(out: Path, content: dict) -> None:
    """Write the JSON; a flag file of earlier rates goes."""
    out.with_suffix(".args").unlink(missing_ok=True)
    write_json(out, content, FORMAT)


def sweep(
    config: CalibrationConfig, shards: list[str], teacher: dict, device: torch.device
) -> dict:
    """Train the sweep and measure it.

    Returns:
        ``among`` (captions an image chose from), ``teacher_accuracy``, and ``curve``: the points
        with their shares of it.

    Raises:
        UsageError: the teacher's accuracy is nearly none, which is known before any training.
    """
    (directory,) = config.caches
    pairs = read_pairs(directory, shards, config.samples, config.seed)
    training, held_out = split(pairs.image.shape[1], config.held_out, config.among, config.seed)
    among = min(config.among, len(held_out))
    print(
        f"{directory}: {len(training):,} pairs to train on, {len(held_out):,} held out, "
        f"{len(config.sweep)} rates in {config.steps} steps of {config.batch_size}",
        flush=True,
    )
    pairs = Pairs(*(x.to(device) for x in pairs))
    held_out_pairs = pairs.rows(held_out)
    own = teacher_accuracy(*held_out_pairs, among)
    check_teacher(directory, own, among)
    bank = train_sweep(config, pairs, training, teacher).eval()
    curve = measure(bank, *held_out_pairs, among)
    points = [{**p._asdict(), "share": p.accuracy / own} for p in curve]
    return {"among": among, "teacher_accuracy": own, "curve": points}


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
    there = [n for n in there if (directory / f"{n}.safetensors").is_file()]
    there = [n for n in there if not n.endswith(HELD_OUT)]
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
    for shard in shards:
        verify_shard(directory, shard)
    embeddings = [read_embeddings(directory / f"{shard}.safetensors") for shard in shards]
    arrays = {modality: [e[modality] for e in embeddings] for modality in MODALITIES}
    usable = [np.all([are_unit(e[m]).all(axis=0) for m in MODALITIES], axis=0) for e in embeddings]
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


@dataclass
class PairBatch:
    """Some pairs' unit embeddings, (B, T) float32."""

    image: Tensor
    text: Tensor
    skipped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.image)

    def to(self, device: torch.device) -> "PairBatch":
        """Itself: cached pairs are on the device already."""
        return self


@dataclass
class PairLoader:
    """Batches of random rows, the views of an image in turn.

    Args:
        pairs: on the device.
        rows: which are trained on.
        size: of a batch.
        seed: of the draws.
    """

    pairs: Pairs
    rows: Tensor
    size: int
    seed: int

    def batches(
        self, start_step: int, stop_step: int, stopping=None, timeout=None
    ) -> Iterator[PairBatch]:
        """Those of some steps, each a function of its number; they are in memory."""
        for step in range(start_step, stop_step):
            draws = torch.Generator().manual_seed(derive_seed(self.seed, "calibrate", step))
            picked = self.rows[torch.randint(len(self.rows), (self.size,), generator=draws)]
            yield PairBatch(*self.pairs.rows(picked, step))


class SweepStage(Stage[PairBatch]):
    """Stage 1 on cached pairs: one bank with all rates of a sweep."""

    def __init__(self, bank: RDMBank, device: torch.device):
        self.bank, self.rates = bank, bank.rates
        self.task = RDMTask(bank).to(device)

    def optimizers(self, config: OptimConfig) -> list[Optimizer]:
        return one_adamw(config, self.task)

    def inputs(self, batch: PairBatch) -> tuple[None, None]:
        """Nothing: the bank reads the teacher's features."""
        return None, None

    def targets(self, batch: PairBatch) -> list[Features]:
        """The teacher's features."""
        return [Features(batch.image, batch.text, batch.image.new_ones(()))]


def train_sweep(config: CalibrationConfig, pairs: Pairs, rows: Tensor, teacher: dict) -> RDMBank:
    """One bank with all rates of the sweep, trained as stage 1 trains."""
    device = pairs.image.device
    bank = make_bank(config, teacher, config.sweep, config.seed)
    trainer = Trainer(SweepStage(bank, device), config, config.steps, device=device)
    train(trainer, PairLoader(pairs, rows, min(config.batch_size, len(rows)), config.seed), config)
    trainer.check_finite()
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
