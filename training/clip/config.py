"""What a run of `training.main` is told: one frozen configuration, each field of it a flag.

Everything below takes the narrow part of `Config` that it reads. `training.clip.flags` makes it of
a command line.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from cifd_clip.files import BadFile, read_json
from cifd_clip.methods import DECLARED
from cifd_clip.names import nearby
from training.engine.config import OptimConfig, ProcessConfig, RunConfig
from training.engine.environment import cores
from training.engine.flags import KeyValues, flag
from training.engine.result import decode
from training.engine.run import read_run
from training.errors import UsageError

DISTILL = (*DECLARED, "rdm")
#: R of a bank's RDMs where the command line says nothing: docs/paper.md, "Which rates".
RATES = (10000.0, 3000.0, 1000.0)
MODEL_CONFIG = "open_clip_config.json"  # of an OpenCLIP folder
CACHE_FORMAT = 2
OWN_WEIGHTS = ("local-dir:", "hf-hub:", "hf-text:")  # models that bring their own
#: What begins the names of teachers that embed one modality.
ONE_MODALITY = {"timm:": "image", "hf-text:": "text"}


class Bank(NamedTuple):
    """A bank that ``--rdm-bank`` names."""

    folder: str
    rates: list[float]
    dim: int


def summed_rates(rates: Sequence[float], reduction: str, dim: int) -> list[float]:
    """R of eq. (4), which weighs a sum over T elements, of rates under a ``--rdm-reduction``."""
    return [rate / dim if reduction == "mean" else rate for rate in rates]


def modality_of(name: str) -> str | None:
    """The modality of a teacher that embeds one alone, by its name; None of an OpenCLIP model."""
    return next((m for prefix, m in ONE_MODALITY.items() if name.startswith(prefix)), None)


class TeacherName(NamedTuple):
    """A teacher as the command line names it."""

    model: str
    weights: str | None
    """A tag or a file; None where the model brings its own."""

    @property
    def identity(self) -> dict[str, Any]:
        """What its name says of it, as `cifd_clip.Teacher.identity` has it."""
        modality = modality_of(self.model)
        return {"model": self.model} | ({"modalities": [modality]} if modality else {})


def model_folder(spec: str) -> Path | None:
    """The OpenCLIP folder that a path with or without ``local-dir:`` means; None if there is none.

    A run's is its student.
    """
    path = Path(spec.removeprefix("local-dir:"))
    return next((f for f in (path, path / "student") if (f / MODEL_CONFIG).is_file()), None)


@dataclass(frozen=True)
class MethodConfig:
    """The method, its teachers and their assistants."""

    distill: str = flag(
        "none",
        "clipkd: where to begin (docs/results.md, The map); none: plain CLIP; rdm: stage 1 of "
        "CIFD; cifd: stage 2",
        choices=DISTILL,
    )
    distill_model: str = flag(
        "",
        "teachers: models, runs, folders, timm:NAME, hf-text:FOLDER",
        metavar="NAME|RUN[,...]",
        moves=True,
    )
    distill_pretrained: str = flag(
        "",
        "weights, one per architecture of --distill-model: a tag, a file, a checkpoint or a run",
        metavar="TAG|PATH[,...]",
        moves=True,
    )
    loss_dist_impl: str | None = flag(
        None,
        "taken as OpenCLIP's; features are always gathered, and logits made of some rows at a time",
        choices=("bidir", "shift", "reduce", "gather"),
        free=True,
    )
    distill_precision: str = flag(
        "fp32",
        "of the teachers' weights [bf16 under --precision amp_bf16 on a GPU, else fp32]",
        choices=("fp32", "bf16"),
    )
    teacher_cache: str = flag(
        "",
        "teacher embeddings written by training.cache_teacher",
        metavar="DIR[,DIR]",
        moves=True,
    )
    rates: tuple[float, ...] = flag(
        (),
        "stage 1: one RDM per modality and rate (eq. 4) [10000 3000 1000]; none: no RDM",
        metavar="R",
        nargs="*",
        above=0,
    )
    rdm_reduction: str = flag(
        "sum",
        "what --rates weigh, the squared error's sum or its mean over elements: a mean's R is a "
        "T-th of it in eq. 4, which is what a bank records",
        choices=("mean", "sum"),
    )
    rdm_bank: str = flag(
        "",
        "the frozen bank whose RDMs assist a teacher, its folder or its run, or several teachers' "
        "banks; without it cifd trains one for each first, in RUN/rdm, RUN/rdm1 …",
        metavar="DIR[,DIR]",
        moves=True,
    )
    rdm_epochs: int = flag(7, "epochs of stage 1 when cifd trains its own bank", least=1)
    rdm_hidden: tuple[int, ...] = flag(
        (), "their hidden width, or all three: hidden, bottleneck, hidden [teacher's dim]", least=1
    )
    rdm_channels: int | None = flag(None, "their bottleneck's width [teacher's dim]", least=1)
    options: dict[str, Any] = field(default_factory=dict)
    """The method's own options by name, those that the command line leaves at their defaults too
    (`cifd_clip.methods.DECLARED`)."""

    @property
    def banks(self) -> list[Path]:
        """The banks that the command line names."""
        return [Path(folder) for folder in self.rdm_bank.split(",") if folder]

    @property
    def teachers(self) -> list[TeacherName]:
        """The teachers that the command line names."""
        weights = iter(filter(None, self.distill_pretrained.split(",")))
        return [
            TeacherName(name, None if name.startswith(OWN_WEIGHTS) else next(weights, None))
            for name in filter(None, self.distill_model.split(","))
        ]

    @property
    def caches(self) -> list[Path]:
        """The teachers' caches."""
        return [Path(folder) for folder in filter(None, self.teacher_cache.split(","))]


@dataclass(frozen=True)
class DataConfig:
    """The training data, and how samples are made of them."""

    train_data: str = flag(
        "",
        "WebDataset tars: a directory, a brace or glob pattern; '::' joins sources",
        metavar="SHARDS",
        moves=True,
    )
    train_data_upsampling_factors: str | None = flag(None, "one weight per source", metavar="W::W")
    train_num_samples: int | None = flag(None, "samples per epoch [all]", above=0)
    dataset_resampled: bool = flag(False, "sample with replacement")
    captions: str = flag(
        "first",
        "key.txt, or one of key.json's 'captions' at random",
        choices=("first", "all"),
    )
    caption_keys: dict[str, float] = flag(
        {},
        "in place of --captions: fields with their probabilities, such as txt=0.4 json:syn=0.6",
        nargs="+",
        action=KeyValues,
        metavar="FIELD=P",
    )
    views: int = flag(
        0, "augmentations of an image, taken in turn; 0: a new one each pass", least=0
    )
    view_seed: int = flag(0, "of augmentations and captions [--seed, or the cache's own]")
    image_backend: str = flag(
        "pil",
        "what decodes and resizes training images; pil: OpenCLIP's exact pixels; torch: the same "
        "but for rounding, in half the time; images of over twice the size are read at half theirs "
        "[pil, or the cache's own]",
        choices=("pil", "torch"),
    )
    in_memory: bool = flag(
        False,
        "make every one of --views once and hold all on the device, beside the cache's embeddings: "
        "for data that fit there",
        free=True,
    )
    in_memory_dir: str = flag(
        "",
        "where what --in-memory makes is kept, for other runs on the same data [nowhere]",
        metavar="DIR",
        free=True,
    )
    shuffle_window: int = flag(20000, "samples shuffled together (whole shards)", above=0)
    max_bad_fraction: float = flag(0.01, "stop when more than this share of samples can't be used")
    verify_data: bool = flag(
        False, "compare every shard's bytes with what training.check_data found", free=True
    )
    index_dir: str | None = flag(
        None, "where shard indexes go [beside the shards]", metavar="DIR", free=True
    )
    val_data: str = flag(
        "", "held-out shards: losses and recall every epoch", metavar="SHARDS", moves=True
    )
    val_fraction: float = flag(
        0.0, "hold out this share of the training samples instead, by their keys", least=0, below=1
    )
    val_frequency: int = flag(1, "epochs between validations", least=0, free=True)
    workers: int = flag(min(4, cores()), "loader workers per process", least=0, free=True)
    worker_start: str | None = flag(
        None,
        "start method of the workers [the platform's]",
        choices=("fork", "spawn", "forkserver"),
        free=True,
    )
    aug_cfg: dict[str, Any] = flag(
        {}, "OpenCLIP's AugmentationCfg", nargs="*", action=KeyValues, metavar="KEY=VALUE"
    )


@dataclass(frozen=True)
class ZeroShotConfig:
    """Zero-shot evaluation of the student while it trains."""

    data_root: str = flag(
        "",
        "evaluate checkpoints zero-shot, beside the training: folder of eval.benchmark's data sets",
        metavar="DIR",
        free=True,
    )
    zeroshot_datasets: tuple[str, ...] = flag((), "which of them", metavar="NAME", free=True)
    zeroshot_frequency: int = flag(1, "epochs between evaluations", least=0, free=True)
    zeroshot_samples: int = flag(
        2000, "images of each data set at most, drawn by a fixed seed", least=1, free=True
    )
    zeroshot_device: str = flag("cpu", "where evaluations compute", free=True)


@dataclass(frozen=True)
class StudentConfig:
    """The student's architecture, its initial weights, and what of it trains."""

    model: str = flag("RN50", "any OpenCLIP architecture, or one of --model-config by its stem")
    model_config: tuple[str, ...] = flag(
        (), "OpenCLIP model configs to add", metavar="FILE.json", moves=True
    )
    pretrained: str = flag("", "tag or file of initial weights")
    pretrained_image: bool = flag(False, "ImageNet weights for a timm image tower")
    pretrained_image_path: str = flag("", "the image tower's initial weights", metavar="FILE")
    pretrained_text_path: str = flag("", "the text tower's initial weights", metavar="FILE")
    init_from: str = flag(
        "",
        "a larger model: the student's transformers begin as its first channels and heads, in "
        "evenly spaced layers (TinyCLIP's manual inheritance)",
        metavar="RUN|NAME:TAG",
    )
    force_quick_gelu: bool = flag(False, "QuickGELU in the student")
    force_custom_text: bool = flag(False, "a separate text tower (CustomTextCLIP)")
    force_image_size: tuple[int, ...] | None = flag(
        None, "another size than the config names", least=1
    )
    force_context_length: int | None = flag(None, "another context length", least=1)
    force_embed_dim: int | None = flag(
        None,
        "another width of the embedding; the teacher's: nothing is projected, and all terms are "
        "read in the teacher's space",
        least=1,
    )
    force_patch_dropout: float | None = flag(None, "another patch dropout")
    image_mean: tuple[float, ...] | None = flag(None, nargs=3, metavar="MEAN")
    image_std: tuple[float, ...] | None = flag(None, nargs=3, metavar="STD", above=0)
    image_interpolation: str | None = flag(None, choices=("bicubic", "bilinear", "random"))
    image_resize_mode: str | None = flag(None, choices=("shortest", "longest", "squash"))
    lock_image: bool = flag(False, "freeze the image tower")
    lock_image_unlocked_groups: int = flag(0, "last layer groups left trainable")
    lock_image_freeze_bn_stats: bool = flag(False, "freeze batch statistics too")
    lock_text: bool = flag(False, "freeze the text tower")
    lock_text_unlocked_layers: int = flag(0, "last layers left trainable")
    cache_dir: str | None = flag(None, "where OpenCLIP keeps downloaded weights", free=True)
    grad_checkpointing: bool = flag(False, "recompute activations to save memory")
    torchcompile: bool = flag(False, "compile the towers, the teachers' too")
    custom_blocks: bool | None = flag(
        None,
        "OpenCLIP's custom attention in its own ViT and text towers, the teachers' too [on a GPU]",
        free=True,
    )
    use_bn_sync: bool = flag(False, "batch normalisation over all GPUs")


@dataclass(frozen=True)
class Config(
    *(MethodConfig, DataConfig, ZeroShotConfig, StudentConfig, OptimConfig),
    *(RunConfig, ProcessConfig),
):
    """Everything a run is told, resolved."""


@dataclass(frozen=True)
class CacheConfig(Config):
    """What `training.cache_teacher` is told: a run's flags, and which shards are its own."""

    part: str = flag("1/1", "only every N-th shard", metavar="I/N")
    store_views: bool = flag(
        False,
        "store the views too, in the (first) cache, as JPEGs that the teachers embed: training "
        "reads them instead of the originals",
    )
    view_size: int | None = flag(
        None, "pixels of a stored view's side [the most that student or teachers want]", least=1
    )
    view_quality: int = flag(90, "JPEG quality of a stored view", least=1, below=101)
    code_with: str = flag(
        "",
        "store the bottleneck of this bank's highest rate in the place of the embeddings, "
        "entropy-coded: some tens of times smaller, and read as what the RDM makes of it",
        metavar="DIR",
        moves=True,
    )
    dry_run: bool = flag(False, "only say what there is to do, and what it takes on the disk")

    @property
    def parts(self) -> tuple[int, int]:
        """(I, N), from 1.

        Raises:
            UsageError: ``--part`` is not I/N.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", self.part)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"--part '{self.part}': expected I/N with 1 <= I <= N, such as 1/4")
        return int(match[1]), int(match[2])


@dataclass(frozen=True)
class CalibrationConfig(Config):
    """What `training.calibrate` is told: a run's flags, and how rates are to be found."""

    shares: tuple[float, ...] = flag((), "of the teacher's accuracy, such as 0.95 0.85 0.7")
    bits: tuple[float, ...] = flag(
        (), "in place of --shares: of an embedding, the mean of a teacher's modalities", above=0
    )
    sweep: tuple[float, ...] = flag(
        (10.0, 22.0, 46.0, 100.0, 220.0, 460.0, 1000.0, 2200.0, 4600.0, 10000.0),
        "rates to measure",
        metavar="R",
        above=0,
    )
    steps: int = flag(2000, "of the sweep's training", least=1)
    among: int = flag(1000, "captions an image chooses from", least=1)
    held_out: int = flag(5000, "pairs, at most a fifth of all", least=1)
    samples: int = flag(200_000, "pairs read into memory, at most", least=1)
    out: str = flag("calibration.json", "result", metavar="FILE.json")


def read_cache_config(folder: Path) -> dict[str, Any]:
    """What a teacher cache says of itself: its teacher, views, their seed.

    Raises:
        UsageError: there is no cache.
        BadFile: its ``config.json`` is damaged or of another format.
    """
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"--teacher-cache '{folder}' holds no cache (config.json is missing); write one "
            f"with `python -m training.cache_teacher`{nearby(folder)}"
        )
    return read_json(folder / "config.json", CACHE_FORMAT, teacher=dict, views=int)


def recorded(run: Path) -> Config:
    """The configuration that a run directory's ``config.json`` holds.

    Raises:
        BadFile: it is missing, damaged or of another format.
    """
    values, names = read_run(run), {f.name for f in fields(Config)}
    own = {k: v for k, v in values.items() if k in names}
    options = {k: v for k, v in values.items() if k not in own}
    try:
        return decode(Config, own | {"options": options})
    except ValueError as error:
        raise BadFile(f"{run / 'config.json'} is damaged: {error}") from error
