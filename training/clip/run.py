"""``python -m training.main``: train a CLIP model, an RDM bank, or a distilled student.

``--distill cifd`` without ``--rdm-bank`` is two runs: the bank in ``RUN/rdm``, then the student.
"""

import contextlib
import copy
import logging
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from cifd_clip import World
from training.clip.cache import read_config
from training.clip.flags import batch_share, parse_args, parser
from training.clip.models import add_model_configs, build_student
from training.clip.stages import RDMStage, Stage, StudentStage
from training.data.index import (
    NotAShard,
    Sources,
    expand,
    index_shard,
    index_shards,
    is_remote,
)
from training.data.loader import Loader, sequential
from training.data.order import Order
from training.data.stream import StreamLoader, stream_fingerprint
from training.engine.checkpoint import Checkpoints
from training.engine.control import (
    STOPPED_EXIT,
    StopFlag,
    gathered,
    log_level,
    start_processes,
    wait_for_all,
)
from training.engine.loop import train
from training.engine.metrics import Sinks
from training.engine.run import RunDirectory, resolved_config
from training.engine.trainer import Trainer
from training.errors import UsageError

#: Rows of a held-out batch: a contrastive loss depends on it, and must not on the processes.
VALIDATION_BATCH = 256


def main(argv: list[str]) -> int:
    """Run what the command line says; the exit code is 0 only when all of it is finished."""
    args = parse_args(argv)
    world, device = start_processes(args)
    logging.basicConfig(
        level=log_level(world), format="%(asctime)s | %(message)s", datefmt="%H:%M:%S", force=True
    )
    if args.precision is None:
        args.precision = "amp_bf16" if device.type == "cuda" else "fp32"
    if args.precision == "amp" and device.type != "cuda":
        raise UsageError("--precision amp (float16) needs a GPU; use amp_bf16 or fp32")
    if args.global_batch is not None:
        args.batch_size = batch_share(args, world.size)
    add_model_configs(args.model_config)
    if args.use_bn_sync and world.size > 1 and device.type != "cuda":
        raise UsageError("--use-bn-sync needs GPUs: torch has no synchronised batch norm on a CPU")
    adopt_cache(args)
    path = Path(args.logs) / args.name
    done = stages(args, path, world, device)
    if dist.is_initialized():  # after a failure it would wait for the others: see `cli`
        dist.destroy_process_group()
    return 0 if done else STOPPED_EXIT


def stages(args: Namespace, path: Path, world: World, device: torch.device) -> bool:
    """The run, after the bank that it needs; whether it is finished (see `run`)."""
    if args.distill == "cifd" and not args.rdm_bank:
        args, stage1 = copy.copy(args), bank_args(args)
        if args.rates:
            args.rdm_bank = str(path / "rdm" / "bank")
            check_student(args, path, world)
            if not run(stage1, path / "rdm", world, device):
                return False
    return run(args, path, world, device)


def adopt_cache(args: Namespace) -> None:
    """Where the flags leave views and their seed open, a teacher cache decides."""
    if args.teacher_cache:
        cache = read_config(Path(args.teacher_cache.split(",")[0]))
        args.views = args.views or cache["views"]
        args.view_seed = cache["view_seed"] if args.view_seed is None else args.view_seed
    elif args.view_seed is None:
        args.view_seed = args.seed


def bank_args(args: Namespace) -> Namespace:
    """Stage 1 with the settings of stage 2 (appendix A.3), for ``--rdm-epochs``."""
    stage1 = copy.copy(args)
    stage1.distill, stage1.epochs = "rdm", args.rdm_epochs
    stage1.warmup = None if args.warmup is None else args.warmup * args.rdm_epochs // args.epochs
    if args.epochs_cooldown is not None:
        stage1.epochs_cooldown = args.epochs_cooldown * args.rdm_epochs / args.epochs
    stage1.accum_freq, stage1.batch_size = 1, args.batch_size * args.accum_freq
    stage1.pretrained = ""
    return stage1


def check_student(args: Namespace, path: Path, world: World) -> None:
    """Refuse now what stage 2 would refuse after stage 1 has been trained.

    Raises:
        UsageError: the student can't be made, or its run directory is another run's.
    """
    RunDirectory(path, resolved_config(args, world.size), parser(), args.resume == "latest")
    build_student(args)


def run(args: Namespace, path: Path, world: World, device: torch.device) -> bool:
    """One run directory from wherever it is to its end.

    Returns:
        Whether it is finished; False when a signal stopped it with a checkpoint on disk.
    """
    config = resolved_config(args, world.size)
    directory = RunDirectory(path, config, parser(), args.resume == "latest")
    if gathered(world, directory.finished)[0]:
        logging.info("%s is finished already", path)
        return True
    sources = None if is_remote(args.train_data) else open_data(args, world)
    steps_per_epoch = epoch_steps(args, sources, config["global_batch"])
    stage = RDMStage(args, device) if args.distill == "rdm" else StudentStage(args, device, world)
    trainer = Trainer(args, stage, world, device, steps_per_epoch)

    checkpoints = Checkpoints(directory.checkpoints, args.keep)
    found = resume(trainer, checkpoints, world) if args.resume else None
    # Whatever may still be wrong with the command line is found before the directory is taken.
    loader = make_loader(args, sources, trainer, config["global_batch"])
    validation = held_out(args, stage, world)
    sinks = None
    if world.rank == 0:
        directory.open()
        describe(directory, trainer, sources, found)
        step = trainer.progress.step
        sinks = Sinks(path, args.report_to, config, args.wandb_project_name, args.wandb_notes, step)
    stop = StopFlag(world)
    try:
        rank0 = checkpoints if world.rank == 0 else None
        done = train(trainer, loader, rank0, sinks, stop, validation)
        if done and world.rank == 0:
            stage.finish(path)
            directory.write_json("finished.json", trainer.progress.state())
            logging.info("finished %s in %.0f s", path, trainer.progress.seconds)
    finally:
        stop.close()
        loader.close()
        checkpoints.join()
        if sinks is not None:
            sinks.close()
            directory.close()
    wait_for_all(world)
    return done


def resume(trainer: Trainer, checkpoints: Checkpoints, world: World) -> Path | None:
    """Go on from the newest checkpoint, if there is one; its path (the content is large)."""
    found = checkpoints.agreed(world)
    if found is None:
        return None
    trainer.load(found[1])
    return found[0]


def open_data(args: Namespace, world: World) -> Sources:
    """Index the training shards, each rank its part first: no rank waits long for another."""
    if world.size > 1:
        paths = [path for source in expand(args.train_data) for path in source]
        for path in paths[world.rank :: world.size]:
            with contextlib.suppress(NotAShard):  # what is wrong is said below
                index_shard(path, args.index_dir)
        wait_for_all(world)
    factors = args.train_data_upsampling_factors
    sources = index_shards(args.train_data, weights=factors, cache_dir=args.index_dir)
    bad = sum(sources.skipped.values())
    if bad > args.max_bad_fraction * (bad + sources.num_samples):
        raise UsageError(
            f"--train-data '{args.train_data}': {bad} of {bad + sources.num_samples} samples can't "
            f"be used ({sources.skipped}), more than --max-bad-fraction {args.max_bad_fraction}; "
            "`python -m training.check_data` says where they are"
        )
    return sources


def make_loader(
    args: Namespace, sources: Sources | None, trainer: Trainer, global_batch: int
) -> Loader | StreamLoader:
    """What delivers this rank's part of each global batch; remote shards (no sources) stream."""
    stage, world = trainer.stage, trainer.world
    inputs = (stage.inputs.train_views(), stage.inputs.tokenizers)
    options = {
        "seed": args.view_seed,
        "global_batch": global_batch,
        "views": args.views,
        "captions": args.captions,
        "rank": world.rank,
        "world_size": world.size,
        "workers": args.workers,
        "start_method": args.worker_start,
        "pin_memory": trainer.device.type == "cuda",
    }
    if sources is None:
        shards = trainer.progress.shards
        return StreamLoader(args.train_data, *inputs, shards_consumed=shards, **options)
    order = Order(
        sources, args.seed, window=args.shuffle_window, replacement=args.dataset_resampled
    )
    options["memory"] = int(args.view_memory * 2**30)
    return Loader(order, sources, *inputs, fetchers=stage.source.fetchers(sources), **options)


def epoch_steps(args: Namespace, sources: Sources | None, global_batch: int) -> int:
    """Optimizer steps of an epoch: its samples, in whole global batches."""
    if sources is None and not args.train_num_samples:
        raise UsageError("--train-num-samples is needed: remote shards can't be counted beforehand")
    if sources is None:
        for flag in (
            *("teacher_cache", "view_memory"),
            *("train_data_upsampling_factors", "dataset_resampled"),
        ):
            if getattr(args, flag):
                raise UsageError(
                    f"--{flag.replace('_', '-')} needs local --train-data, whose samples have "
                    "numbers"
                )
    samples = args.train_num_samples or sources.num_samples
    if samples < global_batch:
        raise UsageError(
            f"an epoch has {samples} samples, less than one global batch of {global_batch}: lower "
            "--batch-size or raise --train-num-samples"
        )
    return samples // global_batch


def held_out(args: Namespace, stage: Stage, world: World):
    """Batches of ``--val-data``, or None."""
    if not args.val_data:
        return None
    return partial(
        sequential,
        index_shards(args.val_data, cache_dir=args.index_dir, flag="--val-data"),
        stage.inputs.eval_views(),
        stage.inputs.tokenizers,
        batch_size=VALIDATION_BATCH,
        rank=world.rank,
        world_size=world.size,
        workers=args.workers,
        start_method=args.worker_start,
    )


def describe(
    directory: RunDirectory, trainer: Trainer, sources: Sources | None, found: Path | None
) -> None:
    """Record the data's fingerprint and say what is about to happen."""
    fingerprint = sources.fingerprint() if sources else stream_fingerprint(trainer.args.train_data)
    before = directory.read_json("data.json", fingerprint)
    if before["hash"] != fingerprint["hash"]:
        raise UsageError(
            f"{directory.path} was trained on other data: {before['samples']} samples with hash "
            f"{before['hash'][:12]}, --train-data has {fingerprint['samples']} with "
            f"{fingerprint['hash'][:12]}"
        )
    directory.write_json("data.json", fingerprint)
    directory.write_json("teachers.json", trainer.stage.taught_by())
    parameters = sum(p.numel() for p in trainer.parameters)
    logging.info(
        "%s | %s on %s | %s samples in %d shards | %d steps of %d | %.1f M parameters train | %s",
        directory.path,
        trainer.args.distill,
        trainer.device.type,
        fingerprint["usable"],
        fingerprint["shards"],
        trainer.total_steps,
        directory.config["global_batch"],
        parameters / 1e6,
        time.strftime("%Y-%m-%d %H:%M"),
    )
    if fingerprint["skipped"]:
        logging.warning("samples that can't be used: %s", fingerprint["skipped"])
    if found:
        logging.info("resumed from %s at step %d", found.name, trainer.progress.step)
