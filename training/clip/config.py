"""What a run of `training.main` is told: flags, and the one configuration that they resolve to.

`parse` reads a command line, before torch is imported; `resolve` makes a frozen `Config` of it and
of what the files it names say. Everything below takes the narrow part of `Config` that it reads.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from cifd_clip.artefact import read_bank_config
from cifd_clip.files import read_json
from cifd_clip.methods import DECLARED, Option
from training.engine import config as engine
from training.engine.config import OptimConfig, ProcessConfig, RunConfig
from training.engine.flags import Given, KeyValues, Parser, add_flags, construct, flag, spelled
from training.engine.run import bank_folder, holds_bank
from training.errors import UsageError

DISTILL = (*DECLARED, "rdm")
#: R of a bank's RDMs where the command line says nothing: docs/paper.md, "Which rates".
RATES = (10000.0, 3000.0, 1000.0)
CACHE_FORMAT = 1
OWN_WEIGHTS = ("local-dir:", "hf-hub:")  # models that bring their own

#: OpenCLIP flags that are not taken: why, and which.
UNSUPPORTED = {
    "data are WebDataset tars; img2dataset converts a csv list": (
        "--csv-separator --csv-img-key --csv-caption-key"
    ),
    "zero-shot evaluation is `python -m eval.benchmark`": (
        "--imagenet-val --imagenet-v2 --zeroshot-frequency"
    ),
    "every sample of --val-data is used once": "--val-num-samples",
    "processes are launched with torchrun or srun": "--horovod",
    "a scripted model can't be cut at the bottleneck": "--torchscript",
    "tracing is for inference": "--trace",
    "environment.json records the commit": "--copy-codebase",
    "sync the run directory with a tool of your cluster": (
        "--remote-sync --remote-sync-frequency --remote-sync-protocol"
    ),
    "CoCa students are not supported": "--coca-caption-loss-weight --coca-contrastive-loss-weight",
    "int8 layers change the student's state_dict": "--use-bnb-linear",
    "the student trains with the softmax losses of the paper's methods": "--siglip",
    "it belongs to SigLIP's loss": "--loss-dist-impl",
    "the newest checkpoint is always kept (see --keep)": "--save-most-recent",
    "use --keep 1": "--delete-previous-checkpoint",
    "use --lr-scheduler const --warmup 0": "--skip-scheduler",
    "rank 0 logs": "--log-local",
    "use the Python debugger or logging's own settings": "--debug",
    "the graph is static already": "--ddp-static-graph",
    "it belongs to timm optimizers; AdamW is supported": "--momentum",
}
#: OpenCLIP flags that say what is always so here.
ALWAYS_ON = ("--local-loss", "--gather-with-grad", "--lock-text-freeze-layer-norm")


class Bank(NamedTuple):
    """The bank that ``--rdm-bank`` names."""

    folder: str
    rates: list[float]


class TeacherName(NamedTuple):
    """A teacher as the command line names it."""

    model: str
    weights: str | None
    """A tag or a file; None where the model brings its own."""


@dataclass(frozen=True)
class MethodConfig:
    """The method, its teachers and their assistants."""

    distill: str = flag(
        "none", "none: plain CLIP; rdm: stage 1 of CIFD (the bank); cifd: stage 2", choices=DISTILL
    )
    distill_model: str = flag("", "teacher architecture(s)", metavar="NAME[,NAME]")
    distill_pretrained: str = flag(
        "",
        "teacher weights, one per --distill-model; none for local-dir: models",
        metavar="TAG|PATH[,...]",
    )
    teacher_cache: str = flag(
        "",
        "teacher embeddings written by training.cache_teacher",
        metavar="DIR[,DIR]",
    )
    rates: tuple[float, ...] = flag(
        (),
        "stage 1: one RDM per modality and rate (eq. 4) [10000 3000 1000]; none: no RDM",
        metavar="R",
        nargs="*",
        above=0,
    )
    rdm_bank: str = flag(
        "",
        "the frozen bank whose RDMs assist the first teacher: its folder or its run; without it "
        "cifd trains one first, in RUN/rdm",
        metavar="DIR",
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
    )
    train_data_upsampling_factors: str | None = flag(None, "one weight per source", metavar="W::W")
    train_num_samples: int | None = flag(None, "samples per epoch [all]", above=0)
    dataset_resampled: bool = flag(False, "sample with replacement")
    captions: str = flag(
        "first",
        "key.txt, or one of key.json's 'captions' at random",
        choices=("first", "all"),
    )
    views: int = flag(
        0, "augmentations of an image, taken in turn; 0: a new one each pass", least=0
    )
    view_seed: int = flag(0, "of augmentations and captions [--seed, or the cache's own]")
    view_memory: float = flag(
        0.0,
        "decoded views that each reading process holds: for small data and --views",
        metavar="GIB",
        least=0,
        free=True,
    )
    shuffle_window: int = flag(20000, "samples shuffled together (whole shards)", above=0)
    max_bad_fraction: float = flag(0.01, "stop when more than this share of samples can't be used")
    index_dir: str | None = flag(
        None, "where shard indexes go [beside the shards]", metavar="DIR", free=True
    )
    val_data: str = flag("", "held-out shards: losses every epoch", metavar="SHARDS")
    val_frequency: int = flag(1, "epochs between validations", least=0, free=True)
    workers: int = flag(4, "loader workers per process", least=0, free=True)
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
class StudentConfig:
    """The student's architecture, its initial weights, and what of it trains."""

    model: str = flag("RN50", "any OpenCLIP architecture, or one of --model-config by its stem")
    model_config: tuple[str, ...] = flag((), "OpenCLIP model configs to add", metavar="FILE.json")
    pretrained: str = flag("", "tag or file of initial weights")
    pretrained_image: bool = flag(False, "ImageNet weights for a timm image tower")
    force_quick_gelu: bool = flag(False, "QuickGELU in the student")
    force_custom_text: bool = flag(False, "a separate text tower (CustomTextCLIP)")
    force_image_size: tuple[int, ...] | None = flag(None, "another size than the config names")
    force_context_length: int | None = flag(None, "another context length")
    force_patch_dropout: float | None = flag(None, "another patch dropout")
    image_mean: tuple[float, ...] | None = flag(None, nargs=3, metavar="MEAN")
    image_std: tuple[float, ...] | None = flag(None, nargs=3, metavar="STD")
    image_interpolation: str | None = flag(None, choices=("bicubic", "bilinear", "random"))
    image_resize_mode: str | None = flag(None, choices=("shortest", "longest", "squash"))
    lock_image: bool = flag(False, "freeze the image tower")
    lock_image_unlocked_groups: int = flag(0, "last layer groups left trainable")
    lock_image_freeze_bn_stats: bool = flag(False, "freeze batch statistics too")
    lock_text: bool = flag(False, "freeze the text tower")
    lock_text_unlocked_layers: int = flag(0, "last layers left trainable")
    cache_dir: str | None = flag(None, "where OpenCLIP keeps downloaded weights", free=True)
    grad_checkpointing: bool = flag(False, "recompute activations to save memory")
    torchcompile: bool = flag(False, "compile the student's towers")
    use_bn_sync: bool = flag(False, "batch normalisation over all GPUs")


@dataclass(frozen=True)
class Config(MethodConfig, DataConfig, StudentConfig, OptimConfig, RunConfig, ProcessConfig):
    """Everything a run is told, resolved."""


@dataclass(frozen=True)
class CacheConfig(Config):
    """What `training.cache_teacher` is told: a run's flags, and which shards are its own."""

    part: str = flag("1/1", "only every N-th shard", metavar="I/N")

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


GROUPS = (
    ("method", MethodConfig),
    ("data", DataConfig),
    ("student", StudentConfig),
    ("optimisation", OptimConfig),
    ("run directory, checkpoints, logs", RunConfig),
    ("processes and precision", ProcessConfig),
)


def parser(
    module: str = "training.main",
    description: str = "Train or distil a CLIP model.",
    usage: str = "python -m training.main [@recipe.args] --train-data SHARDS [flags]",
) -> Parser:
    """The grouped command line of `training.main`, which other commands extend."""
    files = "Flags can come from files: @recipe.args; later flags win."
    p = Parser(module, f"{description} {files}", usage, GROUPS, UNSUPPORTED)
    _add_options(p.add_argument_group("options of the methods"))
    compatible = p.add_argument_group("as OpenCLIP's, without effect")
    for name in ALWAYS_ON:
        compatible.add_argument(name, action="store_true", help="always on")
    compatible.add_argument(
        "--dataset-type", choices=("webdataset", "auto"), help="always webdataset"
    )
    return p


def _add_options(group) -> None:
    """A flag for each option that some method declares, with the methods and their defaults."""
    declared: dict[str, list[tuple[str, Option]]] = {}
    for method in DECLARED.values():
        for option in method.options:
            declared.setdefault(option.name, []).append((method.name, option))
    for name, users in declared.items():
        option = users[0][1]
        by_default: dict[str, list[str]] = {}
        for method, own in users:
            by_default.setdefault(_shown(own.default), []).append(method)
        defaults = "; ".join(
            f"{', '.join(methods)}: {default}" for default, methods in by_default.items()
        )
        group.add_argument(
            spelled(name), help=f"{option.help} [{defaults}]".replace("%", "%%"), **_typed(option)
        )


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, (list, tuple)):
        return " ".join(f"{value:g}" for value in default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def _typed(option: Option) -> dict[str, Any]:
    """argparse's arguments of a method's option, from its default."""
    if isinstance(option.default, bool):
        return {"action": argparse.BooleanOptionalAction}
    if isinstance(option.default, (list, tuple)):
        return {"type": float, "nargs": "+"}
    return {"type": type(option.default), "choices": option.choices}


def parse(argv: Sequence[str]) -> Given:
    """What a command line of `training.main` gives.

    Raises:
        UsageError: a flag is unknown or not supported.
    """
    return parser().given(argv)


def parse_cache(argv: Sequence[str]) -> Given:
    """What a command line of `training.cache_teacher` gives; see `parse`."""
    p = parser(
        "training.cache_teacher",
        "Compute the teachers' embeddings once, one folder per teacher. Takes the flags of "
        "training.main (so a recipe serves both): the data, the teachers, --views, --captions, "
        "--aug-cfg, and --teacher-cache for where to write. Finished shards are skipped.",
        "python -m training.cache_teacher [@recipe.args] --train-data SHARDS --teacher-cache DIR\n"
        "           --views V --distill-model NAME --distill-pretrained TAG_OR_PATH [flags]",
    )
    add_flags(p.add_argument_group("shards"), CacheConfig, besides=Config)
    return p.given(argv)


def parse_calibration(argv: Sequence[str]) -> Given:
    """What a command line of `training.calibrate` gives; see `parse`."""
    p = parser(
        "training.calibrate",
        "Choose the rates R by what their RDMs keep of the teacher: one bank with a sweep of rates "
        "is trained on a teacher cache and asked held-out training pairs; no test split is looked "
        "at. Takes the flags of training.main (a recipe serves both). Written: FILE.json with the "
        "curve, and FILE.args for training.main @FILE.args.",
        "python -m training.calibrate [@recipe.args] --teacher-cache DIR --shares X [X ...]\n"
        "           [--sweep R R ...] [--steps N] [--out FILE.json] [flags]",
    )
    add_flags(p.add_argument_group("calibration"), CalibrationConfig, besides=Config)
    given = p.given(argv)
    given.setdefault("batch_size", 1024)
    return given


def parse_args(argv: Sequence[str]) -> Config:
    """The configuration of a command line, for one process and without a look into any file."""
    return resolve(parse(argv))


def named_files(given: Given) -> dict[str, Any]:
    """What the files that flags name say, as arguments of `resolve`.

    Raises:
        UsageError: ``--teacher-cache`` names no cache.
        BadFile: a file is damaged.
    """
    said: dict[str, Any] = {}
    folder = bank_folder(Path(given.get("rdm_bank", "")))
    if given.get("rdm_bank") and holds_bank(folder):
        said["bank"] = Bank(str(folder), read_bank_config(folder)["rates"])
    if given.get("teacher_cache"):
        said["cache"] = read_cache_config(Path(given["teacher_cache"].split(",")[0]))
    return said


def read_cache_config(folder: Path) -> dict[str, Any]:
    """What a teacher cache says of itself: its teacher, views, their seed.

    Raises:
        UsageError: there is no cache.
        BadFile: its ``config.json`` is damaged or of another format.
    """
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"--teacher-cache '{folder}' holds no cache (config.json is missing); write one "
            "with `python -m training.cache_teacher`"
        )
    return read_json(folder / "config.json", CACHE_FORMAT)


def resolve(
    given: Given,
    world_size: int = 1,
    device_type: str = "cpu",
    bank: Bank | None = None,
    cache: dict[str, Any] | None = None,
) -> Config:
    """The configuration that flags amount to.

    Args:
        given: flags, see `parse`.
        world_size: number of processes.
        device_type: where they compute.
        bank, cache: what files say, see `named_files`.

    Raises:
        UsageError: a flag is missing, out of range, or contradicts another.
    """
    config = construct(Config, resolved(given, world_size, device_type, bank, cache))
    _check(config)
    return config


def resolved(
    given: Given,
    world_size: int = 1,
    device_type: str = "cpu",
    bank: Bank | None = None,
    cache: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Flags, and those that others, files or processes decide about where they are not given.

    Args:
        given, world_size, device_type: see `resolve`.
        bank: the one that ``--rdm-bank`` names.
        cache: ``config.json`` of the (first) cache that ``--teacher-cache`` names.
    """
    values = dict(given)
    distill = given.get("distill", Config.distill)
    model, seed = given.get("model", Config.model), given.get("seed", Config.seed)
    # The method, its assistants and the views it sees.
    values["options"] = method_options(distill, given)
    if not all(rate > 0 for rate in given.get("rates", ())):
        raise UsageError(f"--rates must be positive, got {given['rates']}")
    if bank is not None:
        if list(given.get("rates", bank.rates)) != bank.rates:
            raise UsageError(
                f"--rates {list(given['rates'])}: the bank {bank.folder} has {bank.rates}, and all "
                "of them teach; leave --rates out"
            )
        values |= {"rdm_bank": bank.folder, "rates": bank.rates}
    elif distill in ("rdm", "cifd"):
        values.setdefault("rates", RATES)
    else:  # recipes are shared among methods
        values["rates"] = ()
    if cache is not None:
        values["views"] = given.get("views") or cache["views"]
        values.setdefault("view_seed", cache["view_seed"])
    values.setdefault("view_seed", seed)
    # The optimizer.
    values |= engine.share_batch(given, Config.batch_size, world_size)
    values["precision"] = engine.default_precision(given, device_type)
    vit = "vit" in model.lower()
    values.setdefault("beta2", 0.98 if vit else 0.999)
    values.setdefault("eps", 1e-6 if vit else 1e-8)
    # The run.
    student = "bank" if distill == "rdm" else model.replace("/", "-")
    values.setdefault("name", f"{distill}-{student}-seed{seed}")
    return values


def cache_config(given: Given, device_type: str = "cuda") -> CacheConfig:
    """The configuration of `training.cache_teacher`; see `resolve`."""
    config = construct(CacheConfig, resolved(given, device_type=device_type))
    for name in ("train_data", "distill_model", "teacher_cache"):
        if not getattr(config, name):
            raise UsageError(f"{spelled(name)} is missing")
    check_teacher_weights(config)
    if config.views < 1:
        raise UsageError("--views must be at least 1: how many augmentations of an image to store")
    engine.check(config)
    _ = config.parts
    return config


def calibration_config(given: Given) -> CalibrationConfig:
    """The configuration of `training.calibrate`, one epoch of ``--steps`` steps; see `resolve`."""
    values = resolved(given)
    values["sweep"] = sorted(set(given.get("sweep", CalibrationConfig.sweep)))
    steps = given.get("steps", CalibrationConfig.steps)
    values |= {"epochs": 1, "accum_freq": 1, "batch_size": values["global_batch"]}
    values.setdefault("log_every_n_steps", max(1, steps // 10))
    config = construct(CalibrationConfig, values)
    if len(config.caches) != 1:
        raise UsageError("--teacher-cache DIR is needed: the cache of one teacher")
    if not config.shares or not all(0 < share < 1 for share in config.shares):
        raise UsageError("--shares needs numbers between 0 and 1, such as --shares 0.95 0.85 0.7")
    if len(config.sweep) < 2:
        raise UsageError("--sweep needs two positive rates or more")
    if not config.out.endswith(".json"):
        raise UsageError(f"--out '{config.out}': expected a name that ends in .json")
    engine.check(config)
    return config


def recorded(values: dict[str, Any]) -> Config:
    """The configuration that a run's ``config.json`` holds."""
    names = {f.name for f in fields(Config)}
    own = {k: v for k, v in values.items() if k in names}
    return construct(Config, own | {"options": {k: v for k, v in values.items() if k not in own}})


def method_options(distill: str, given: Given) -> dict[str, Any]:
    """A method's own options: those given, and its defaults; other methods' are passed over."""
    if distill not in DECLARED:
        return {}
    names = {option.name for option in DECLARED[distill].options}
    try:
        return DECLARED[distill].resolve({k: v for k, v in given.items() if k in names})
    except ValueError as error:
        raise UsageError(f"--distill {distill}: {error}") from error


def _check(config: Config) -> None:
    if not config.train_data:
        raise UsageError("--train-data is missing: name a directory or pattern of WebDataset tars")
    engine.check(config)
    _check_teachers(config)
    if len(config.rdm_hidden) not in (0, 1, 3) or (
        len(config.rdm_hidden) == 3 and config.rdm_channels
    ):
        raise UsageError(
            f"--rdm-hidden {' '.join(map(str, config.rdm_hidden))}: expected one width (and "
            "--rdm-channels), or three: hidden, bottleneck, hidden"
        )
    unlocked = config.lock_image_unlocked_groups or config.lock_text_unlocked_layers
    if config.lock_image and config.lock_text and not unlocked:
        raise UsageError("--lock-image and --lock-text leave nothing of the student to train")
    if config.distill == "rdm" and not config.rates:
        raise UsageError("--distill rdm needs at least one rate: --rates 10000 3000 1000")
    if config.rdm_bank and not getattr(DECLARED.get(config.distill), "assistants", False):
        raise UsageError(
            f"--rdm-bank belongs to methods with a teacher, not to --distill {config.distill}"
        )
    if config.use_bn_sync and config.accum_freq > 1:
        raise UsageError(
            "--use-bn-sync with --accum-freq > 1 is not supported: batch statistics of a "
            "micro-batch are not those of the whole batch; use more processes instead"
        )
    if config.view_memory and not config.views:
        raise UsageError("--view-memory holds views that come again: say how many with --views")
    for path in config.model_config:
        if not Path(path).is_file():
            raise UsageError(f"--model-config '{path}': no such file; expected an OpenCLIP JSON")


def _check_teachers(config: Config) -> None:
    names, weights = config.teachers, list(filter(None, config.distill_pretrained.split(",")))
    count = max(len(names), len(config.caches))
    if config.distill == "rdm" and count > 1:
        raise UsageError(f"--distill rdm takes one teacher, got {count}")
    if config.distill == "cifd" and count > 1:
        raise UsageError(f"--distill cifd takes one teacher, got {count}")
    if config.distill == "none":
        if names or weights or config.caches:
            raise UsageError(
                "--distill-model, --distill-pretrained and --teacher-cache name a teacher, but "
                "--distill is none; choose a method, such as --distill cifd"
            )
        return
    if config.caches and config.val_data:
        raise UsageError(
            "--val-data needs the live teacher, --teacher-cache is there to do without: leave one "
            "of them out"
        )
    if config.caches and not weights:
        return  # the cache knows its teacher
    if not names:
        raise UsageError(
            f"--distill {config.distill} needs a teacher: --distill-model NAME and "
            "--distill-pretrained TAG_OR_PATH"
        )
    check_teacher_weights(config)


def check_teacher_weights(config: MethodConfig) -> None:
    """Refuse teachers of ``--distill-model`` without weights, or weights without a teacher."""
    weights = list(filter(None, config.distill_pretrained.split(",")))
    needed = sum(not teacher.model.startswith(OWN_WEIGHTS) for teacher in config.teachers)
    if len(weights) != needed:
        raise UsageError(
            f"--distill-pretrained names {len(weights)} weights, but --distill-model "
            f"'{config.distill_model}' needs {needed} (none for local-dir: models)"
        )
