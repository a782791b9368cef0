"""The command line of `training.classify`."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from cifd_clip.artefact import FORMS
from cifd_clip.classification.losses import EMBEDDING_LOSSES
from cifd_clip.classification.models import NAMES
from training.classifier.cifar import AUGMENTATIONS
from training.clip.flags import _Help, _Parser
from training.errors import UsageError

METHODS = ("none", "kd", "takd", "dgkd", "ft", "cifd", "rdm", "paraphraser")
STAGE1 = ("rdm", "paraphraser")
DATASETS = ("cifar100", "imagenet")
#: The methods that a flag belongs to; the others would ignore it. (Not here: --lambda-kl and --tau,
#: which studies give every student, with a teacher or without.)
BELONGS = {
    "rdm_bank": ("cifd",),
    "rates": ("rdm", "cifd"),
    "rdm_form": ("rdm",),
    "rdm_hidden": ("rdm",),
    "factors": ("paraphraser",),
    "no_ibm": ("cifd",),
    "lambda_ce": ("none", "kd", "takd", "dgkd", "ft", "cifd", "rdm"),
    "lambda_n": ("cifd",),
    "lambda_emb": ("cifd",),
    "lambda_i": ("cifd",),
    "lambda_ft": ("ft",),
    "kd_dropout": ("kd", "takd", "dgkd", "ft", "cifd"),
    "embedding_loss": ("rdm", "cifd"),
    "label_smoothing": ("none", "kd", "takd", "dgkd", "ft", "cifd"),
}
POSITIVE = "epochs batch_size tau lr density_lr grad_clip_norm factors rdm_hidden rates".split()
NOT_NEGATIVE = (
    "lambda_ce lambda_kl lambda_n lambda_emb lambda_i lambda_ft wd gamma warmup_epochs holdout "
    "subset workers keep"
).split()
BELOW_1 = ("momentum", "kd_dropout", "label_smoothing")


def parser() -> argparse.ArgumentParser:
    """The grouped command line."""
    p = _Parser(
        prog="python -m training.classify",
        description="Train or distil a classifier (eq. 5 and 9). Flags can come from files: "
        "@recipe.args; later flags win.",
        usage="python -m training.classify [@recipe.args] --data DIR --model NAME [flags]",
        fromfile_prefix_chars="@",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    _method_flags(p.add_argument_group("method"))
    _weight_flags(p.add_argument_group("weights of the terms"))
    _data_flags(p.add_argument_group("data"))
    _optimisation_flags(p.add_argument_group("optimisation"))
    _run_flags(p.add_argument_group("run directory, checkpoints, logs"))
    return p


def _method_flags(g) -> None:
    g.add_argument(
        "--method",
        choices=METHODS,
        default="none",
        help="rdm and paraphraser train what cifd and ft use; the others train a classifier",
    )
    g.add_argument("--model", help=f"what trains: {', '.join(NAMES)}")
    g.add_argument(
        "--teacher",
        metavar="RUN[,RUN]",
        help="finished runs: the teacher, then its assistants from large to small (takd, dgkd); "
        "or NAME:FILE, torchvision's or timm's weights of resnet34, resnet50, ...",
    )
    g.add_argument(
        "--teacher-cache",
        type=Path,
        metavar="DIR",
        help="keep what teachers say about each view here, for other runs (--augment none, flip)",
    )
    g.add_argument("--rdm-bank", metavar="RUN", help="cifd: a finished run of --method rdm")
    g.add_argument(
        "--rates",
        type=float,
        nargs="+",
        metavar="R",
        help="rdm: one assistant per rate [1 3 10 30 100]; cifd: which of the bank's teach [all]",
    )
    g.add_argument(
        "--rdm-form",
        choices=FORMS,
        default="classify",
        help="rdm: logits alone (A.1.1), or the embedding with a classifier on it (A.1.2, A.2)",
    )
    g.add_argument("--rdm-hidden", type=int, nargs=3, help="rdm: widths of its hidden layers")
    g.add_argument("--paraphraser", metavar="RUN", help="ft: a run of --method paraphraser")
    g.add_argument("--factors", type=int, help="paraphraser: width of the factors [half of T]")
    g.add_argument("--no-ibm", action="store_true", help="cifd: no Information Bottleneck Module")


def _weight_flags(g) -> None:
    g.add_argument("--lambda-ce", type=float, default=1.0, help="λ_CE")
    g.add_argument("--lambda-kl", type=float, help="λ_KL, times τ² [1; ft: 0]")
    g.add_argument(
        "--lambda-n",
        type=float,
        nargs="+",
        default=[1.0],
        help="λ_n of the RDMs, in the order of --rates; one value holds for all",
    )
    g.add_argument(
        "--lambda-emb",
        type=float,
        help="cifd: of the embedding terms, means over elements [1; without an RDM: 0]",
    )
    g.add_argument("--lambda-i", type=float, default=0.005, help="cifd: λ_I, mean over elements")
    g.add_argument("--lambda-ft", type=float, default=500.0, help="ft: of the factor term")
    g.add_argument("--tau", type=float, default=4.0, help="temperature of the KL terms")
    g.add_argument(
        "--kd-dropout",
        type=float,
        default=0.0,
        help="probability of dropping a teacher's or assistant's KL for a sample",
    )
    g.add_argument(
        "--embedding-loss", choices=tuple(EMBEDDING_LOSSES), default="mse", help="smooth_l1: A.2"
    )
    g.add_argument("--label-smoothing", type=float, default=0.0, help="of the cross-entropy")


def _data_flags(g) -> None:
    g.add_argument(
        "--dataset",
        choices=DATASETS,
        default="cifar100",
        help="imagenet: any data in its layout, {train,val}/CLASS/*.jpg, or {train,val}/*.tar of "
        "key.jpg and key.cls",
    )
    g.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="where they are; cifar100: the folder of cifar100_{train,test}.npz, of "
        "clip_benchmark's tars, or of torchvision's cifar-100-python/",
    )
    g.add_argument(
        "--augment",
        choices=AUGMENTATIONS,
        default="none",
        help="of CIFAR-100 (ImageNet has random resized crops); crop includes flip; with none "
        "and flip the teachers look at each view once",
    )
    g.add_argument(
        "--holdout", type=int, default=0, help="training images kept back for validation"
    )
    g.add_argument("--workers", type=int, default=4, help="imagenet: processes that decode")
    g.add_argument("--subset", type=int, default=0, help="train on only so many images")
    g.add_argument(
        "--final",
        action="store_true",
        help="evaluate the test split, once, at the end; given with --resume latest, of a finished "
        "run too",
    )


def _optimisation_flags(g) -> None:
    g.add_argument("--epochs", type=int, default=60, help="epochs in all")
    g.add_argument("--batch-size", type=int, default=128, help="samples per step, of all processes")
    g.add_argument("--opt", choices=("sgd", "adamw"), help="[sgd; rdm and paraphraser: adamw]")
    g.add_argument("--lr", type=float, help="peak learning rate [0.02; adamw: 0.001]")
    g.add_argument("--momentum", type=float, default=0.9, help="of SGD")
    g.add_argument("--wd", type=float, default=1e-4, help="weight decay")
    g.add_argument("--density-lr", type=float, default=0.01, help="of the densities, under Adam")
    g.add_argument(
        "--lr-schedule", choices=("cosine", "linear", "multistep", "const"), default="cosine"
    )
    g.add_argument("--warmup-epochs", type=float, default=0.0, help="of linear warm-up")
    g.add_argument(
        "--milestones", type=int, nargs="+", default=[150, 180, 210], help="multistep: epochs"
    )
    g.add_argument("--gamma", type=float, default=0.1, help="multistep: factor at each milestone")
    g.add_argument("--grad-clip-norm", type=float, help="clip the gradient's norm")
    g.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the student")
    g.add_argument("--seed", type=int, default=0, help="of weights, order, views and noise")


def _run_flags(g) -> None:
    g.add_argument("--logs", default="logs/classify", help="where run directories go")
    g.add_argument("--name", help="the run directory's name [from method, model and seed]")
    g.add_argument("--resume", choices=("latest",), help="go on where the run stopped")
    g.add_argument("--keep", type=int, default=2, help="newest checkpoints that stay; 0: all")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g.add_argument("--device", default=device, help="cpu or cuda, if there is a GPU")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse, check what can be checked without files, and fill in what depends on other flags.

    Raises:
        UsageError: flags that don't go together.
    """
    args = parser().parse_args(argv)
    args.teacher = args.teacher.split(",") if args.teacher else []
    _check(args, _given(argv))
    stage1 = args.method in STAGE1
    if args.opt is None:
        args.opt = "adamw" if stage1 else "sgd"
    if args.lr is None:
        args.lr = 0.02 if args.opt == "sgd" else 1e-3
    if args.lambda_kl is None:
        args.lambda_kl = 0.0 if args.method == "ft" else 1.0
    if args.lambda_emb is None:
        args.lambda_emb = 1.0 if args.rdm_bank else 0.0
    if args.method == "rdm" and args.rates is None:
        args.rates = [1.0, 3.0, 10.0, 30.0, 100.0]
    args.ibm = args.method == "cifd" and not args.no_ibm
    if args.name is None:
        args.name = f"{args.method}_{args.model or 'bank'}_s{args.seed}"
    return args


def run_config(args: argparse.Namespace) -> dict[str, Any]:
    """What makes two runs the same run; where the data lie does not (their hash is compared)."""
    config = {**vars(args), "data": None, "teacher_cache": None, "global_batch": args.batch_size}
    return json.loads(json.dumps(config))


def _given(argv: list[str]) -> set[str]:
    """The flags that a command line gives, be it with their defaults."""
    p = parser()
    p.set_defaults(**dict.fromkeys(vars(p.parse_args(argv))))
    return {flag for flag, value in vars(p.parse_args(argv)).items() if value is not None}


def _check(args: argparse.Namespace, given: set[str]) -> None:
    method, teachers = args.method, len(args.teacher)
    if method == "none" and teachers:
        raise UsageError("--method none has no --teacher")
    if method in ("kd", "ft", "cifd", *STAGE1) and teachers != 1:
        raise UsageError(f"--method {method} needs one --teacher RUN, got {teachers}")
    if method in ("takd", "dgkd") and not teachers:
        raise UsageError(f"--method {method} needs --teacher RUN[,RUN...], the assistants last")
    if (method in STAGE1) == bool(args.model):
        needs = "trains no --model" if method in STAGE1 else "needs --model"
        raise UsageError(f"--method {method} {needs}")
    if args.model and args.model not in NAMES:
        raise UsageError(f"--model {args.model}: there are {', '.join(NAMES)}")
    for flag, methods in BELONGS.items():
        if flag in given and method not in methods:
            told = ", ".join(methods)
            raise UsageError(f"{_spelt(flag)} belongs to --method {told}, not {method}")
    for flag in ("rates", "lambda_n"):
        if flag in given and method == "cifd" and not args.rdm_bank:
            raise UsageError(f"{_spelt(flag)} is of assistants in --rdm-bank RUN, which is missing")
    if (method == "ft") != bool(args.paraphraser):
        raise UsageError("--method ft and --paraphraser RUN go together")
    if args.dataset == "imagenet" and "augment" in given and args.augment != "crop":
        raise UsageError(
            f"--augment {args.augment} is of CIFAR-100; --dataset imagenet has random resized crops"
        )
    _check_ranges(args)
    if args.warmup_epochs >= args.epochs:
        raise UsageError(f"--warmup-epochs {args.warmup_epochs} leaves nothing of --epochs")
    if args.device not in ("cpu", "cuda"):
        raise UsageError(f"--device {args.device}: expected cpu or cuda")


def _check_ranges(args: argparse.Namespace) -> None:
    def values(flag: str) -> list[float]:
        value = getattr(args, flag)
        return [] if value is None else value if isinstance(value, list) else [value]

    for flag in POSITIVE:
        if not all(value > 0 for value in values(flag)):  # nan is not
            raise UsageError(f"{_spelt(flag)} must be positive, got {_told(values(flag))}")
    for flag in NOT_NEGATIVE:
        if not all(value >= 0 for value in values(flag)):
            raise UsageError(f"{_spelt(flag)} must be 0 or more, got {_told(values(flag))}")
    for flag in BELOW_1:
        if not 0 <= getattr(args, flag) < 1:
            told = _told(values(flag))
            raise UsageError(f"{_spelt(flag)} must be 0 or more and below 1, got {told}")
    rates = [f"{rate:g}" for rate in args.rates or []]  # as results are called
    if len(set(rates)) < len(rates):
        raise UsageError(f"--rates has one of its values twice: {' '.join(rates)}")


def _spelt(flag: str) -> str:
    return f"--{flag.replace('_', '-')}"


def _told(values: list[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
