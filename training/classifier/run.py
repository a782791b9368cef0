"""A run of `training.classify`: train or distil a classifier (eq. 5, 9).

Two stages, one engine: ``--method rdm`` trains a teacher's assistants, ``--method cifd`` a student
under both. Teachers are run directories of earlier runs.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cifd_clip import World
from cifd_clip.artefact import BANK_WEIGHTS
from cifd_clip.classification.methods import PARAPHRASER_WEIGHTS
from cifd_clip.classification.models import NAMES
from cifd_clip.files import file_hash, write_tensors
from cifd_clip.names import did_you_mean
from training.classifier.cifar import Batches, Table, load_cifar100, split_rows
from training.classifier.config import Config, resolve
from training.classifier.imagenet import PhotoBatches, PhotoTable, check_classes, load_photos
from training.classifier.stage import ClassifierStage, EpochLoader, Rows, assemble
from training.classifier.teachers import (
    TeacherRun,
    TeacherTable,
    check_unseen,
    load_teacher,
)
from training.engine import result
from training.engine.checkpoint import Checkpoints
from training.engine.config import ProcessConfig
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
from training.engine.environment import environment
from training.engine.flags import Given, construct
from training.engine.lease import Lease, held
from training.engine.loop import train
from training.engine.metrics import MetricWriter
from training.engine.run import RunDirectory, bank_folder
from training.engine.trainer import Trainer
from training.errors import UsageError

log = logging.getLogger(__name__)

#: Metrics of a model on the parts of the data: ``metrics`` (of the test split), and others.
Measured = dict[str, dict[str, Any] | None]


@dataclass(frozen=True)
class Images:
    """The images of a run, on its device.

    Attributes:
        table: of the training split.
        rows: which of them are trained on.
        held_out: which of them are held out.
        test: those of the test split; None without ``--final``.
    """

    table: Table | PhotoTable
    rows: np.ndarray
    held_out: np.ndarray
    test: Table | PhotoTable | None = None


def start(given: Given, bank: tuple[float, ...] = ()) -> int:
    """Run what a command line gives; the exit code is 0 only when all of it is finished.

    Args:
        given: flags, see `training.classifier.config.parse`.
        bank: what the bank says that they name, see `training.classifier.config.bank_rates`.
    """
    world, device = start_processes(construct(ProcessConfig, given))
    start_logging(world)
    config = resolve(given, world.size, device.type, bank)
    if config.model and config.model not in NAMES:
        near = did_you_mean(config.model, NAMES)
        raise UsageError(f"--model {config.model}: there are {', '.join(NAMES)}{near}")
    path = Path(config.logs) / config.name
    with held(path / "lease.json", world) as lease:
        directory = RunDirectory(config, path)
        finished = world.rank == 0 and directory.finished
        finished = finished and not (config.final and lacks_test(directory))
        finished = all_gather_object(world, finished)[0]
        if finished:
            log.info("%s is finished already", path)
        else:
            with closing(directory):
                finished = run(config, directory, world, device, lease)
    end_processes()
    return 0 if finished else STOPPED_EXIT


def lacks_test(directory: RunDirectory) -> bool:
    """Whether a finished run's results say nothing of the test split: it had no ``--final``."""
    return any(result.read(path).metrics is None for path in directory.path.glob("result*.json"))


def run(
    config: Config,
    directory: RunDirectory,
    world: World,
    device: torch.device,
    lease: Lease | None = None,
) -> bool:
    """One run directory, under its lease, from wherever it is to its end.

    Returns:
        Whether it is finished; False when a signal stopped it with a checkpoint on disk.
    """
    # The images, and who teaches.
    teachers = [load_teacher(place, config.dataset) for place in config.teachers]
    images = open_images(config, device)
    check_teachers(config, teachers, images.table)
    epochs = training_batches(config, images, world)
    # What trains. What teachers say of the views is computed here, and is part of the run's cost.
    clock = time.monotonic(), time.process_time()
    live, source, task = assemble(config, teachers, images.table)
    stage = ClassifierStage(task, source, trained_rates(config), config.ema)
    trainer = Trainer(stage, config, epochs.per_epoch, world, device, config.precision, config.name)
    # Where it goes on.
    checkpoints = Checkpoints(directory.checkpoints, config.keep, lease)
    checkpoint = checkpoints.agreed(world, config.resume) if config.resume else None
    if checkpoint is not None:
        trainer.load(checkpoint[1])
    else:  # a resumed run has counted its teachers' answers already
        saved = source.saved if isinstance(source, TeacherTable) else 0.0  # by an earlier run
        trainer.progress.seconds = time.monotonic() - clock[0]
        trainer.progress.cpu_seconds = time.process_time() - clock[1] + saved
    # Whatever may still be wrong with the command line is found before the directory is taken.
    goes_on = checkpoint and checkpoint[0]
    take = partial(begin, config, directory, trainer, images.table, teachers, goes_on)
    writer = together(world, take, only=0)
    stop = StopFlag(world)
    held_out = Rows(images.table, on(device, images.held_out), stage, world)
    try:
        with Peers(world, checkpoints.busy):
            finished = train(
                trainer,
                EpochLoader(epochs, stage.needs_images),
                config,
                checkpoints if world.rank == 0 else None,
                writer,
                stop,
                held_out if config.holdout else None,
            )
    finally:
        stop.close()
        checkpoints.join()
        if writer is not None:
            writer.close()
    # Evaluations take minutes and look at no flag: a signal ends them, and --resume goes on here.
    if finished:
        stage.source = live
        measured = measure(trainer, images)
        if world.rank == 0:
            finish(config, directory, trainer, measured, images, teachers)
    barrier(world)
    return finished


def open_images(config: Config, device: torch.device) -> Images:
    """The images that a run needs, the test split's among them.

    It is opened before training, which would be lost on one that is missing or of other classes.
    """
    table = load_split(config, "train")
    if config.holdout >= len(table):
        raise UsageError(f"--holdout {config.holdout}: there are {len(table)} training images")
    test = load_test(config, table) if config.final else None
    rows, held_out = split_rows(len(table), config.holdout, config.subset)
    if config.subset:
        needed = np.union1d(rows, held_out)
        table = table.take(needed)
        rows, held_out = np.searchsorted(needed, rows), np.searchsorted(needed, held_out)
    return Images(table.to(device), rows, held_out, None if test is None else test.to(device))


def on(device: torch.device, rows: np.ndarray) -> torch.Tensor:
    """Row numbers on a device."""
    return torch.from_numpy(rows).to(device)


def load_split(config: Config, split: str) -> Table | PhotoTable:
    """The ``train`` or ``test`` images of ``--data``."""
    folder = Path(config.data)
    if config.dataset == "imagenet":
        return load_photos(folder, "val" if split == "test" else split, config.workers)
    return load_cifar100(folder, split)


def load_test(config: Config, table: Table | PhotoTable) -> Table | PhotoTable:
    """The test images, of the same classes as the training images."""
    test = load_split(config, "test")
    if isinstance(test, PhotoTable):
        check_classes(Path(config.data), test, class_names(table), table.classes)
    return test


def class_names(table: Table | PhotoTable) -> list[str] | None:
    """What the classes are called, where the data say so; CIFAR-100's are always the same."""
    named = isinstance(table, PhotoTable) and table.named
    return list(table.class_names) if named else None


def training_batches(config: Config, images: Images, world: World) -> Batches | PhotoBatches:
    """This process's share of each batch of an epoch."""
    table, rows, size = images.table, images.rows, config.global_batch
    if isinstance(table, PhotoTable):
        batches = PhotoBatches(table, rows, config.seed, size, world)
    else:
        batches = Batches(table, rows, config.augment, config.seed, size, world)
    if not batches.per_epoch:
        raise UsageError(
            f"--batch-size {config.batch_size}: a step has {size} images, and there are "
            f"{len(rows)} training images"
        )
    return batches


def trained_rates(config: Config) -> tuple[float, ...]:
    """R of the RDMs that this run trains."""
    return config.rates if config.method == "rdm" else ()


def check_teachers(config: Config, teachers: list[TeacherRun], table: Table | PhotoTable) -> None:
    """Refuse teachers of other classes or images, or that have seen what is held out."""
    for place, teacher in zip(config.teachers, teachers):
        if teacher.model.classes != table.classes:
            raise UsageError(
                f"--teacher {place} tells {teacher.model.classes} classes apart, --data "
                f"{config.data} has {table.classes}"
            )
        if teacher.data is None:
            continue
        if teacher.data != table.hash:
            raise UsageError(
                f"--teacher {place} was trained on other images than --data {config.data}"
            )
        check_unseen(f"--teacher {place}", teacher.holdout, config.holdout)


def begin(
    config: Config,
    directory: RunDirectory,
    trainer: Trainer,
    table: Table | PhotoTable,
    teachers: Sequence[TeacherRun],
    checkpoint: Path | None,
) -> MetricWriter:
    """Take the run's directory and say what is about to happen (rank 0).

    Raises:
        UsageError: other images, teachers or helpers of theirs than those that the run began with.
    """
    bank = bank_folder(Path(config.rdm_bank)) / BANK_WEIGHTS
    paraphraser = Path(config.paraphraser) / "paraphraser" / PARAPHRASER_WEIGHTS
    directory.open(
        {
            "data": table.hash,
            "teacher": [teacher.hash for teacher in teachers],
            "rdm_bank": config.rdm_bank and file_hash(bank),
            "paraphraser": config.paraphraser and file_hash(paraphraser),
        }
    )
    train_images = {"hash": table.hash, "samples": len(table), "classes": class_names(table)}
    directory.write("data.json", {"dataset": config.dataset, "train": train_images})
    how = f"resumed from {checkpoint.name}" if checkpoint else "begins"
    log.info("%s %s at step %d", directory.path, how, trainer.progress.step)
    if config.method == "cifd" and not config.rdm_bank:
        log.warning(
            "--method cifd without --rdm-bank: no RDM assists the teacher; what trains is the "
            "CIFD without RDMs of Table 6"
        )
    return MetricWriter(directory.path, config, directory.config, trainer.progress.step)


def measure(trainer: Trainer, images: Images) -> Measured:
    """What ships on each part of the data; the test split, if any, is looked at here alone."""
    parts = {"train_metrics": (images.table, images.rows)}
    if len(images.held_out):
        parts["holdout_metrics"] = (images.table, images.held_out)
    if images.test is not None:
        parts["metrics"] = (images.test, np.arange(len(images.test)))
    measured: Measured = {"metrics": None, "holdout_metrics": None}
    for name, (table, rows) in parts.items():
        part = Rows(table, on(trainer.device, rows), trainer.stage, trainer.world)
        measured[name] = trainer.validate(part())
    return measured


def finish(
    config: Config,
    directory: RunDirectory,
    trainer: Trainer,
    measured: Measured,
    images: Images,
    teachers: Sequence[TeacherRun],
) -> None:
    """Write what ships, and the results.

    Args:
        config, directory, trainer: of the run.
        measured: see `measure`.
        images: of the run.
        teachers: the runs that taught.
    """
    path, shipped, progress = directory.path, trainer.stage.shipped, trainer.progress
    splits = {"train": images.table} | ({"test": images.test} if images.test is not None else {})
    training = training_record(config, directory, trainer, teachers)

    def write(name: str, measured: Measured, weights: str | None = None, **role: Any) -> None:
        record = result.of_classifier(
            dataset=config.dataset,
            model=config.name,
            training=replace(training, **role),
            measured=measured,
            environment=environment(),
            seed=config.seed,
            weights=weights,
            teachers=tuple(teacher.hash for teacher in teachers),
            data={name: table.hash for name, table in splits.items()},
        )
        result.write(path / name, record)

    if config.method == "rdm":
        weights = path / "bank"
        shipped.bank.save(weights)
        for i, rate in enumerate(config.rates):
            one = {k: m and {n: v[i] for n, v in m.items()} for k, m in measured.items()}
            write(f"result_R{rate:g}.json", one, role="rdm", rate=rate)
    elif config.method == "paraphraser":
        weights = path / "paraphraser"
        shipped.save(weights, teachers[0].identity)
        write("result.json", measured, role="paraphraser")
    else:
        weights = path / "model.safetensors"
        write_tensors(weights, shipped.student.state_dict())
        write("result.json", measured, file_hash(weights))
    directory.finish(progress.state(), weights)
    log.info("finished %s in %.0f s", path, progress.seconds)
    for line in summary(measured):
        log.info("%s", line)


def training_record(
    config: Config, directory: RunDirectory, trainer: Trainer, teachers: Sequence[TeacherRun]
) -> result.Training:
    """How the run trained, for its results."""
    return result.Training(
        method=config.method,
        student=config.model or None,
        teacher=teachers[0].name if teachers else None,
        assistants=tuple(teacher.name for teacher in teachers[1:]),
        rates=config.rates,
        ibm=config.ibm,
        settings={k: v for k, v in directory.config.items() if k not in ("logs", "resume")},
        steps=trainer.total_steps,
        processes=trainer.world.size,
        seconds=trainer.progress.seconds,
        cpu_seconds=trainer.progress.cpu_seconds,
    )


#: What parts of the data are called, in the order in which the summary has them.
PARTS = {"metrics": "test", "holdout_metrics": "held out", "train_metrics": "training images"}


def summary(measured: Measured) -> list[str]:
    """The final metrics for who reads the log; of RDMs, in the order of their rates."""
    lines = [
        f"{name}: {', '.join(_formatted(*metric) for metric in measured[part].items())}"
        for part, name in PARTS.items()
        if measured[part]
    ]
    if measured["metrics"] is None:
        lines.append("test: not looked at; --final --resume latest does so")
    return lines


def _formatted(name: str, value: float | list[float]) -> str:
    values = value if isinstance(value, list) else [value]
    if name.startswith("acc"):
        return f"top-{name[3:]} {' / '.join(f'{100 * v:.2f}' for v in values)} %"
    return f"{name} {' / '.join(f'{v:.4g}' for v in values)}"
