"""A run of `training.main`: a CLIP model, an RDM bank, or a distilled student.

``--distill cifd`` without ``--rdm-bank`` is two runs: the bank in ``RUN/rdm``, then the student.
"""

import contextlib
import logging
import operator
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cifd_clip import World
from cifd_clip.files import file_hash
from training.clip.config import Config, ProcessConfig
from training.clip.flags import resolve
from training.clip.heldout import HeldOut, held_out, split
from training.clip.models import add_model_configs
from training.clip.stages import RDMStage, StudentStage, check_student
from training.clip.zeroshot import ZeroShot, check_zeroshot
from training.data.in_memory import MemoryLoader
from training.data.index import (
    NotAShard,
    Sources,
    expand,
    index_shard,
    index_shards,
    is_remote,
)
from training.data.loader import Loader
from training.data.order import Order
from training.data.shard import verify
from training.data.stream import StreamLoader, stream_fingerprint
from training.engine.checkpoint import Checkpoints
from training.engine.control import (
    STOPPED_EXIT,
    Peers,
    StopFlag,
    all_gather_object,
    barrier,
    end_processes,
    start_logging,
    start_processes,
    together,
)
from training.engine.flags import Given, construct
from training.engine.lease import Lease, held
from training.engine.loop import train
from training.engine.metrics import MetricWriter
from training.engine.run import RunDirectory
from training.engine.trainer import Progress, Trainer
from training.errors import UsageError

log = logging.getLogger(__name__)

#: What a resumed run must find of its teachers.
KNOWN_BY = ("weights", "preprocess", "code")


def start(given: Given, files: dict[str, Any]) -> int:
    """Run what a command line gives; the exit code is 0 only when all of it is finished.

    Args:
        given: flags, see `training.clip.flags.parse`.
        files: what the files say that they name, see `training.clip.flags.named_files`.
    """
    world, device = start_processes(construct(ProcessConfig, given))
    start_logging(world)
    config = resolve(given, world.size, device.type, **files)
    add_model_configs(config.model_config)
    if config.use_bn_sync and world.size > 1 and device.type != "cuda":
        raise UsageError("--use-bn-sync needs GPUs: torch has no synchronised batch norm on a CPU")
    together(world, lambda: check_zeroshot(config), only=0)
    finished = run_stages(config, world, device)
    end_processes()
    return 0 if finished else STOPPED_EXIT


def run_stages(config: Config, world: World, device: torch.device) -> bool:
    """The run, after the bank that it needs; whether it is finished (see `run`)."""
    path = Path(config.logs) / config.name
    banks = config.banks
    if config.distill == "cifd" and not banks and config.rates:
        # Refuse now what stage 2 would refuse after stage 1 has been trained.
        RunDirectory(config)
        check_student(config)
        for teacher in range(max(len(config.teachers), len(config.caches))):
            folder = path / f"rdm{teacher or ''}"
            if not run(bank_config(config, teacher), folder, world, device):
                return False
            banks.append(folder / "bank")
    return run(config, path, world, device, banks)


def bank_config(config: Config, teacher: int = 0) -> Config:
    """Stage 1 of a teacher with the settings of stage 2 (appendix A.3), for ``--rdm-epochs``."""

    def scaled(value):
        """A number of steps or epochs as the same share of stage 1."""
        if value is None:
            return None
        divide = operator.floordiv if isinstance(value, int) else operator.truediv
        return divide(value * config.rdm_epochs, config.epochs)

    names = config.teachers[teacher : teacher + 1]  # none where a cache knows its teacher
    return replace(
        config,
        distill="rdm",
        distill_model="".join(name.model for name in names),
        distill_pretrained="".join(name.weights or "" for name in names),
        teacher_cache="".join(map(str, config.caches[teacher : teacher + 1])),
        options={},
        data_root="",
        epochs=config.rdm_epochs,
        warmup=scaled(config.warmup),
        warmup_epochs=scaled(config.warmup_epochs),
        epochs_cooldown=scaled(config.epochs_cooldown),
        accum_freq=1,
        batch_size=config.batch_size * config.accum_freq,
        pretrained="",
        resume=config.resume and "latest",  # a PATH is a student's
    )


def run(
    config: Config, path: Path, world: World, device: torch.device, banks: Sequence[Path] = ()
) -> bool:
    """One run directory from wherever it is to its end.

    Args:
        config: of the run.
        path: its directory.
        world, device: of this process.
        banks: those whose RDMs assist the teachers.

    Returns:
        Whether it is finished; False when a signal stopped it with a checkpoint on disk.
    """
    with held(path / "lease.json", world) as lease:
        return _run(config, path, world, device, banks, lease)


def _run(
    config: Config,
    path: Path,
    world: World,
    device: torch.device,
    banks: Sequence[Path],
    lease: Lease | None,
) -> bool:
    directory = RunDirectory(config, path)
    if all_gather_object(world, world.rank == 0 and directory.finished)[0]:
        log.info("%s is finished already", path)
        return True
    # What trains, on what data.
    sources = None if is_remote(config.train_data) else open_data(config, world)
    kept, held = (
        split(sources, config.val_fraction) if sources and config.val_fraction else (None, None)
    )
    steps_per_epoch = epoch_steps(config, sources, kept)
    rdm = config.distill == "rdm"
    stage = RDMStage(config, device) if rdm else StudentStage(config, device, world, banks)
    trainer = Trainer(stage, config, steps_per_epoch, world, device, config.precision, config.name)
    # Where it goes on.
    checkpoints = Checkpoints(directory.checkpoints, config.keep, lease)
    checkpoint = checkpoints.agreed(world, config.resume) if config.resume else None
    if checkpoint is not None:
        trainer.load(checkpoint[1])
    # Whatever may still be wrong with the command line is found before the directory is taken.
    loader = make_loader(config, sources, trainer, kept)
    validation = held_out(config, stage, world, sources, held)
    goes_on = checkpoint and checkpoint[0]
    take = partial(begin, config, directory, trainer, sources, validation, goes_on)
    writer = together(world, take, only=0)
    zeroshot = make_zeroshot(config, path, trainer, writer)
    if zeroshot is not None:
        checkpoints.saved = zeroshot.saved
    stop = StopFlag(world)
    try:
        with Peers(world, checkpoints.busy):
            finished = train(
                trainer,
                loader,
                config,
                checkpoints if world.rank == 0 else None,
                writer,
                stop,
                validation,
                partial(check_bad_fraction, config),
            )
            if finished and zeroshot is not None:
                zeroshot.wait(stop.raised)
            if finished and world.rank == 0:
                lease.check()
                directory.finish(trainer.progress.state(), stage.finish(path))
                log.info("finished %s in %.0f s", path, trainer.progress.seconds)
    finally:
        stop.close()
        loader.close()
        checkpoints.join()
        if zeroshot is not None:
            zeroshot.close()
        if writer is not None:
            writer.close()
            directory.close()
    barrier(world)
    return finished


def open_data(config: Config, world: World) -> Sources:
    """Index the training shards, each rank its part first: no rank waits long for another."""
    if world.size > 1:
        paths = [path for source in expand(config.train_data) for path in source]
        for path in paths[world.rank :: world.size]:
            with contextlib.suppress(NotAShard):  # what is wrong is said below
                index_shard(path, config.index_dir)
        barrier(world)
    factors = config.train_data_upsampling_factors
    sources = index_shards(config.train_data, weights=factors, cache_dir=config.index_dir)
    if config.verify_data:
        together(world, lambda: verify(sources.shards[world.rank :: world.size]))
    for problem in sources.problems:
        log.warning("%s", problem)
    bad = sum(sources.skipped.values())
    if bad > config.max_bad_fraction * (bad + sources.num_samples):
        raise UsageError(
            f"--train-data '{config.train_data}': {bad} of {bad + sources.num_samples} samples "
            f"can't be used ({sources.skipped}), more than --max-bad-fraction "
            f"{config.max_bad_fraction}; `python -m training.check_data` says where they are"
        )
    return sources


def check_bad_fraction(config: Config, progress: Progress) -> None:
    """Refuse to go on when too many samples could not be used."""
    bad = progress.skipped.total()
    # A handful proves nothing.
    if bad > 10 and bad > config.max_bad_fraction * progress.samples:
        raise UsageError(
            f"{bad} of {progress.samples} samples could not be used "
            f"({dict(progress.skipped)}), more than --max-bad-fraction {config.max_bad_fraction}; "
            "run `python -m training.check_data --deep` on --train-data"
        )


def make_loader(
    config: Config, sources: Sources | None, trainer: Trainer, kept: np.ndarray | None = None
) -> Loader | MemoryLoader | StreamLoader:
    """What delivers this rank's part of each global batch.

    Args:
        config: of the run.
        sources: local shards; None: remote ones, which are streamed.
        trainer: of the run.
        kept: rows to train on; None: all.
    """
    stage, world = trainer.stage, trainer.world
    inputs = (stage.transforms.train_views(), stage.transforms.tokenizers)
    options = {
        "seed": config.view_seed,
        "global_batch": config.global_batch,
        "views": config.views,
        "captions": config.captions,
        "rank": world.rank,
        "world_size": world.size,
        "workers": config.workers,
        "start_method": config.worker_start,
        "pin_memory": trainer.device.type == "cuda",
    }
    if sources is None:
        shards = trainer.progress.shards
        return StreamLoader(config.train_data, *inputs, shards_consumed=shards, **options)
    order = Order(
        sources,
        config.seed,
        window=config.shuffle_window,
        replacement=config.dataset_resampled,
        kept=kept,
    )
    options["fetchers"] = stage.source.fetchers(sources)
    # A bank reads no image; those of a second teacher's are in the first one's cache.
    read = order, stage.source.images_of(sources) if inputs[0] else sources, *inputs
    if config.in_memory:
        options["folder"] = Path(config.in_memory_dir) if config.in_memory_dir else None
        options["recipe"] = stage.transforms.recipe()
        return MemoryLoader(*read, device=trainer.device, **options)
    return Loader(*read, **options)


def make_zeroshot(
    config: Config, path: Path, trainer: Trainer, writer: MetricWriter | None
) -> ZeroShot | None:
    """What evaluates checkpoints beside the training, on rank 0, where a student trains."""
    wanted = config.data_root and config.zeroshot_frequency and config.distill != "rdm"
    if writer is None or not wanted:
        return None
    every = config.zeroshot_frequency * trainer.steps_per_epoch

    def due(step: int) -> bool:
        return step % every == 0 or step == trainer.total_steps

    return ZeroShot(config, path, writer, trainer.progress.step, due)


def epoch_steps(config: Config, sources: Sources | None, kept: np.ndarray | None = None) -> int:
    """Optimizer steps of an epoch: its samples, in whole global batches."""
    if sources is None:
        if not config.train_num_samples:
            raise UsageError(
                "--train-num-samples is needed: remote shards can't be counted beforehand"
            )
        for flag in (
            *("teacher_cache", "in_memory"),
            *("train_data_upsampling_factors", "dataset_resampled", "val_fraction"),
        ):
            if getattr(config, flag):
                raise UsageError(
                    f"--{flag.replace('_', '-')} needs local --train-data, whose samples have "
                    "numbers"
                )
    samples = config.train_num_samples or (sources.num_samples if kept is None else len(kept))
    if samples < config.global_batch:
        raise UsageError(
            f"an epoch has {samples} samples, less than one global batch of "
            f"{config.global_batch}: lower --batch-size or raise --train-num-samples"
        )
    return samples // config.global_batch


def begin(
    config: Config,
    directory: RunDirectory,
    trainer: Trainer,
    sources: Sources | None,
    validation: HeldOut | None,
    checkpoint: Path | None,
) -> MetricWriter:
    """Take the run's directory, and say what is about to happen (rank 0).

    Raises:
        UsageError: other data, teachers or another bank than those that the run began with.
    """
    data = sources.fingerprint() if sources else stream_fingerprint(config.train_data)
    teachers = trainer.stage.teacher_info()
    directory.open(
        {
            "train_data": data["hash"],
            "val_data": validation and validation.hash,
            "distill_model": [[t.get(name) for name in KNOWN_BY] for t in teachers["teachers"]],
            "rdm_bank": teachers["bank_weights"],
            "model_config": {Path(path).stem: file_hash(path) for path in config.model_config},
        }
    )
    directory.write("data.json", data)
    directory.write("teachers.json", teachers)
    describe(directory, config, trainer, data, checkpoint)
    return MetricWriter(directory.path, config, directory.config, trainer.progress.step)


def describe(
    directory: RunDirectory,
    config: Config,
    trainer: Trainer,
    fingerprint: dict[str, Any],
    checkpoint: Path | None,
) -> None:
    """Say what is about to happen."""
    parameters = sum(p.numel() for p in trainer.parameters)
    log.info(
        "%s | %s on %s | %s samples in %d shards | %d steps of %d | %.1f M parameters train | %s",
        directory.path,
        config.distill,
        trainer.device.type,
        fingerprint["usable"],
        fingerprint["shards"],
        trainer.total_steps,
        config.global_batch,
        parameters / 1e6,
        time.strftime("%Y-%m-%d %H:%M"),
    )
    if fingerprint["skipped"]:
        log.warning("samples that can't be used: %s", fingerprint["skipped"])
    if checkpoint:
        log.info("resumed from %s at step %d", checkpoint.name, trainer.progress.step)
