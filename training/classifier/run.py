"""A run of `training.classify`: train or distil a classifier (eq. 5, 9).

Two stages, one engine: ``--method rdm`` trains a teacher's assistants, ``--method cifd`` a student
under both. Teachers are run directories of earlier runs.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cifd_clip import RDMBank, World
from cifd_clip.classification.methods import Distillation, Paraphraser, RDMTraining, Weights
from cifd_clip.classification.models import NAMES, build
from cifd_clip.files import file_hash, write_tensors
from cifd_clip.noise import derive_seed
from cifd_clip.rdm import unit_scale
from training.classifier.cifar import VIEWS, Batches, Table, load_cifar100, split_rows
from training.classifier.config import Config, resolve
from training.classifier.imagenet import PhotoBatches, PhotoTable, check_classes, load_photos
from training.classifier.stage import (
    ClassifierStage,
    EpochLoader,
    Rows,
    Source,
    check_accumulation,
)
from training.classifier.teachers import (
    EVALUATION_BATCH,
    TeacherNetworks,
    TeacherRun,
    TeacherTable,
    check_unseen,
    load_paraphraser,
    load_rdms,
    load_teacher,
)
from training.engine.checkpoint import Checkpoints
from training.engine.config import ProcessConfig
from training.engine.control import (
    STOPPED_EXIT,
    StopFlag,
    all_gather_object,
    barrier,
    end_processes,
    start_logging,
    start_processes,
)
from training.engine.environment import environment
from training.engine.flags import Given, construct
from training.engine.loop import train
from training.engine.metrics import MetricWriter
from training.engine.run import RunDirectory
from training.engine.trainer import Trainer
from training.errors import UsageError

log = logging.getLogger(__name__)


def start(given: Given) -> int:
    """Run what a command line gives; the exit code is 0 only when all of it is finished."""
    world, device = start_processes(construct(ProcessConfig, given))
    start_logging(world)
    config = resolve(given, world.size, device.type)
    if config.model and config.model not in NAMES:
        raise UsageError(f"--model {config.model}: there are {', '.join(NAMES)}")
    directory = RunDirectory(config)
    finished = directory.finished and not (config.final and lacks_test(directory))
    finished = all_gather_object(world, finished)[0]
    if finished:
        log.info("%s is finished already", directory.path)
    else:
        with closing(directory):
            finished = run(config, directory, world, device)
    end_processes()
    return 0 if finished else STOPPED_EXIT


def lacks_test(directory: RunDirectory) -> bool:
    """Whether a finished run's results say nothing of the test split: it had no ``--final``."""
    results = [directory.read(path.name) for path in directory.path.glob("result*.json")]
    return any(result["metrics"] is None for result in results)


def run(config: Config, directory: RunDirectory, world: World, device: torch.device) -> bool:
    """One run directory from wherever it is to its end.

    Returns:
        Whether it is finished; False when a signal stopped it with a checkpoint on disk.
    """
    # The images, and who teaches.
    teachers = [load_teacher(place, config.dataset) for place in config.teachers]
    table = load_split(config, "train")
    check_teachers(config, teachers, table)
    # Before training, which would be lost on a split that is missing or numbers other classes.
    test = load_test(config, table) if config.final else None
    rows, held_out = split_rows(len(table), config.holdout, config.subset)
    if config.subset:
        needed = np.union1d(rows, held_out)
        table = table.take(needed)
        rows, held_out = np.searchsorted(needed, rows), np.searchsorted(needed, held_out)
    table = table.to(device)
    epochs = training_batches(config, table, rows, world)
    data = describe(config, directory, table)
    # What trains. What teachers say of the views is computed here, and is part of the run's cost.
    clock = time.monotonic(), time.process_time()
    live, source, task = assemble(config, teachers, table)
    stage = ClassifierStage(task, source, trained_rates(config), config.ema)
    trainer = Trainer(stage, config, epochs.per_epoch, world, device, config.precision, config.name)
    # Where it goes on.
    checkpoints = Checkpoints(directory.checkpoints, config.keep)
    checkpoint = checkpoints.agreed(world) if config.resume else None
    if checkpoint is None and directory.finished:
        raise UsageError(
            f"--final: {directory.path} is finished, and there is no checkpoint left to evaluate: "
            "train it again, under another --name"
        )
    if checkpoint is not None:
        trainer.load(checkpoint[1])
    else:  # a resumed run has counted its teachers' answers already
        saved = source.saved if isinstance(source, TeacherTable) else 0.0  # by an earlier run
        trainer.progress.seconds = time.monotonic() - clock[0]
        trainer.progress.cpu_seconds = time.process_time() - clock[1] + saved
    barrier(world)  # everyone has seen the directory as it was
    # Whatever may still be wrong with the command line is found before the directory is taken.
    writer = None
    if world.rank == 0:
        directory.open()
        directory.write("data.json", data)
        writer = MetricWriter(directory.path, config, directory.config, trainer.progress.step)
        begin = f"resumed from {checkpoint[0].name}" if checkpoint else "begins"
        log.info("%s %s at step %d", directory.path, begin, trainer.progress.step)
    stop = StopFlag(world)
    held = torch.from_numpy(held_out).to(device)
    validation = Rows(table, held, stage, world) if config.holdout else None
    rank0 = checkpoints if world.rank == 0 else None
    try:
        loader = EpochLoader(epochs, stage.needs_images)
        finished = train(trainer, loader, config, rank0, writer, stop, validation)
    finally:
        stop.close()
        checkpoints.join()
        if writer is not None:
            writer.close()
    # Evaluations take minutes and look at no flag: a signal ends them, and --resume goes on here.
    if finished:
        stage.source = live
        parts = {"train_metrics": (table, rows)}
        parts |= {"holdout_metrics": (table, held_out)} if config.holdout else {}
        parts |= {"metrics": (test.to(device), np.arange(len(test)))} if test is not None else {}
        measured = {"metrics": None, "holdout_metrics": None} | {
            name: trainer.validate(Rows(images, torch.from_numpy(of).to(device), stage, world)())
            for name, (images, of) in parts.items()
        }
        if world.rank == 0:
            hashes = {"train": table.hash} | ({"test": test.hash} if test is not None else {})
            finish(config, directory, trainer, live, measured, hashes, teachers)
    barrier(world)
    return finished


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


def training_batches(
    config: Config, table: Table | PhotoTable, rows: np.ndarray, world: World
) -> Batches | PhotoBatches:
    """This process's share of each batch of an epoch."""
    if isinstance(table, PhotoTable):
        batches = PhotoBatches(table, rows, config.seed, config.global_batch, world)
    else:
        batches = Batches(table, rows, config.augment, config.seed, config.global_batch, world)
    if not batches.per_epoch:
        raise UsageError(
            f"--batch-size {config.batch_size}: a step has {config.global_batch} images, and there "
            f"are {len(rows)} training images"
        )
    return batches


def trained_rates(config: Config) -> tuple[float, ...]:
    """R of the RDMs that this run trains."""
    return config.rates if config.method == "rdm" else ()


def assemble(
    config: Config, teachers: list[TeacherRun], table: Table | PhotoTable
) -> tuple[TeacherNetworks | None, Source | None, nn.Module]:
    """The teachers, live and as training reads them, and what trains."""
    device = table.labels.device
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "init"))
    live, source = assemble_teachers(config, teachers, table)
    weights = Weights(
        ce=config.lambda_ce,
        kl=config.lambda_kl,
        embedding=config.lambda_emb,
        information=config.lambda_i,
        factor=config.lambda_ft,
        tau=config.tau,
        kd_dropout=config.kd_dropout,
        label_smoothing=config.label_smoothing,
        embedding_loss=config.embedding_loss,
    )
    task: nn.Module
    if config.method in ("rdm", "paraphraser"):
        width = teachers[0].model.width
        scale = unit_scale(some_embeddings(source, table))
        if config.method == "paraphraser":
            task = Paraphraser(width, config.factors or width // 2, scale, generator)
        else:
            bank = RDMBank(
                teachers[0].identity,
                config.rates,
                width,
                config.rdm_hidden or None,
                classes=table.classes,
                form=config.rdm_form,
                scale=scale,
                generator=generator,
            )
            task = RDMTraining(bank, weights)
    else:
        student = build(config.model, table.classes, table.side, generator)
        paraphraser = None
        if config.method == "ft":
            paraphraser = load_paraphraser(Path(config.paraphraser), teachers[0], config.holdout)
        dims = live.dims if live else []
        task = Distillation(student, dims, weights, config.ibm, paraphraser, generator)
    check_accumulation(config.accum_freq, config.model, task)
    return live, source, task.to(device, memory_format=torch.channels_last)


def assemble_teachers(
    config: Config, teachers: list[TeacherRun], table: Table | PhotoTable
) -> tuple[TeacherNetworks | None, Source | None]:
    """The teachers with their assistants, live and as training reads them."""
    rdms = None
    selected: list[int] = []
    if config.rdm_bank:
        rdms = load_rdms(Path(config.rdm_bank), teachers[0], config.holdout)
        selected = selected_rdms(config, rdms)
    if not teachers:
        return None, None
    teaching = teachers[-1:] if config.method == "takd" else teachers
    lambdas = list(config.lambda_n) * (len(selected) if len(config.lambda_n) == 1 else 1)
    if len(lambdas) != len(selected):
        raise UsageError(f"--lambda-n has {len(lambdas)} values for {len(selected)} assistants")
    embeddings = config.method in ("ft", "rdm", "paraphraser") or config.lambda_emb > 0
    live = TeacherNetworks([t.model for t in teaching], rdms, selected, lambdas, embeddings).to(
        table.labels.device, memory_format=torch.channels_last
    )
    if isinstance(table, Table) and VIEWS[config.augment]:
        hashes = [t.hash for t in teaching]
        folder = Path(config.teacher_cache) if config.teacher_cache else None
        return live, TeacherTable(live, table, config.augment, hashes, folder)
    if config.teacher_cache:
        raise UsageError(
            "--teacher-cache keeps what teachers say about each view, and there are too many "
            "views: expected CIFAR-100 with --augment none or flip"
        )
    return live, live


def selected_rdms(config: Config, rdms: RDMBank) -> list[int]:
    """Which of a bank's RDMs teach."""
    missing = [r for r in config.rates if r not in rdms.rates]
    if missing:
        there = ", ".join(f"{rate:g}" for rate in rdms.rates)
        raise UsageError(f"--rates {missing[0]:g}: the bank {config.rdm_bank} has {there}")
    return [rdms.rates.index(r) for r in config.rates or rdms.rates]


def some_embeddings(source: Source, table: Table | PhotoTable) -> Tensor:
    """The first teacher's embeddings of the images, or of some hundred, which tell their scale."""
    if isinstance(source, TeacherTable):
        return source.embedding
    rows = torch.from_numpy(split_rows(len(table), min(EVALUATION_BATCH, len(table)))[1])
    return source(next(table.in_order(rows.to(table.labels.device), len(rows))))[0].embedding


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


def describe(config: Config, directory: RunDirectory, table: Table | PhotoTable) -> dict[str, Any]:
    """Which images these are, for ``data.json``; refuse others than a run began with."""
    train_images = {"hash": table.hash, "samples": len(table), "classes": class_names(table)}
    before = directory.read("data.json", {"train": train_images})["train"]
    if before["hash"] != train_images["hash"]:
        raise UsageError(f"{directory.path} was trained on other images than --data {config.data}")
    return {"dataset": config.dataset, "train": train_images}


def finish(
    config: Config,
    directory: RunDirectory,
    trainer: Trainer,
    live: TeacherNetworks | None,
    measured: dict[str, dict[str, Any] | None],
    data: dict[str, str],
    teachers: Sequence[TeacherRun],
) -> None:
    """Write what ships, and the results.

    Args:
        config, directory, trainer: of the run.
        live: the teachers.
        measured: metrics on the training, held-out and test images.
        data: hashes of the splits.
        teachers: the runs that taught.
    """
    path, shipped, progress = directory.path, trainer.stage.shipped, trainer.progress
    assistants = live is not None and live.rdms is not None
    result = {
        "task": "classification",
        "dataset": config.dataset,
        "teacher": teachers[0].name if teachers else None,
        "assistants": [t.name for t in teachers[1:]],
        "student": config.model or None,
        "method": config.method,
        "rates": [live.rdms.rates[i] for i in live.selected] if assistants else list(config.rates),
        "ibm": config.ibm,
        "seed": config.seed,
        "provenance": {
            "environment": environment(),
            "settings": {k: v for k, v in directory.config.items() if k not in ("logs", "resume")},
            "teachers": [t.hash for t in teachers],
            "data": data,
            "steps": trainer.total_steps,
            "processes": trainer.world.size,
            "seconds": progress.seconds,
            "cpu_seconds": progress.cpu_seconds,
        },
    }
    if config.method == "rdm":
        shipped.bank.save(path / "bank")
        for i, rate in enumerate(config.rates):
            one = {k: m and {n: v[i] for n, v in m.items()} for k, m in measured.items()}
            entry = {**result, **one, "role": "rdm", "rate": rate}
            directory.write(f"result_R{rate:g}.json", entry)
    elif config.method == "paraphraser":
        shipped.save(path / "paraphraser", teachers[0].identity)
        directory.write("result.json", {**result, **measured, "role": "paraphraser"})
    else:
        write_tensors(path / "model.safetensors", shipped.student.state_dict())
        result["provenance"]["weights"] = file_hash(path / "model.safetensors")
        directory.write("result.json", {**result, **measured})
    directory.write("finished.json", progress.state())
    log.info("finished %s in %.0f s", path, progress.seconds)
    for line in summary(measured):
        log.info("%s", line)


#: What parts of the data are called, in the order in which the summary has them.
PARTS = {"metrics": "test", "holdout_metrics": "held out", "train_metrics": "training images"}


def summary(measured: dict[str, dict | None]) -> list[str]:
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
