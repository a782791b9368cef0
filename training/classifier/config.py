"""What a run of `training.classify` is told; see `training.clip.config`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cifd_clip.artefact import read_bank_config
from training.engine import config as engine
from training.engine.config import PRECISIONS, OptimConfig, ProcessConfig, RunConfig
from training.engine.environment import cores
from training.engine.flags import Given, Parser, construct, flag, spelled
from training.engine.run import bank_folder, holds_bank
from training.errors import UsageError

METHODS = ("none", "kd", "takd", "dgkd", "ft", "cifd", "rdm", "paraphraser")
STAGE1 = ("rdm", "paraphraser")
FORMS = ("classify", "reconstruct")
AUGMENTATIONS = ("none", "flip", "crop")
STUDENTS = ("none", "kd", "takd", "dgkd", "ft", "cifd")
#: Former flags, and what to write instead.
FORMER = {
    "write --lr-scheduler": "--lr-schedule",
}


def only(*methods: str) -> dict[str, tuple[str, ...]]:
    """Metadata of a flag that belongs to some methods; the others would ignore it."""
    return {"methods": methods}


@dataclass(frozen=True)
class MethodConfig:
    """The method, what it trains, and who teaches."""

    method: str = flag(
        "none",
        "rdm and paraphraser train what cifd and ft use; the others train a classifier",
        choices=METHODS,
    )
    model: str = flag("", "what trains: a CNN of Table 8 such as cnn10, resnet18, wrn_40_2, ...")
    teacher: str = flag(
        "",
        "finished runs: the teacher, then its assistants from large to small (takd, dgkd); or "
        "NAME:FILE, torchvision's or timm's weights of resnet34, resnet50, ...",
        metavar="RUN[,RUN]",
        moves=True,
    )
    teacher_cache: str = flag(
        "",
        "keep what teachers say of each view here, for other runs (--augment none, flip)",
        metavar="DIR",
        free=True,
    )
    rdm_bank: str = flag(
        "", "cifd: a finished run of --method rdm", metavar="RUN", moves=True, **only("cifd")
    )
    rates: tuple[float, ...] = flag(
        (),
        "rdm: one assistant per rate [1 3 10 30 100]; cifd: which of the bank's teach [all]",
        metavar="R",
        above=0,
        **only("rdm", "cifd"),
    )
    rdm_form: str = flag(
        "classify",
        "rdm: logits alone (A.1.1), or the embedding with a classifier on it (A.1.2, A.2)",
        choices=FORMS,
        **only("rdm"),
    )
    rdm_hidden: tuple[int, ...] = flag(
        (),
        "rdm: width of its hidden layers, or all three: hidden, bottleneck, hidden",
        least=1,
        **only("rdm"),
    )
    paraphraser: str = flag("", "ft: a run of --method paraphraser", metavar="RUN", moves=True)
    factors: int | None = flag(
        None, "paraphraser: width of the factors [half of T]", least=1, **only("paraphraser")
    )
    ibm: bool = flag(True, "cifd: the Information Bottleneck Module [on]", **only("cifd"))

    @property
    def teachers(self) -> list[str]:
        """The places that ``--teacher`` names."""
        return [place for place in self.teacher.split(",") if place]


@dataclass(frozen=True)
class WeightConfig:
    """Weights of the terms of eq. (9) and their company."""

    lambda_ce: float = flag(1.0, "λ_CE", least=0, **only(*STUDENTS, "rdm"))
    lambda_kl: float = flag(1.0, "λ_KL, times τ² [1; ft: 0]", least=0, span=(0.05, 20.0))
    lambda_n: tuple[float, ...] = flag(
        (1.0,),
        "λ_n of the RDMs, in the order of --rates; one value holds for all",
        least=0,
        span=(0.05, 5.0),
        **only("cifd"),
    )
    lambda_emb: float = flag(
        1.0,
        "cifd: of the embedding terms, means over elements [1; without an RDM: 0]",
        least=0,
        span=(1e-3, 100.0),
        **only("cifd"),
    )
    lambda_i: float = flag(
        0.005, "cifd: λ_I, mean over elements", least=0, span=(1e-4, 1.0), **only("cifd")
    )
    lambda_ft: float = flag(
        500.0, "ft: of the factor term", least=0, span=(1.0, 1000.0), **only("ft")
    )
    tau: float = flag(4.0, "temperature of the KL terms", above=0, span=(1.0, 10.0))
    kd_dropout: float = flag(
        0.0,
        "probability of dropping a teacher's or assistant's KL for a sample",
        least=0,
        below=1,
        **only("kd", "takd", "dgkd", "ft", "cifd"),
    )
    kd_drop: int = flag(
        0,
        "teachers and assistants, drawn for each batch, whose KL it leaves out; 1: DGKD's code",
        least=0,
        **only("dgkd"),
    )
    embedding_loss: str = flag(
        "mse", "smooth_l1: A.2", choices=("mse", "smooth_l1"), **only("rdm", "cifd")
    )
    label_smoothing: float = flag(0.0, "of the cross-entropy", least=0, below=1, **only(*STUDENTS))


@dataclass(frozen=True)
class DataConfig:
    """The images, and which of them are trained on."""

    dataset: str = flag(
        "cifar100",
        "imagenet: any data in its layout, {train,val}/CLASS/*.jpg, or {train,val}/*.tar of "
        "key.jpg and key.cls",
        choices=("cifar100", "imagenet"),
    )
    data: str = flag(
        "",
        "where they are; cifar100: the folder of cifar100_{train,test}.npz, of clip_benchmark's "
        "tars, or of torchvision's cifar-100-python/",
        metavar="DIR",
        free=True,
    )
    augment: str = flag(
        "none",
        "of CIFAR-100 (ImageNet has random resized crops); crop includes flip; with none and flip "
        "the teachers look at each view once",
        choices=AUGMENTATIONS,
    )
    holdout: int = flag(0, "training images kept back for validation", least=0)
    workers: int = flag(min(4, cores()), "imagenet: processes that decode", least=0, free=True)
    subset: int = flag(0, "train on only so many images", least=0)
    final: bool = flag(
        False,
        "evaluate the test split, once, at the end; given with --resume latest, of a finished run "
        "too",
        free=True,
    )


@dataclass(frozen=True)
class ClassifierOptim(OptimConfig):
    """`OptimConfig` with the defaults of classifiers."""

    batch_size: int = flag(128, "samples of each process and micro-batch", least=1, free=True)
    epochs: int = flag(60, "epochs in all", least=1)
    opt: str = flag("sgd", "[sgd; rdm and paraphraser: adamw]", choices=("sgd", "adamw"))
    lr: float = flag(0.02, "peak learning rate [0.02; adamw: 0.001]", above=0)
    momentum: float = flag(0.9, "of SGD", least=0, below=1)
    beta2: float = flag(0.999, "of AdamW", least=0, below=1)
    eps: float = flag(1e-8, "of AdamW", above=0)
    wd: float = flag(1e-4, "weight decay", least=0)
    density_lr: float = flag(
        0.5,
        "learning rate of the densities, under Adam, in multiples of --lr [0.5; adamw: 10]",
        above=0,
    )
    warmup: int | None = flag(0, "warm-up steps", least=0)


@dataclass(frozen=True)
class ClassifierRun(RunConfig):
    """`RunConfig` with the defaults of classifiers."""

    logs: str = flag("logs/classify", "parent of the run directory")
    keep: int = flag(2, "newest checkpoints kept; 0: all", least=0)
    log_every_n_steps: int = flag(
        0, "steps between log lines; 0: at the ends of epochs", metavar="N", least=0
    )


@dataclass(frozen=True)
class ClassifierProcess(ProcessConfig):
    """`ProcessConfig` with the defaults of classifiers."""

    precision: str = flag("fp32", "of the student's training", choices=PRECISIONS)


@dataclass(frozen=True)
class Config(
    MethodConfig, WeightConfig, DataConfig, ClassifierOptim, ClassifierRun, ClassifierProcess
):
    """Everything a run is told, resolved."""


GROUPS = (
    ("method", MethodConfig),
    ("weights of the terms", WeightConfig),
    ("data", DataConfig),
    ("optimisation", ClassifierOptim),
    ("run directory, checkpoints, logs", ClassifierRun),
    ("processes and precision", ClassifierProcess),
)


def parser() -> Parser:
    """The grouped command line."""
    return Parser(
        "training.classify",
        "Train or distil a classifier (eq. 5 and 9). Flags can come from files: @recipe.args; "
        "later flags win.",
        "python -m training.classify [@recipe.args] --data DIR --model NAME [flags]",
        GROUPS,
        FORMER,
    )


def parse(argv: Sequence[str]) -> Given:
    """What a command line of `training.classify` gives.

    Raises:
        UsageError: a flag is unknown or not supported.
    """
    return parser().given(argv)


def parse_args(argv: Sequence[str]) -> Config:
    """The configuration of a command line, for one process; its bank may not be there yet."""
    return resolve(parse(argv))


def bank_rates(given: Given) -> tuple[float, ...]:
    """R of the assistants in the bank that ``--rdm-bank`` names; none where there is no bank.

    Raises:
        BadFile: it is damaged.
    """
    folder = bank_folder(Path(given.get("rdm_bank", "")))
    there = given.get("rdm_bank") and holds_bank(folder)
    return tuple(read_bank_config(folder)["rates"]) if there else ()


def resolve(
    given: Given,
    world_size: int = 1,
    device_type: str = "cpu",
    bank: tuple[float, ...] = (),
) -> Config:
    """The configuration that flags amount to.

    Args:
        given: flags, see `parse`.
        world_size: number of processes.
        device_type: where they compute.
        bank: R of the assistants in ``--rdm-bank``, see `bank_rates`; none: not known.

    Raises:
        UsageError: a flag is missing, out of range, or contradicts another.
    """
    values = dict(given)
    method = given.get("method", "none")
    values.setdefault("opt", "adamw" if method in STAGE1 else "sgd")
    values.setdefault("lr", 0.02 if values["opt"] == "sgd" else 1e-3)
    values.setdefault("density_lr", 0.5 if values["opt"] == "sgd" else 10.0)
    values.setdefault("lambda_kl", 0.0 if method == "ft" else 1.0)
    values.setdefault("lambda_emb", 1.0 if given.get("rdm_bank") else 0.0)
    values["ibm"] = method == "cifd" and given.get("ibm", True)
    if method == "rdm":
        values.setdefault("rates", (1.0, 3.0, 10.0, 30.0, 100.0))
    if method == "cifd":
        values.setdefault("rates", bank)
    if "warmup_epochs" in given:
        values.setdefault("warmup", None)
    values |= engine.share_batch(given, Config.batch_size, world_size)
    values["precision"] = engine.default_precision({"precision": "fp32", **given}, device_type)
    name = f"{method}_{given.get('model') or 'bank'}_s{given.get('seed', 0)}"
    values.setdefault("name", name)
    config = construct(Config, values)
    _check(config, given)
    engine.check(config)
    engine.check_place(config.name, config.logs)
    _check_assistants(config, bank)
    return config


def _check(config: Config, given: Given) -> None:
    """Refuse flags that don't go together, or that would have no effect."""
    method, teachers = config.method, len(config.teachers)
    if not config.data:
        raise UsageError("--data DIR is missing: where the images are")
    if method == "none" and teachers:
        raise UsageError("--method none has no --teacher")
    if method in ("kd", "ft", "cifd", *STAGE1) and teachers != 1:
        raise UsageError(f"--method {method} needs one --teacher RUN, got {teachers}")
    if method in ("takd", "dgkd") and not teachers:
        raise UsageError(f"--method {method} needs --teacher RUN[,RUN...], the assistants last")
    if (method in STAGE1) == bool(config.model):
        needs = "trains no --model" if method in STAGE1 else "needs --model"
        raise UsageError(f"--method {method} {needs}")
    for name, field in Config.__dataclass_fields__.items():
        methods = field.metadata.get("methods", METHODS)
        if name in given and method not in methods:
            raise UsageError(
                f"{spelled(name)} belongs to --method {', '.join(methods)}, not {method}"
            )
    if config.kd_drop >= max(teachers, 1):
        raise UsageError(
            f"--kd-drop {config.kd_drop}: expected fewer than teachers and assistants, {teachers}"
        )
    for name in ("rates", "lambda_n"):
        if name in given and method == "cifd" and not config.rdm_bank:
            raise UsageError(
                f"{spelled(name)} is of assistants in --rdm-bank RUN, which is missing"
            )
    if (method == "ft") != bool(config.paraphraser):
        raise UsageError("--method ft and --paraphraser RUN go together")
    if config.dataset == "imagenet" and given.get("augment", "crop") != "crop":
        raise UsageError(
            f"--augment {config.augment} is of CIFAR-100; --dataset imagenet has random resized "
            "crops"
        )


def _check_assistants(config: Config, bank: tuple[float, ...]) -> None:
    """Refuse RDMs that can't be made, or that are not in the bank."""
    rates = [f"{rate:g}" for rate in config.rates]  # as results are called
    if len(set(rates)) < len(rates):
        raise UsageError(f"--rates has one of its values twice: {' '.join(rates)}")
    if len(config.rdm_hidden) not in (0, 1, 3):
        raise UsageError(
            f"--rdm-hidden {' '.join(map(str, config.rdm_hidden))}: expected one width, or three: "
            "hidden, bottleneck, hidden"
        )
    if not bank:
        return
    if missing := [rate for rate in config.rates if rate not in bank]:
        there = ", ".join(f"{rate:g}" for rate in bank)
        raise UsageError(f"--rates {missing[0]:g}: the bank {config.rdm_bank} has {there}")
    if len(config.lambda_n) not in (1, len(rates)):
        raise UsageError(
            f"--lambda-n has {len(config.lambda_n)} values for {len(rates)} assistants"
        )
