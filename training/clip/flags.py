"""The command line of `training.main`: OpenCLIP's flags where it has them, and ours.

Every rule that can be checked without touching data or models is checked here, so that a wrong
command ends within a second.
"""

import argparse
import ast
import importlib.util
import json
import shlex
from pathlib import Path

from training.errors import UsageError

DISTILL = ("none", "kd", "fd", "clipkd", "tinyclip", "mobileclip", "rdm", "cifd")
#: R of a bank's RDMs where the command line says nothing: docs/paper.md, "Which rates".
RATES = (10000.0, 3000.0, 1000.0)

#: OpenCLIP flags that are not taken, and why.
REFUSED = {
    "--csv-separator": "data are WebDataset tars; img2dataset converts a csv list",
    "--csv-img-key": "data are WebDataset tars; img2dataset converts a csv list",
    "--csv-caption-key": "data are WebDataset tars; img2dataset converts a csv list",
    "--imagenet-val": "zero-shot evaluation is `python -m eval.benchmark`",
    "--imagenet-v2": "zero-shot evaluation is `python -m eval.benchmark`",
    "--zeroshot-frequency": "zero-shot evaluation is `python -m eval.benchmark`",
    "--val-num-samples": "every sample of --val-data is used once",
    "--horovod": "processes are launched with torchrun or srun",
    "--torchscript": "a scripted model can't be cut at the bottleneck",
    "--trace": "tracing is for inference",
    "--copy-codebase": "environment.json records the commit",
    "--remote-sync": "sync the run directory with a tool of your cluster",
    "--remote-sync-frequency": "sync the run directory with a tool of your cluster",
    "--remote-sync-protocol": "sync the run directory with a tool of your cluster",
    "--coca-caption-loss-weight": "CoCa students are not supported",
    "--coca-contrastive-loss-weight": "CoCa students are not supported",
    "--use-bnb-linear": "int8 layers change the student's state_dict",
    "--siglip": "the student trains with the softmax losses of the paper's methods",
    "--loss-dist-impl": "it belongs to SigLIP's loss",
    "--save-most-recent": "the newest checkpoint is always kept (see --keep)",
    "--delete-previous-checkpoint": "use --keep 1",
    "--skip-scheduler": "use --lr-scheduler const --warmup 0",
    "--log-local": "rank 0 logs",
    "--debug": "use the Python debugger or logging's own settings",
    "--ddp-static-graph": "the graph is static already",
    "--momentum": "it belongs to timm optimizers; AdamW is supported",
}


def flags_of(line: str) -> list[str]:
    """The words of one line of a flag file or a grid, quoted as in a shell.

    A comment begins with ``#`` at the start of a word, as in a shell: ``name#1`` is a name.

    Raises:
        UsageError: a quotation has no end.
    """
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words = []
    try:
        while rest := line[lexer.instream.tell() :].lstrip():
            if rest.startswith("#"):
                break
            words.append(lexer.get_token())
    except ValueError as error:
        raise UsageError(f"the line {line!r} can't be read: {error}") from error
    return words


class _Parser(argparse.ArgumentParser):
    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return flags_of(arg_line)

    def error(self, message: str):
        raise UsageError(f"{message} (see --help)")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Short: a default is shown where there is one to show."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=100)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X"}.get(action.type, "NAME")

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.nargs == 0 or action.default in (None, "", {}, []):
            return text
        default = " ".join(map(str, action.default)) if action.nargs else "%(default)s"
        return f"{text} [{default}]".strip()


class _KeyValues(argparse.Action):
    """``key=value ...`` with Python literals as values, as OpenCLIP's ``--aug-cfg``."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = {}
        for item in values:
            key, sign, value = item.partition("=")
            if not sign:
                raise UsageError(f"{option_string} '{item}': expected key=value")
            try:
                literal = ast.literal_eval(value)
                # as JSON keeps it, so that a run and a cache find their own values again
                pairs[key] = list(literal) if isinstance(literal, tuple) else literal
            except (ValueError, SyntaxError):
                pairs[key] = value
        setattr(namespace, self.dest, pairs)


def parser() -> argparse.ArgumentParser:
    """The grouped command line."""
    p = _Parser(
        prog="python -m training.main",
        description="Train or distil a CLIP model. Flags can come from files: @recipe.args; "
        "later flags win.",
        fromfile_prefix_chars="@",
        usage="python -m training.main [@recipe.args] --train-data SHARDS [flags]",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    _method_flags(p.add_argument_group("method"))
    _data_flags(p.add_argument_group("data"))
    _model_flags(p.add_argument_group("student"))
    _optimisation_flags(p.add_argument_group("optimisation"))
    _run_flags(p.add_argument_group("run directory, checkpoints, logs"))
    _process_flags(p.add_argument_group("processes and precision"))
    return p


def _method_flags(g) -> None:
    g.add_argument(
        "--distill",
        choices=DISTILL,
        default="none",
        help="none: plain CLIP; rdm: stage 1 of CIFD (the bank); cifd: stage 2",
    )
    g.add_argument("--distill-model", metavar="NAME[,NAME]", help="teacher architecture(s)")
    g.add_argument(
        "--distill-pretrained",
        metavar="TAG|PATH[,...]",
        help="teacher weights, one per --distill-model; none for local-dir: models",
    )
    g.add_argument(
        "--rates",
        type=float,
        nargs="*",
        metavar="R",
        help="stage 1: one RDM per modality and rate (eq. 4) [10000 3000 1000]; none: no RDM",
    )
    g.add_argument(
        "--rdm-bank",
        metavar="DIR",
        help="stage 2: a trained bank or its run; without it cifd trains one first, in RUN/rdm",
    )
    g.add_argument(
        "--rdm-epochs", type=int, default=7, help="epochs of stage 1 when cifd trains its own bank"
    )
    g.add_argument("--rdm-hidden", type=int, help="their hidden width [teacher's dim]")
    g.add_argument("--rdm-channels", type=int, help="their bottleneck's width [teacher's dim]")
    g.add_argument(
        "--rdm-output",
        choices=("rounded", "noisy", "raw"),
        default="rounded",
        help="cifd: what an RDM teaches: its rounded reconstruction at unit norm, one with noise "
        "in place of rounding, or one that is not normalised",
    )
    g.add_argument("--lambda-cl", type=float, default=0.0005, help="cifd: λ_CL of eq. 13")
    g.add_argument("--lambda-i", type=float, default=1e-4, help="cifd: λ_I of eq. 12")
    g.add_argument("--lambda-n", type=float, default=1.0, help="cifd: λ_n of eq. 12")
    g.add_argument("--no-ibm", action="store_true", help="cifd: no Information Bottleneck Module")
    g.add_argument(
        "--ibm-site",
        choices=("projection", "embedding"),
        default="projection",
        help="cifd: noise before the towers' final projection, or on the embedding",
    )
    g.add_argument(
        "--ibm-branch",
        choices=("all", "distill"),
        default="all",
        help="cifd: whether the contrastive term sees the noise too",
    )
    g.add_argument(
        "--projector",
        choices=("shared", "separate", "each"),
        default="shared",
        help="fd, clipkd, cifd: to a teacher of another dimension, one map for images and texts, "
        "one for each of the two, or one for the teacher and for each of its assistants",
    )
    g.add_argument("--lambda-kd", type=float, default=1.0, help="mobileclip: share of distillation")
    g.add_argument("--lambda-fd", type=float, default=2000.0, help="clipkd: feature term")
    g.add_argument("--lambda-crd", type=float, default=1.0, help="clipkd: relational term")
    g.add_argument("--lambda-icl", type=float, default=1.0, help="clipkd: interactive term")
    g.add_argument(
        "--teacher-cache",
        metavar="DIR[,DIR]",
        help="teacher embeddings written by training.cache_teacher",
    )


def _data_flags(g) -> None:
    g.add_argument(
        "--train-data",
        metavar="SHARDS",
        help="WebDataset tars: a directory, a brace or glob pattern; '::' joins sources",
    )
    g.add_argument("--train-data-upsampling-factors", metavar="W::W", help="one weight per source")
    g.add_argument("--train-num-samples", type=int, help="samples per epoch [all]")
    g.add_argument("--dataset-resampled", action="store_true", help="sample with replacement")
    g.add_argument(
        "--dataset-type",
        choices=("webdataset", "auto"),
        default="auto",
        help="webdataset is the only type",
    )
    g.add_argument(
        "--captions",
        choices=("first", "all"),
        default="first",
        help="key.txt, or one of key.json's 'captions' at random",
    )
    g.add_argument(
        "--views",
        type=int,
        default=0,
        help="augmentations of an image, taken in turn; 0: a new one each pass",
    )
    g.add_argument(
        "--view-seed", type=int, help="of augmentations and captions [--seed, or the cache's own]"
    )
    g.add_argument(
        "--view-memory",
        type=float,
        default=0.0,
        metavar="GIB",
        help="decoded views that each reading process holds: for small data and --views",
    )
    g.add_argument(
        "--shuffle-window", type=int, default=20000, help="samples shuffled together (whole shards)"
    )
    g.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.01,
        help="stop when more than this share of samples can't be used",
    )
    g.add_argument("--index-dir", metavar="DIR", help="where shard indexes go [beside the shards]")
    g.add_argument("--val-data", metavar="SHARDS", help="held-out shards: losses every epoch")
    g.add_argument("--val-frequency", type=int, default=1, help="epochs between validations")
    g.add_argument("--workers", type=int, default=4, help="loader workers per process")
    g.add_argument(
        "--worker-start",
        choices=("fork", "spawn", "forkserver"),
        default=None,
        help="start method of the workers [the platform's]",
    )
    g.add_argument("--image-mean", type=float, nargs=3, metavar="MEAN")
    g.add_argument("--image-std", type=float, nargs=3, metavar="STD")
    g.add_argument("--image-interpolation", choices=("bicubic", "bilinear", "random"))
    g.add_argument("--image-resize-mode", choices=("shortest", "longest", "squash"))
    g.add_argument(
        "--aug-cfg",
        nargs="*",
        default={},
        action=_KeyValues,
        metavar="KEY=VALUE",
        help="OpenCLIP's AugmentationCfg",
    )


def _model_flags(g) -> None:
    g.add_argument(
        "--model",
        default="RN50",
        help="any OpenCLIP architecture, or one of --model-config by its file's stem",
    )
    g.add_argument(
        "--model-config",
        nargs="+",
        default=[],
        metavar="FILE.json",
        help="OpenCLIP model configs to add",
    )
    g.add_argument("--pretrained", default="", help="tag or file of initial weights")
    g.add_argument(
        "--pretrained-image", action="store_true", help="ImageNet weights for a timm image tower"
    )
    g.add_argument("--force-quick-gelu", action="store_true", help="QuickGELU in the student")
    g.add_argument(
        "--force-custom-text", action="store_true", help="a separate text tower (CustomTextCLIP)"
    )
    g.add_argument(
        "--force-image-size", type=int, nargs="+", help="another image size than the config names"
    )
    g.add_argument("--force-context-length", type=int, help="another context length")
    g.add_argument("--force-patch-dropout", type=float, help="another patch dropout")
    g.add_argument("--lock-image", action="store_true", help="freeze the image tower")
    g.add_argument(
        "--lock-image-unlocked-groups", type=int, default=0, help="last layer groups left trainable"
    )
    g.add_argument(
        "--lock-image-freeze-bn-stats", action="store_true", help="freeze batch statistics too"
    )
    g.add_argument("--lock-text", action="store_true", help="freeze the text tower")
    g.add_argument(
        "--lock-text-unlocked-layers", type=int, default=0, help="last layers left trainable"
    )
    g.add_argument("--lock-text-freeze-layer-norm", action="store_true", help="always on")
    g.add_argument("--cache-dir", help="where OpenCLIP keeps downloaded weights")


def _optimisation_flags(g) -> None:
    g.add_argument("--batch-size", type=int, default=64, help="per process and micro-batch")
    g.add_argument(
        "--global-batch",
        type=int,
        help="samples per step over all processes; sets --batch-size to each one's share",
    )
    g.add_argument(
        "--accum-freq",
        type=int,
        default=1,
        help="micro-batches per step; the loss is that of the whole batch",
    )
    g.add_argument("--epochs", type=int, default=32, help="epochs in all")
    g.add_argument("--opt", choices=("adamw",), default="adamw", help="the optimizer")
    g.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    g.add_argument("--beta1", type=float, help="[0.9]")
    g.add_argument("--beta2", type=float, help="[0.98 for ViT, else 0.999]")
    g.add_argument("--eps", type=float, help="[1e-6 for ViT, else 1e-8]")
    g.add_argument("--wd", type=float, default=0.2, help="weight decay of matrices")
    g.add_argument(
        "--density-lr",
        type=float,
        default=10.0,
        help="learning rate of the densities, in multiples of --lr",
    )
    g.add_argument("--warmup", type=int, help="warm-up steps [1/6 of all]")
    g.add_argument(
        "--lr-scheduler",
        choices=("cosine", "const", "const-cooldown"),
        default="cosine",
        help="after warm-up",
    )
    g.add_argument("--epochs-cooldown", type=int, help="const-cooldown: epochs of cooling down")
    g.add_argument(
        "--lr-cooldown-end", type=float, default=0.0, help="const-cooldown: last learning rate"
    )
    g.add_argument(
        "--lr-cooldown-power", type=float, default=1.0, help="const-cooldown: power of the decay"
    )
    g.add_argument("--grad-clip-norm", type=float, help="clip the gradient's norm")
    g.add_argument(
        "--ema",
        type=float,
        metavar="DECAY",
        help="average the student's weights over steps, such as 0.9999: the average ships, is "
        "validated and is a checkpoint's state_dict; the weights that train lie beside it",
    )
    g.add_argument(
        "--max-nonfinite-steps",
        type=int,
        default=5,
        help="stop after this many steps in a row with a non-finite gradient",
    )
    g.add_argument("--seed", type=int, default=0, help="of weights, order, noise and views")


def _run_flags(g) -> None:
    g.add_argument("--logs", default="./logs", help="parent of the run directory")
    g.add_argument("--name", help="the run directory's name [method-student-seed]")
    g.add_argument(
        "--resume",
        choices=("latest",),
        help="go on from the newest intact checkpoint of this run, if there is one",
    )
    g.add_argument("--save-frequency", type=int, default=1, help="epochs between checkpoints")
    g.add_argument(
        "--save-every-n-steps",
        type=int,
        default=0,
        metavar="N",
        help="steps between checkpoints; 0: by epochs and minutes",
    )
    g.add_argument(
        "--save-every-n-minutes",
        type=float,
        default=30.0,
        metavar="N",
        help="minutes between checkpoints",
    )
    g.add_argument("--keep", type=int, default=3, help="newest checkpoints kept; 0: all")
    g.add_argument("--log-every-n-steps", type=int, default=50, help="steps between log lines")
    g.add_argument("--report-to", default="", metavar="tensorboard,wandb")
    g.add_argument("--wandb-project-name", default="open-clip", help="as OpenCLIP")
    g.add_argument("--wandb-notes", default="", help="as OpenCLIP")


def _process_flags(g) -> None:
    g.add_argument("--device", help="cpu, cuda or cuda:N [a GPU where there is one]")
    g.add_argument(
        "--precision",
        choices=("fp32", "amp", "amp_bf16", "amp_bfloat16"),
        help="[amp_bf16 on a GPU, fp32 on a CPU]",
    )
    g.add_argument(
        "--grad-checkpointing", action="store_true", help="recompute activations to save memory"
    )
    g.add_argument("--torchcompile", action="store_true", help="compile the student's towers")
    g.add_argument("--use-bn-sync", action="store_true", help="batch normalisation over all GPUs")
    g.add_argument("--local-loss", action="store_true", help="always on")
    g.add_argument("--gather-with-grad", action="store_true", help="always on")
    g.add_argument("--dist-url", help="where the processes meet [env://]")
    g.add_argument("--dist-backend", help="[nccl on GPUs, gloo on CPUs]")
    g.add_argument(
        "--no-set-device-rank", action="store_true", help="one GPU is visible per process"
    )


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse and check a command line.

    Raises:
        UsageError: a flag is unknown, refused, or contradicts another.
    """
    for word in argv:
        flag = word.partition("=")[0]
        if flag in REFUSED:
            raise UsageError(f"{flag} is not supported: {REFUSED[flag]}")
    for word in argv:
        if word.startswith("@") and not Path(word[1:]).is_file():
            raise UsageError(f"{word}: no such flag file")
    args = parser().parse_args(argv)
    _check(args)
    _defaults(args)
    return args


def batch_share(args: argparse.Namespace, processes: int = 1) -> int:
    """``--batch-size`` of each of `processes` that together make up ``--global-batch``.

    Raises:
        UsageError: the global batch can't be shared evenly.
    """
    parts = processes * args.accum_freq
    if args.global_batch < parts or args.global_batch % parts:
        raise UsageError(
            f"--global-batch {args.global_batch} can't be shared by {processes} processes with "
            f"--accum-freq {args.accum_freq}: use a number of processes that divides it"
        )
    return args.global_batch // parts


def teacher_names(args: argparse.Namespace) -> list[tuple[str, str | None]]:
    """(architecture, weights) of each teacher; the weights are None for ``local-dir:`` models."""
    if not args.distill_model:
        return []
    names = args.distill_model.split(",")
    weights = args.distill_pretrained.split(",") if args.distill_pretrained else []
    rest = iter(weights)
    return [(n, None if _own_weights(n) else next(rest, None)) for n in names]


def _own_weights(name: str) -> bool:
    return name.startswith(("local-dir:", "hf-hub:"))


def _check(args: argparse.Namespace) -> None:
    if not args.train_data:
        raise UsageError("--train-data is missing: name a directory or pattern of WebDataset tars")
    _check_teachers(args)
    counts = "batch_size accum_freq epochs log_every_n_steps rdm_epochs max_nonfinite_steps"
    for flag in counts.split():
        if getattr(args, flag) < 1:
            raise UsageError(f"--{flag.replace('_', '-')} must be at least 1")
    for flag in ("keep", "workers", "views", "wd", "view_memory", "lr_cooldown_end", "warmup"):
        if not (getattr(args, flag) or 0) >= 0:  # nan is not
            raise UsageError(f"--{flag.replace('_', '-')} can't be negative")
    for flag in ("lr", "density_lr", "shuffle_window", "train_num_samples"):
        if getattr(args, flag) is not None and not getattr(args, flag) > 0:
            raise UsageError(f"--{flag.replace('_', '-')} must be positive")
    unlocked = args.lock_image_unlocked_groups or args.lock_text_unlocked_layers
    if args.lock_image and args.lock_text and not unlocked:
        raise UsageError("--lock-image and --lock-text leave nothing of the student to train")
    if args.grad_clip_norm is not None and not args.grad_clip_norm > 0:
        raise UsageError("--grad-clip-norm must be positive; leave it out for no clipping")
    if args.distill == "rdm" and args.rates == []:
        raise UsageError("--distill rdm needs at least one rate: --rates 10000 3000 1000")
    if not all(rate > 0 for rate in args.rates or ()):
        raise UsageError(f"--rates must be positive, got {args.rates}")
    if args.rdm_bank and args.distill != "cifd":
        raise UsageError(f"--rdm-bank belongs to --distill cifd, not to --distill {args.distill}")
    if args.use_bn_sync and args.accum_freq > 1:
        raise UsageError(
            "--use-bn-sync with --accum-freq > 1 is not supported: batch statistics of a "
            "micro-batch are not those of the whole batch; use more processes instead"
        )
    if args.view_memory and not args.views:
        raise UsageError("--view-memory holds views that come again: say how many with --views")
    if args.ema is not None and not 0 < args.ema < 1:
        raise UsageError(f"--ema must lie between 0 and 1, such as 0.9999; got {args.ema}")
    if args.lr_scheduler == "const-cooldown" and args.epochs_cooldown is None:
        raise UsageError("--lr-scheduler const-cooldown needs --epochs-cooldown")
    for sink in filter(None, args.report_to.split(",")):
        if sink not in ("tensorboard", "wandb"):
            raise UsageError(f"--report-to '{sink}': expected tensorboard, wandb or both")
        if importlib.util.find_spec(sink) is None:
            raise UsageError(f"--report-to {sink}: the package is missing: pip install {sink}")
    for path in args.model_config:
        if not Path(path).is_file():
            raise UsageError(f"--model-config '{path}': no such file; expected an OpenCLIP JSON")


def _check_teachers(args: argparse.Namespace) -> None:
    names = args.distill_model.split(",") if args.distill_model else []
    weights = args.distill_pretrained.split(",") if args.distill_pretrained else []
    count = max(len(names), len(args.teacher_cache.split(",")) if args.teacher_cache else 0)
    if args.distill in ("rdm", "cifd") and count > 1:
        raise UsageError(f"--distill {args.distill} takes one teacher, got {count}")
    if args.distill == "none":
        if names or weights or args.teacher_cache:
            raise UsageError(
                "--distill-model, --distill-pretrained and --teacher-cache name a teacher, but "
                "--distill is none; choose a method, such as --distill cifd"
            )
        return
    if args.teacher_cache and args.val_data:
        raise UsageError(
            "--val-data needs the live teacher, --teacher-cache is there to do without: leave one "
            "of them out"
        )
    if args.teacher_cache and not weights:
        return  # the cache knows its teacher
    if not names:
        raise UsageError(
            f"--distill {args.distill} needs a teacher: --distill-model NAME and "
            "--distill-pretrained TAG_OR_PATH"
        )
    check_teacher_weights(args)


def check_teacher_weights(args: argparse.Namespace) -> None:
    """Refuse teachers of ``--distill-model`` without weights, or weights without a teacher."""
    names = args.distill_model.split(",")
    weights = args.distill_pretrained.split(",") if args.distill_pretrained else []
    needed = sum(not _own_weights(name) for name in names)
    if len(weights) != needed:
        raise UsageError(
            f"--distill-pretrained names {len(weights)} weights, but --distill-model "
            f"'{args.distill_model}' needs {needed} (none for local-dir: models)"
        )


def bank_folder(place: Path) -> Path:
    """The bank of a run directory (``bank`` or ``rdm/bank``); any other place as it is."""
    found = (b for b in (place / "bank", place / "rdm" / "bank") if holds_bank(b))
    return next(found, place)


def holds_bank(folder: Path) -> bool:
    """Whether there is a bank's file of weights."""
    return (folder / "bank.safetensors").is_file()


def _defaults(args: argparse.Namespace) -> None:
    given = Path(args.rdm_bank or "")
    if args.rdm_bank and (found := bank_folder(given)) != given:
        args.rdm_bank = str(found)
    bank = Path(args.rdm_bank or "") / "config.json"
    if args.rdm_bank and bank.is_file():
        rates = json.loads(bank.read_text())["rates"]
        if args.rates not in (None, rates):
            raise UsageError(
                f"--rates {args.rates}: the bank {args.rdm_bank} has {rates}, and all of them "
                "teach; leave --rates out"
            )
        args.rates = rates
    elif args.rates is None and args.distill in ("rdm", "cifd"):
        args.rates = list(RATES)
    if args.global_batch is not None:
        args.batch_size = batch_share(args)
    vit = "vit" in args.model.lower()
    args.beta1 = 0.9 if args.beta1 is None else args.beta1
    args.beta2 = (0.98 if vit else 0.999) if args.beta2 is None else args.beta2
    args.eps = (1e-6 if vit else 1e-8) if args.eps is None else args.eps
    if args.precision == "amp_bfloat16":
        args.precision = "amp_bf16"
    if args.name is None:
        student = "bank" if args.distill == "rdm" else args.model.replace("/", "-")
        args.name = f"{args.distill}-{student}-seed{args.seed}"
