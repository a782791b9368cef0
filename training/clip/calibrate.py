"""The rates R by what their RDMs keep of the teacher (``python -m training.calibrate``).

One bank with a sweep of rates is trained in one pass on a teacher cache. Its RDMs are then asked
held-out training pairs: the caption of an image among N. A rate's share is its accuracy over the
teacher's own; its bits are those of an embedding, the mean of images and texts where the teacher
embeds both. The rate of a wanted share, or of wanted bits, is read off the monotone curve through
the sweep, between its points on a logarithmic scale. What is held out are rows of the cache: no
test split is looked at, no label is needed. Of a teacher of one modality there are bits alone.

Written: FILE.json with the curve and how it was measured, and FILE.args for ``training.main
@FILE.args``; of several caches FILE1.json, FILE1.args and so on too, whose banks are trained one by
one. Asked again for other shares or bits, it reads the curve from FILE.json.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from cifd_clip import Features, RDMBank, RDMTask
from cifd_clip.artefact import MODALITIES, modalities_of
from cifd_clip.files import file_hash, read_json, write_json, write_text
from cifd_clip.noise import derive_seed
from training.clip.cache import (
    HELD_OUT,
    are_unit,
    read_embeddings,
    shard_name,
    verify_shard,
)
from training.clip.config import CalibrationConfig, read_cache_config
from training.clip.curve import measure, rates_for, teacher_accuracy
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
WANTED = ("shares", "bits", "rates")  # what a file holds beside its curve
#: Flags that the curve depends on, beside the cache.
SETTINGS = (
    "sweep", "seed", "steps", "batch_size", "lr", "wd", "density_lr", "beta1", "beta2", "eps",
    "warmup", "warmup_epochs", "lr_scheduler", "epochs_cooldown", "lr_cooldown_end",
    "lr_cooldown_power", "rdm_hidden", "rdm_channels", "among", "held_out", "samples",
)  # fmt: skip


def start(given: Given) -> int:
    """Train the sweep of every cache, read the rates off its curve, and write them."""
    world, device = start_processes(construct(ProcessConfig, given))
    start_logging(world)
    if world.size > 1:
        raise UsageError(f"calibration is one process's work, got {world.size}: start it plainly")
    config = calibration_config(given)
    for directory in config.caches:
        check_cache(config, directory)
    for number, directory in enumerate(config.caches):
        out = Path(config.out)
        out = out.with_stem(f"{out.stem}{number or ''}")
        calibrate(replace(config, teacher_cache=str(directory)), out, device)
    return 0


def check_cache(config: CalibrationConfig, directory: Path) -> None:
    """Refuse a cache on which nothing, or no share of an accuracy, can be calibrated.

    Raises:
        UsageError: see above.
    """
    cache = read_cache_config(directory)
    if cache.get("code"):
        raise UsageError(
            f"--teacher-cache '{directory}' is coded: rates are calibrated on the teacher's own "
            "embeddings, of a cache without --code-with"
        )
    modalities = modalities_of(cache["teacher"])
    if config.shares and modalities != MODALITIES:
        raise UsageError(
            f"--shares: the teacher of --teacher-cache '{directory}' embeds {modalities[0]}s "
            "alone, and finds no image's caption: give --bits"
        )


def calibrate(config: CalibrationConfig, out: Path, device: torch.device) -> None:
    """Find and write the rates of one cache."""
    (directory,) = config.caches
    # The curve: an earlier command's, or measured now.
    cache = read_cache_config(directory)
    shards = find_shards(directory, config.train_data, config.index_dir)
    settings = conditions(config, cache, shards)
    curve = earlier_curve(out, settings)
    if curve is None:
        curve = sweep(config, shards, cache["teacher"], device)
        curve |= {"conditions": settings, "environment": environment()}
        write(out, curve)  # a share that can't be reached must not lose it
    # What it says.
    teacher, among = curve["teacher_accuracy"], curve["among"]
    if teacher is not None:
        print(f"image → text top-1 among {among} held-out pairs: the teacher {100 * teacher:.1f} %")
    for point in curve["curve"]:
        kept = ", ".join(f"{v:.0f} bits per {m}" for m, v in point["bits"].items())
        if teacher:
            kept = f"{100 * point['accuracy']:5.1f} %, share {point['share']:.3f}, {kept}"
        print(f"  R = {point['rate']:<8g} {kept}")
    # The rates of the wanted shares, or bits.
    name = "shares" if config.shares else "bits"
    wanted, sweep_rates = getattr(config, name), [point["rate"] for point in curve["curve"]]
    if name == "shares":
        check_teacher(directory, teacher, among)
        measured = [point["share"] for point in curve["curve"]]
    else:
        measured = [fmean(point["bits"].values()) for point in curve["curve"]]
    try:
        rates = rates_for(wanted, sweep_rates, measured, f"--{name}")
    except UsageError as error:
        raise UsageError(f"{error}; {out} keeps the curve for other {name}") from None
    write(out, {name: wanted, "rates": rates, **curve})
    flags = f"--rdm-reduction sum --rates {' '.join(f'{rate:g}' for rate in rates)}"
    write_text(out.with_suffix(".args"), f"# training.calibrate, see {out.name}\n{flags}\n")
    print(f"{out}, {out.with_suffix('.args')}")
    print(f"{name} {' '.join(f'{k:g}' for k in wanted)}: {flags}")


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
    return {name: value for name, value in content.items() if name not in WANTED}


def write(out: Path, content: dict) -> None:
    """Write the JSON; a flag file of earlier rates goes."""
    out.with_suffix(".args").unlink(missing_ok=True)
    write_json(out, content, FORMAT)


def sweep(
    config: CalibrationConfig, shards: list[str], teacher: dict, device: torch.device
) -> dict:
    """Train the sweep and measure it.

    Returns:
        ``among`` (captions an image chose from), ``teacher_accuracy`` (None of one modality), and
        ``curve``: the points with their shares of it, where it is not zero.

    Raises:
        UsageError: shares are wanted of an accuracy that is nearly none, which is known before any
            training.
    """
    (directory,) = config.caches
    pairs = read_pairs(directory, shards, config.samples, config.seed)
    samples = getattr(pairs, pairs.modalities[0]).shape[1]
    training, held_out = split(samples, config.held_out, config.among, config.seed)
    among = min(config.among, len(held_out))
    print(
        f"{directory}: {len(training):,} pairs to train on, {len(held_out):,} held out, "
        f"{len(config.sweep)} rates in {config.steps} steps of {config.batch_size}",
        flush=True,
    )
    pairs = pairs.map(lambda x: x.to(device))
    held_out_pairs = at_rows(pairs, held_out)
    own = teacher_accuracy(held_out_pairs, among)
    if config.shares:
        check_teacher(directory, own, among)
    bank = train_sweep(config, pairs, training, teacher).eval()
    curve = measure(bank, held_out_pairs, among)
    points = [p._asdict() | ({"share": p.accuracy / own} if own else {}) for p in curve]
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


def read_pairs(directory: Path, shards: list[str], most: int, seed: int) -> Features:
    """At most ``most`` (N) usable samples, spread over all shards, each in all its views.

    Of images (V, N, T), of texts (V or 1, N, T), in float16.
    """
    for shard in shards:
        verify_shard(directory, shard)
    embeddings = [read_embeddings(directory / f"{shard}.safetensors") for shard in shards]
    usable = [np.all([are_unit(x).all(axis=0) for x in e.values()], axis=0) for e in embeddings]
    shard_of = np.repeat(np.arange(len(shards)), [len(u) for u in usable])
    place = np.concatenate([np.arange(len(u)) for u in usable])
    rows = np.flatnonzero(np.concatenate(usable))
    generator = torch.Generator().manual_seed(derive_seed(seed, "calibrate", "samples"))
    rows = np.sort(rows[torch.randperm(len(rows), generator=generator)[:most].numpy()])
    taken = [(n, place[rows[shard_of[rows] == n]]) for n in range(len(shards))]
    arrays = {
        m: torch.from_numpy(np.concatenate([embeddings[n][m][:, p] for n, p in taken], axis=1))
        for m in embeddings[0]
    }
    return Features(arrays.get("image"), arrays.get("text"), None)


def at_rows(pairs: Features, rows: Tensor, view: int = 0) -> Features:
    """Float32 unit embeddings (B, T) of rows (B,) of what `read_pairs` read, at one view."""
    return pairs.map(lambda x: F.normalize(x[view % len(x), rows.to(x.device)].float(), dim=-1))


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

    features: Features
    skipped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(getattr(self.features, self.features.modalities[0]))

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

    pairs: Features
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
            yield PairBatch(at_rows(self.pairs, picked, step))


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
        return [batch.features]


def train_sweep(config: CalibrationConfig, pairs: Features, rows: Tensor, teacher: dict) -> RDMBank:
    """One bank with all rates of the sweep, trained as stage 1 trains."""
    device = getattr(pairs, pairs.modalities[0]).device
    bank = make_bank(config, teacher, config.sweep, config.seed)
    trainer = Trainer(SweepStage(bank, device), config, config.steps, device=device)
    train(trainer, PairLoader(pairs, rows, min(config.batch_size, len(rows)), config.seed), config)
    trainer.check_finite()
    return bank
