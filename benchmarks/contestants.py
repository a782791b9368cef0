"""Students under every method, ready to take steps: what `step`, `scaling` and `cache` time."""

import argparse
from pathlib import Path

import torch

from cifd_clip import RDMBank, World
from training.clip.config import Config
from training.clip.flags import parse, parse_args, resolve
from training.clip.live import LiveTeachers, Transforms
from training.clip.models import add_model_configs, build_student, save_student, student_config
from training.clip.stages import StudentStage, make_teachers
from training.data.loader import Batch
from training.engine.trainer import Trainer

RATES = (1000.0, 300.0, 100.0)


def add_flags(
    parser: argparse.ArgumentParser, teacher: str, student: str, gpu: bool | None = None
) -> None:
    """The flags of a student, its teacher and where they run; larger by default on a GPU.

    Args:
        parser: where to.
        teacher, student: the defaults on a CPU.
        gpu: whether it runs on one; None: where there is one.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    add = parser.add_argument
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


def random_teacher(args: argparse.Namespace, folder: Path) -> str:
    """A randomly initialised teacher as a ``local-dir:`` model: its speed is that of a real one."""
    add_model_configs(args.model_config)
    config = parse_args(["--train-data=-", f"--model={args.teacher}", f"--seed={args.seed}"])
    save_student(build_student(config, config.seed), student_config(config), folder / "teacher")
    return f"local-dir:{folder / 'teacher'}"


def configuration(flags: list[str]) -> Config:
    """Flags of `training.main` with the defaults of the device that they name."""
    given = parse(["--train-data=-", *flags])
    return resolve(given, device_type=torch.device(given.get("device", "cpu")).type)


def teachers(flags: list[str]) -> LiveTeachers:
    """The teachers that flags name: to be built once, and shared."""
    config = configuration(flags)
    transforms = Transforms(config.aug_cfg, config.image_backend)
    return make_teachers(config, torch.device(config.device), transforms)


def untrained_bank(source: LiveTeachers, count: int, folder: Path) -> Path:
    """A bank of `count` RDMs for the first teacher."""
    generator = torch.Generator().manual_seed(0)
    identity, dim = source.identities[0], source.dims[0]
    RDMBank(identity, list(RATES[:count]), dim, generator=generator).save(folder)
    return folder


class Remembered:
    """Teachers whose features of the one batch are computed once, as if they came from a cache."""

    def __init__(self, teachers: LiveTeachers, batch: Batch):
        self.identities, self.dims = teachers.identities, teachers.dims
        self.features = teachers(batch)

    def __call__(self, batch: Batch) -> list:
        return list(self.features)


class Contestant:
    """A method's trainer, taking steps on one random batch.

    Args:
        flags: of `training.main`.
        world: this process's place.
        cached: leave the teachers' forward pass out.
        source: teachers of the same images and tokens [those that the flags name].
    """

    def __init__(
        self,
        flags: list[str],
        world: World | None = None,
        cached: bool = False,
        source: LiveTeachers | None = None,
    ):
        world, config = world or World(), configuration(flags)
        add_model_configs(config.model_config)
        device = torch.device(config.device)
        self.stage = StudentStage(config, device, world, config.banks, source)
        self.stage.task.train()
        self.trainer = Trainer(self.stage, config, 1000, world, device, config.precision)
        seed = config.seed + world.rank
        self.batch = random_batch(self.stage.transforms, config.batch_size, seed)
        self.batch = self.batch.to(device)
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
