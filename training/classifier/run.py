"""``python -m training.classify``: train or distil a classifier, with supervised CIFD (eq. 5, 9).

Two stages, one loop: ``--method rdm`` trains a teacher's assistants, ``--method cifd`` a student
under both. Teachers are run directories of earlier runs. Under torchrun or srun the processes share
each batch.
"""

import logging
import time
from argparse import Namespace
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cifd_clip import World
from cifd_clip.classification.methods import (
    Distillation,
    Paraphraser,
    RDMTraining,
    Weights,
)
from cifd_clip.classification.models import build
from cifd_clip.noise import derive_seed
from cifd_clip.rdm import RateDistortionModules, RDMBank, unit_scale
from training.classifier.cifar import (
    VIEWS,
    Batches,
    Table,
    load_cifar100,
    split_rows,
)
from training.classifier.flags import parse_args, parser, run_config
from training.classifier.imagenet import PhotoBatches, PhotoTable, check_classes, load_photos
from training.classifier.teachers import (
    EVALUATION_BATCH,
    CachedTeachers,
    LiveTeachers,
    Teacher,
    check_unseen,
    load_paraphraser,
    load_rdms,
    load_teacher,
    save_weights,
)
from training.classifier.trainer import Source, Trainer, evaluate, train
from training.clip.cache import file_hash
from training.engine.checkpoint import Checkpoints
from training.engine.control import (
    STOPPED_EXIT,
    StopFlag,
    gathered,
    log_level,
    start_processes,
    wait_for_all,
)
from training.engine.metrics import Sinks
from training.engine.run import RunDirectory, environment
from training.errors import UsageError

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Run what the command line says; the exit code is 0 only when all of it is finished."""
    args = parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU on this machine")
    world, device = start_processes(args)
    logging.basicConfig(
        level=log_level(world), format="%(asctime)s | %(message)s", datefmt="%H:%M:%S", force=True
    )
    check_share(args.batch_size, world)
    path = Path(args.logs) / args.name
    directory = RunDirectory(path, run_config(args), parser(), args.resume == "latest")
    done = directory.finished and not (args.final and lacks_test(directory))
    done = gathered(world, done)[0]
    if done:
        log.info("%s is finished already", directory.path)
    else:
        with closing(directory):
            done = run(args, directory, world, device)
    if dist.is_initialized():  # after a failure it would wait for the others: see `cli`
        dist.destroy_process_group()
    return 0 if done else STOPPED_EXIT


def check_share(batch_size: int, world: World) -> None:
    """Refuse a batch that the processes can't share evenly."""
    if batch_size % world.size:
        raise UsageError(
            f"--batch-size {batch_size} can't be shared evenly by {world.size} processes"
        )


def lacks_test(directory: RunDirectory) -> bool:
    """Whether a finished run's results say nothing of the test split: it had no ``--final``."""
    results = [directory.read_json(path.name) for path in directory.path.glob("result*.json")]
    return any(result["metrics"] is None for result in results)


def run(args: Namespace, directory: RunDirectory, world: World, device: torch.device) -> bool:
    """One run directory from wherever it is to its end.

    Returns:
        Whether it is finished; False when a signal stopped it with a checkpoint on disk.
    """
    teachers = [load_teacher(place, args.dataset) for place in args.teacher]
    table = load_split(args, "train")
    _check_teachers(args, teachers, table)
    # Before training, which would be lost on a split that is missing or numbers other classes.
    test = _load_test(args, table) if args.final else None
    rows, held_out = split_rows(len(table), args.holdout, args.subset)
    if args.subset:
        needed = np.union1d(rows, held_out)
        table = table.take(needed)
        rows, held_out = np.searchsorted(needed, rows), np.searchsorted(needed, held_out)
    table = table.to(device)
    if isinstance(table, PhotoTable):
        batches = PhotoBatches(table, rows, args.seed, args.batch_size, world)
    else:
        batches = Batches(table, rows, args.augment, args.seed, args.batch_size, world)
    if not batches.per_epoch:
        raise UsageError(f"--batch-size {args.batch_size}: there are {len(rows)} training images")

    data = _described(args, directory, table)
    start = (time.monotonic(), time.process_time())
    live, source, task = assemble(args, teachers, table)
    trainer = Trainer(args, task, batches.per_epoch, world, device)
    checkpoints = Checkpoints(directory.checkpoints, args.keep)
    found = checkpoints.agreed(world) if args.resume else None
    if found is None and directory.finished:
        raise UsageError(
            f"--final: {directory.path} is finished, and there is no checkpoint left to evaluate: "
            "train it again, under another --name"
        )
    if found is not None:
        trainer.load(found[1])
    else:  # a resumed run has counted its teachers' answers already
        trainer.seconds = time.monotonic() - start[0]
        trainer.cpu_seconds = time.process_time() - start[1]
        if isinstance(source, CachedTeachers):  # what the run costs by itself
            trainer.cpu_seconds += source.saved
    wait_for_all(world)  # everyone has seen the directory as it was
    # Whatever may still be wrong with the command line is found before the directory is taken.
    if world.rank == 0:
        directory.open()
        directory.write_json("data.json", data)
    if found is not None:
        log.info("resumed from %s at step %d", found[0].name, trainer.step_number)
    sinks = Sinks(directory.path, step=trainer.step_number) if world.rank == 0 else None
    stop = StopFlag(world)
    validation = (table, torch.from_numpy(held_out).to(device)) if args.holdout else None
    try:
        done = train(trainer, batches, source, validation, checkpoints, sinks, stop)
    finally:
        stop.close()
        checkpoints.join()
        if sinks is not None:
            sinks.close()
    # Evaluations take minutes and look at no flag: a signal ends them, and --resume goes on here.
    if done:
        finish(args, directory, trainer, live, table, rows, held_out, test, teachers)
    wait_for_all(world)
    return done


def load_split(args: Namespace, split: str) -> Table | PhotoTable:
    """The ``train`` or ``test`` images of ``--data``."""
    if args.dataset == "imagenet":
        return load_photos(args.data, "val" if split == "test" else split, args.workers)
    return load_cifar100(args.data, split)


def _load_test(args: Namespace, table: Table | PhotoTable) -> Table | PhotoTable:
    test = load_split(args, "test")
    if isinstance(test, PhotoTable):
        check_classes(args.data, test, _class_names(table), table.classes)
    return test


def _class_names(table: Table | PhotoTable) -> list[str] | None:
    """What the classes are called, where the data say so; CIFAR-100's are always the same."""
    named = isinstance(table, PhotoTable) and table.named
    return list(table.class_names) if named else None


def assemble(
    args: Namespace, teachers: list[Teacher], table: Table
) -> tuple[LiveTeachers | None, Source | None, nn.Module]:
    """The teachers, live and as training reads them, and what trains."""
    device = table.labels.device
    generator = torch.Generator().manual_seed(derive_seed(args.seed, "init"))
    live = source = None
    rdms, picked = None, []
    if args.rdm_bank:
        rdms = load_rdms(Path(args.rdm_bank), teachers[0], args.holdout)
        picked = _picked(args, rdms)
    if teachers:
        chosen = teachers[-1:] if args.method == "takd" else teachers
        lambdas = args.lambda_n * len(picked) if len(args.lambda_n) == 1 else args.lambda_n
        if len(lambdas) != len(picked):
            raise UsageError(f"--lambda-n has {len(lambdas)} values for {len(picked)} assistants")
        wanted = args.method in ("ft", "rdm", "paraphraser") or args.lambda_emb > 0
        live = LiveTeachers([t.model for t in chosen], rdms, picked, lambdas, wanted).to(
            device, memory_format=torch.channels_last
        )
        source = live
        if isinstance(table, Table) and VIEWS[args.augment]:
            hashes = [t.hash for t in chosen]
            source = CachedTeachers(live, table, args.augment, hashes, args.teacher_cache)
        elif args.teacher_cache:
            raise UsageError(
                "--teacher-cache keeps what teachers say about each view, and there are too many "
                "views: expected CIFAR-100 with --augment none or flip"
            )
    weights = Weights(
        ce=args.lambda_ce,
        kl=args.lambda_kl,
        embedding=args.lambda_emb,
        information=args.lambda_i,
        factor=args.lambda_ft,
        tau=args.tau,
        kd_dropout=args.kd_dropout,
        label_smoothing=args.label_smoothing,
        embedding_loss=args.embedding_loss,
    )
    if args.method in ("rdm", "paraphraser"):
        width = teachers[0].model.width
        scale = unit_scale(_embeddings(source, table))
        if args.method == "paraphraser":
            task = Paraphraser(width, args.factors or width // 2, scale, generator)
        else:
            bank = RDMBank(
                teachers[0].identity, args.rates, width, args.rdm_hidden, classes=table.classes,
                form=args.rdm_form, scale=scale, generator=generator,
            )  # fmt: skip
            task = RDMTraining(bank, weights)
    else:
        student = build(args.model, table.classes, table.side, generator)
        paraphraser = None
        if args.method == "ft":
            paraphraser = load_paraphraser(Path(args.paraphraser), teachers[0], args.holdout)
        dims = live.dims if live else []
        task = Distillation(student, dims, weights, args.ibm, paraphraser, generator)
    return live, source, task.to(device, memory_format=torch.channels_last)


def _picked(args: Namespace, rdms: RateDistortionModules) -> list[int]:
    missing = [r for r in args.rates or [] if r not in rdms.rates]
    if missing:
        there = ", ".join(f"{rate:g}" for rate in rdms.rates)
        raise UsageError(f"--rates {missing[0]:g}: the bank {args.rdm_bank} has {there}")
    return [rdms.rates.index(r) for r in args.rates or rdms.rates]


def _embeddings(source: Source, table: Table | PhotoTable) -> Tensor:
    if isinstance(source, CachedTeachers):
        return source.embedding
    # A live teacher: some hundred images tell the scale.
    rows = torch.from_numpy(split_rows(len(table), min(EVALUATION_BATCH, len(table)))[1])
    return source(next(table.in_order(rows.to(table.labels.device), len(rows))))[0].embedding


def _check_teachers(args: Namespace, teachers: list[Teacher], table: Table | PhotoTable) -> None:
    for path, teacher in zip(args.teacher, teachers):
        if teacher.model.classes != table.classes:
            raise UsageError(
                f"--teacher {path} tells {teacher.model.classes} classes apart, --data {args.data} "
                f"has {table.classes}"
            )
        if teacher.data is None:
            continue
        if teacher.data != table.hash:
            raise UsageError(
                f"--teacher {path} was trained on other images than --data {args.data}"
            )
        check_unseen(f"--teacher {path}", teacher.holdout, args.holdout)


def _described(
    args: Namespace, directory: RunDirectory, table: Table | PhotoTable
) -> dict[str, Any]:
    """Which images these are, for ``data.json``; refuse others than a run began with."""
    train = {"hash": table.hash, "samples": len(table), "classes": _class_names(table)}
    before = directory.read_json("data.json", {"train": train})["train"]
    if before["hash"] != train["hash"]:
        raise UsageError(f"{directory.path} was trained on other images than --data {args.data}")
    return {"dataset": args.dataset, "train": train}


def finish(
    args: Namespace,
    directory: RunDirectory,
    trainer: Trainer,
    live: LiveTeachers | None,
    table: Table | PhotoTable,
    rows,
    held_out,
    test: Table | PhotoTable | None,
    teachers: list[Teacher],
) -> None:
    """Write what ships and the results; the test split, if any, is looked at here alone."""
    task, path, world = trainer.task, directory.path, trainer.world
    parts = {"train_metrics": (table, torch.from_numpy(rows).to(trainer.device))}
    if args.holdout:
        parts["holdout_metrics"] = (table, torch.from_numpy(held_out).to(trainer.device))
    data = {"train": table.hash}
    if test is not None:
        test = test.to(trainer.device)
        parts["metrics"] = (test, torch.arange(len(test), device=trainer.device))
        data["test"] = test.hash
    measured = {"metrics": None, "holdout_metrics": None}
    measured |= {name: evaluate(task, *part, live, world) for name, part in parts.items()}
    if world.rank:
        return
    rates = args.rates or []
    if live is not None and live.rdms is not None:
        rates = [live.rdms.rates[i] for i in live.picked]
    result = {
        "task": "classification",
        "dataset": args.dataset,
        "teacher": teachers[0].name if teachers else None,
        "assistants": [t.name for t in teachers[1:]],
        "student": args.model,
        "method": args.method,
        "rates": rates,
        "ibm": args.ibm,
        "seed": args.seed,
        "provenance": {
            "environment": environment(),
            "settings": {k: v for k, v in directory.config.items() if k not in ("logs", "resume")},
            "teachers": [t.hash for t in teachers],
            "data": data,
            "steps": trainer.total,
            "processes": world.size,
            "seconds": trainer.seconds,
            "cpu_seconds": trainer.cpu_seconds,
        },
    }
    if args.method == "rdm":
        task.bank.save(path / "bank")
        for i, rate in enumerate(args.rates):
            one = {k: m and {n: v[i] for n, v in m.items()} for k, m in measured.items()}
            entry = {**result, **one, "role": "rdm", "rate": rate}
            directory.write_json(f"result_R{rate:g}.json", entry)
    elif args.method == "paraphraser":
        task.save(path / "paraphraser", teachers[0].identity)
        directory.write_json("result.json", {**result, **measured, "role": "paraphraser"})
    else:
        save_weights(path, "model", task.student)
        result["provenance"]["weights"] = file_hash(path / "model.safetensors")
        directory.write_json("result.json", {**result, **measured})
    directory.write_json("finished.json", {"step": trainer.total, "seconds": trainer.seconds})
    log.info("finished %s in %.0f s", path, trainer.seconds)
    for line in told(measured):
        log.info("%s", line)


#: What parts of the data are called, in the order they are told in.
PARTS = {"metrics": "test", "holdout_metrics": "held out", "train_metrics": "training images"}


def told(measured: dict[str, dict | None]) -> list[str]:
    """The final metrics for who reads the log; of RDMs, in the order of their rates."""
    lines = [
        f"{name}: {', '.join(_spoken(*metric) for metric in measured[part].items())}"
        for part, name in PARTS.items()
        if measured[part]
    ]
    if measured["metrics"] is None:
        lines.append("test: not looked at; --final --resume latest does so")
    return lines


def _spoken(name: str, value: float | list[float]) -> str:
    values = value if isinstance(value, list) else [value]
    if name.startswith("acc"):
        return f"top-{name[3:]} {' / '.join(f'{100 * v:.2f}' for v in values)} %"
    return f"{name} {' / '.join(f'{v:.4g}' for v in values)}"
