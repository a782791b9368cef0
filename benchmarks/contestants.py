"""Students under every method, ready to take steps: what `step` and `gpu` time."""

import argparse
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip
import torch

from cifd_clip import RDMBank, Teacher, World
from training.clip.flags import parse, resolve
from training.clip.live import LiveTeachers, Transforms
from training.clip.models import add_model_configs, model_config, quiet
from training.clip.stages import StudentStage
from training.data.loader import Batch
from training.engine.trainer import Trainer

RATES = (1000.0, 300.0, 100.0)


def add_flags(parser: argparse.ArgumentParser, teacher: str, student: str) -> None:
    """The flags of a student, its teacher and where they run; larger by default on a GPU.

    Args:
        parser: where to.
        teacher, student: the defaults on a CPU.
    """
    gpu, add = torch.cuda.is_available(), parser.add_argument
    add("--teacher", default="ViT-L-14" if gpu else teacher, help="architecture, random weights")
    add("--student", default="ViT-B-16" if gpu else student, help="architecture")
    add("--model-config", nargs="+", default=[], metavar="FILE.json", help="of other models")
    add("--batch-size", type=int, default=256 if gpu else 16, help="of each process")
    add("--device", default="cuda" if gpu else "cpu", help="cpu or cuda")
    add("--precision", default="amp_bf16" if gpu else "fp32", help="as for training.main")


def common_flags(args: argparse.Namespace) -> list[str]:
    """What all contestants of a command line have in common, as flags of `training.main`."""
    return [
        f"--model={args.student}", f"--batch-size={args.batch_size}", f"--seed={args.seed}",
        f"--device={args.device}", f"--precision={args.precision}", "--warmup=1", "--epochs=1000",
        *(["--model-config", *args.model_config] if args.model_config else []),
    ]  # fmt: skip


def random_teacher(name: str, device: torch.device) -> LiveTeachers:
    """A randomly initialised teacher, drawn on its device: its speed is that of a real one."""
    with quiet(), torch.device(device):
        model = open_clip.create_model(name, device=device)
    teacher = Teacher(model, name, weights="random")
    return LiveTeachers([teacher], [model_config(name, "--teacher")], Transforms())


class Students:
    """Students of one random teacher, under any method.

    Args:
        args: a command line that has `add_flags`'.
        folder: for banks.
        teachers: theirs [made of ``args``].
    """

    def __init__(
        self, args: argparse.Namespace, folder: Path, teachers: LiveTeachers | None = None
    ):
        self.args, self.folder, self.device = args, folder, torch.device(args.device)
        add_model_configs(args.model_config)
        if teachers:
            self.teachers = teachers

    @cached_property
    def teachers(self) -> LiveTeachers:
        """The one teacher, as OpenCLIP builds it: float32 weights, torch's attention."""
        return random_teacher(self.args.teacher, self.device)

    def bank(self, count: int) -> Path:
        """An untrained bank of `count` RDMs of the teacher."""
        folder = self.folder / f"bank{count}"
        if not folder.exists():
            (identity,), (dim,) = self.teachers.identities, self.teachers.dims
            generator = torch.Generator().manual_seed(0)
            RDMBank(identity, list(RATES[:count]), dim, generator=generator).save(folder)
        return folder

    def under(self, method: str, *flags: str, rdms: int = 3, **options: Any) -> "Contestant":
        """A student under a method, with flags of `training.main`, and options of `Contestant`."""
        own = [*common_flags(self.args), f"--distill={method}", *flags]
        if method == "none":
            return Contestant(own, **options)
        own.append("--distill-model=local-dir:-")
        if method == "cifd":
            own.append(f"--rdm-bank={self.bank(rdms)}")
        return Contestant(own, **{"source": self.teachers, **options})


class Remembered:
    """Teachers whose features of the one batch are computed once, as if they came from a cache.

    Of a part of it they are those of the first rows.
    """

    def __init__(self, teachers: LiveTeachers, batch: Batch):
        self.identities, self.dims = teachers.identities, teachers.dims
        self.features = teachers(batch)

    def __call__(self, batch: Batch) -> list:
        n = len(batch)
        return [f._replace(image=f.image[:n], text=f.text[:n]) for f in self.features]


class Contestant:
    """A method's trainer, taking steps on one random batch.

    Args:
        flags: of `training.main`.
        cached: leave the teachers' forward pass out.
        source: teachers of the same images and tokens.
    """

    def __init__(self, flags: list[str], cached: bool = False, source: LiveTeachers | None = None):
        given = parse(["--train-data=-", *flags])
        device = torch.device(given["device"])
        config = resolve(given, device_type=device.type)
        self.stage = StudentStage(config, device, World(), config.banks, source)
        self.stage.task.train()
        self.trainer = Trainer(self.stage, config, 1000, World(), device, config.precision)
        batch = random_batch(self.stage.transforms, config.batch_size, config.seed)
        self.batch = batch.to(device)
        if cached:
            self.stage.source = Remembered(self.stage.source, self.batch)

    def __call__(self) -> None:
        """One step."""
        self.trainer.step(self.batch)


def random_batch(transforms: Transforms, rows: int, seed: int) -> Batch:
    """What the loader would deliver: uint8 images and tokens of captions."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for spec in transforms.specs:
        size = spec.size if isinstance(spec.size, (tuple, list)) else (spec.size, spec.size)
        shape = (rows, 3, *size)
        images.append(torch.randint(256, shape, generator=generator, dtype=torch.uint8))
    captions = [f"a photo of scene number {i}" for i in range(rows)]
    texts = [tokenizer(captions) for tokenizer in transforms.tokenizers]
    index = torch.arange(rows)
    return Batch(images, texts, index, index, captions)
