"""The command line of ``python -m eval.cost``: a recipe of `training.main`, and the machine."""

import argparse
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import open_clip

from training.clip import flags as params
from training.errors import UsageError

#: Cost depends on the number of samples, not on where they lie; `training.clip.config` wants both.
NO_DATA = ("--train-data", "none")


def parser() -> argparse.ArgumentParser:
    """Flags beside those of `training.main`."""
    p = params._Parser(
        prog="python -m eval.cost",
        description="MACs, bytes and GPU hours of every stage of a run. Takes a command line of "
        "training.main (see its --help), of which --train-data may be left out.",
        usage="python -m eval.cost [@recipe.args] [flags of training.main] [flags]",
        formatter_class=params._Help,
        allow_abbrev=False,
    )
    own = p.add_argument_group("what a run does not know beforehand")
    own.add_argument("--gpus", type=int, default=1, help="processes that share a global batch")
    own.add_argument("--tflops", type=float, default=312.0, help="peak of one GPU (A100, bf16)")
    own.add_argument("--mfu", type=float, default=0.35, help="share of it that is reached")
    own.add_argument("--dataset-samples", type=int, help="samples a cache covers [one epoch's]")
    own.add_argument(
        "--sample-bytes",
        type=int,
        default=30_000,
        help="of an image and its caption in the shards (CC12M at 256 px)",
    )
    own.add_argument("--assistants", metavar="NAME[,NAME]", help="of TAKD and DGKD [ViT-B-16]")
    out = p.add_argument_group("output")
    out.add_argument(
        "--paper", action="store_true", help="the paper's own figures, counted again; no run"
    )
    out.add_argument("--hours", action="store_true", help="one line of JSON: hours, disk_bytes")
    out.add_argument(
        "--sweep-views", type=int, nargs="+", metavar="V", help="what caches of V views save"
    )
    out.add_argument("--students", nargs="+", help="of --sweep-views [--model]")
    out.add_argument("--json", metavar="FILE", help="write everything as JSON too")
    return p


def parse(flags: list[str]) -> Namespace:
    """Read a command line: `training.main`'s values beside our own.

    ``dataset_samples`` and ``views`` are set whatever was left to defaults; ``teachers`` are the
    architectures of the teachers, which a written cache knows.

    Raises:
        UsageError: a flag is wrong, or one that cost depends on is missing.
    """
    return resolve(*split(flags))


def split(flags: list[str]) -> tuple[Namespace, list[str]]:
    """Our own values, and the words that are left for `training.clip.config`."""
    own, recipe = parser().parse_known_args(flags)
    for flag in ("tflops", "mfu", "gpus"):
        if getattr(own, flag) <= 0:
            raise UsageError(f"--{flag} must be positive, got {getattr(own, flag)}")
    return own, recipe


def resolve(own: Namespace, recipe: list[str]) -> Namespace:
    """The two parts of `split` as one; see `parse`."""
    args = Namespace(**vars(params.parse_args([*NO_DATA, *recipe])), **vars(own))
    if not args.train_num_samples:
        raise UsageError(
            "--train-num-samples is missing: the samples of an epoch, which a run takes from its "
            "shards"
        )
    if args.sweep_views and args.distill == "none":
        raise UsageError("--sweep-views compares caches of a teacher, but --distill is none")
    for path in args.model_config:
        open_clip.add_model_config(path)
    args.dataset_samples = args.dataset_samples or args.train_num_samples
    args.teachers = [name for name, _ in params.teacher_names(args)]
    if args.teacher_cache:
        folders = args.teacher_cache.split(",")
        args.teachers = args.teachers or [_written(f)["teacher"]["model"] for f in folders]
        args.views = args.views or _written(folders[0])["views"]
    return args


def _written(cache: str) -> dict[str, Any]:
    path = Path(cache) / "config.json"
    if not path.is_file():
        raise UsageError(
            f"--teacher-cache '{cache}' is not written yet: say what it will hold with --views V "
            "and --distill-model NAME --distill-pretrained TAG"
        )
    return json.loads(path.read_text())
