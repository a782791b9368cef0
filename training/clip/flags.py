"""The command lines of CLIP training, and the configurations that they resolve to.

`parse` reads a command line, before torch is imported; `resolve` makes a frozen `Config` of it and
of what the files it names say.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifd_clip.artefact import read_bank_config
from cifd_clip.methods import DECLARED, Option
from training.clip.checks import (
    check,
    check_captions,
    check_modalities,
    check_teacher_weights,
)
from training.clip.config import (
    RATES,
    Bank,
    CacheConfig,
    CalibrationConfig,
    Config,
    DataConfig,
    MethodConfig,
    StudentConfig,
    ZeroShotConfig,
    model_folder,
    read_cache_config,
    summed_rates,
)
from training.engine import config as engine
from training.engine.config import OptimConfig, ProcessConfig, RunConfig
from training.engine.flags import Given, Parser, add_flags, construct, spelled
from training.engine.run import bank_folder, holds_bank
from training.errors import UsageError

#: OpenCLIP flags that are not taken: why, and which.
UNSUPPORTED = {
    "data are WebDataset tars; img2dataset converts a csv list": (
        "--csv-separator --csv-img-key --csv-caption-key"
    ),
    "zero-shot evaluation is of --data-root": "--imagenet-val --imagenet-v2",
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

GROUPS = (
    ("method", MethodConfig),
    ("data", DataConfig),
    ("zero-shot evaluation while training", ZeroShotConfig),
    ("student", StudentConfig),
    ("optimisation", OptimConfig),
    ("run directory, checkpoints, logs", RunConfig),
    ("processes and precision", ProcessConfig),
)
#: What ``--help`` shows of the flags that training.main and its sisters share.
COMMON = """
distill distill_model distill_pretrained teacher_cache rates rdm_bank
train_data train_num_samples captions caption_keys views val_data val_fraction workers
data_root zeroshot_datasets zeroshot_frequency
model pretrained grad_checkpointing
batch_size global_batch accum_freq epochs lr wd warmup grad_clip_norm seed
logs name resume save_frequency log_every_n_steps report_to
device precision lambda_cl
"""


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
    p.shorten(COMMON)
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
        "is trained on each teacher cache and asked held-out training pairs; no test split is "
        "looked at. Takes the flags of training.main (a recipe serves both). Written: FILE.json "
        "with the curve, and FILE.args for training.main @FILE.args; of a second cache FILE1.json "
        "and FILE1.args.",
        "python -m training.calibrate [@recipe.args] --teacher-cache DIR[,DIR]\n"
        "           (--shares X [X ...] | --bits B [B ...]) [--sweep R R ...] [--steps N]\n"
        "           [--out FILE.json] [flags]",
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
    folders = [bank_folder(Path(f)) for f in given.get("rdm_bank", "").split(",") if f]
    if folders and all(map(holds_bank, folders)):
        read = [(folder, read_bank_config(folder)) for folder in folders]
        said["banks"] = [Bank(str(folder), bank["rates"], bank["dim"]) for folder, bank in read]
    caches = filter(None, given.get("teacher_cache", "").split(","))
    said["caches"] = [read_cache_config(Path(folder)) for folder in caches]
    return said


def resolve(
    given: Given,
    world_size: int = 1,
    device_type: str = "cpu",
    banks: Sequence[Bank] = (),
    caches: Sequence[dict[str, Any]] = (),
) -> Config:
    """The configuration that flags amount to.

    Args:
        given: flags, see `parse`.
        world_size: number of processes.
        device_type: where they compute.
        banks, caches: what files say, see `named_files`.

    Raises:
        UsageError: a flag is missing, out of range, or contradicts another.
    """
    config = construct(Config, resolved(given, world_size, device_type, banks, caches))
    check(config)
    teachers = [cache["teacher"] for cache in caches] or [t.identity for t in config.teachers]
    check_modalities(config, teachers)
    return config


def resolved(
    given: Given,
    world_size: int = 1,
    device_type: str = "cpu",
    banks: Sequence[Bank] = (),
    caches: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Flags, and those that others, files or processes decide about where they are not given.

    Args:
        given, world_size, device_type: see `resolve`.
        banks: those that ``--rdm-bank`` names.
        caches: ``config.json`` of those that ``--teacher-cache`` names.
    """
    values = dict(given)
    distill = given.get("distill", Config.distill)
    model, seed = given.get("model", Config.model), given.get("seed", Config.seed)
    # The teachers' folders and files, the method, its assistants and the views it sees.
    values |= teacher_paths(given)
    values["options"] = method_options(distill, given)
    if not all(rate > 0 for rate in given.get("rates", ())):
        raise UsageError(f"--rates must be positive, got {given['rates']}")
    reduction = given.get("rdm_reduction", Config.rdm_reduction)
    for bank in banks:
        if "rates" in given and summed_rates(given["rates"], reduction, bank.dim) != bank.rates:
            raise UsageError(
                f"--rates {list(given['rates'])}: the bank {bank.folder} has {bank.rates}, and all "
                "of them teach; leave --rates out"
            )
    if banks:
        values["rdm_bank"] = ",".join(bank.folder for bank in banks)
        values["rates"] = [rate for bank in banks for rate in bank.rates]
    elif distill in ("rdm", "cifd"):
        values.setdefault("rates", RATES)
    else:  # recipes are shared among methods
        values["rates"] = ()
    for cache in caches[:1]:
        values["views"] = given.get("views") or cache["views"]
        for name in ("view_seed", "image_backend"):
            values.setdefault(name, cache[name])
    values.setdefault("view_seed", seed)
    if given.get("caption_keys"):
        values["captions"] = given["caption_keys"]
    # The optimizer.
    values |= engine.share_batch(given, Config.batch_size, world_size)
    values["precision"] = engine.default_precision(given, device_type)
    gpu = device_type == "cuda"
    values.setdefault("custom_blocks", gpu)
    half = gpu and values["precision"] == "amp_bf16"
    values.setdefault("distill_precision", "bf16" if half else "fp32")
    vit = "vit" in model.lower()
    values.setdefault("beta2", 0.98 if vit else 0.999)
    values.setdefault("eps", 1e-6 if vit else 1e-8)
    # The run.
    student = "bank" if distill == "rdm" else model.replace("/", "-")
    values.setdefault("name", f"{distill}-{student}-seed{seed}")
    return values


def teacher_paths(given: Given) -> dict[str, str]:
    """``--distill-model`` and ``--distill-pretrained`` with runs as what they ship.

    Raises:
        UsageError: a checkpoint stands where its architecture should.
    """
    values = {}
    if models := given.get("distill_model"):
        names = list(filter(None, models.split(",")))
        for name in names:
            if name.endswith(".pt"):
                raise UsageError(
                    f"--distill-model '{name}': a checkpoint does not say its architecture: name "
                    f"its run, or --distill-model NAME --distill-pretrained {name}"
                )
        folders = map(model_folder, names)
        values["distill_model"] = ",".join(
            f"local-dir:{folder}" if folder else name for name, folder in zip(names, folders)
        )
    if weights := given.get("distill_pretrained"):
        files = ((folder, model_folder(folder)) for folder in filter(None, weights.split(",")))
        values["distill_pretrained"] = ",".join(
            str(folder / "open_clip_model.safetensors") if folder else name
            for name, folder in files
        )
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
    check_captions(config)
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
    if not config.caches:
        raise UsageError("--teacher-cache DIR is needed: the cache of a teacher, or several's")
    if config.shares and config.bits:
        raise UsageError("--shares and --bits both say what is to be kept: give one")
    if not config.bits and not (config.shares and all(0 < share < 1 for share in config.shares)):
        raise UsageError(
            "--shares needs numbers between 0 and 1, such as --shares 0.95 0.85 0.7 (or --bits)"
        )
    if len(config.sweep) < 2:
        raise UsageError("--sweep needs two positive rates or more")
    if not config.out.endswith(".json"):
        raise UsageError(f"--out '{config.out}': expected a name that ends in .json")
    engine.check(config)
    return config


def method_options(distill: str, given: Given) -> dict[str, Any]:
    """A method's own options: those given, and its defaults; other methods' are passed over."""
    if distill not in DECLARED:
        return {}
    names = {option.name for option in DECLARED[distill].options}
    try:
        return DECLARED[distill].resolve({k: v for k, v in given.items() if k in names})
    except ValueError as error:
        raise UsageError(f"--distill {distill}: {error}") from error
