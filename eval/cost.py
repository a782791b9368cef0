"""``python -m eval.cost``: MACs, bytes and GPU hours of every stage of a run, before it starts.

Takes flags of `training.main` (a recipe), reads those that cost depends on, and counts models from
their architectures. A trained part costs three forward passes per sample (its own, and two for the
backward's two products); a frozen one costs one, or none where the teacher's cache stands for it.
"""

import argparse
import json
import math
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import open_clip

from eval import macs
from eval.macs import FROZEN, TRAINED, Clip
from training.errors import UsageError, cli
from training.rundir import environment

FLOAT32 = 4
#: Weight, gradient and AdamW's two moments.
TRAINING_STATE, CHECKPOINT_STATE = 4 * FLOAT32, 3 * FLOAT32
FLOAT16 = 2  # the teacher cache's


@dataclass(frozen=True)
class Hardware:
    """What turns MACs into hours.

    Args:
        tflops: peak of one GPU in 10¹² floating-point operations per second, two per MAC.
        mfu: share of the peak that training reaches (model FLOPs utilisation).
    """

    tflops: float = 312.0
    mfu: float = 0.35

    def hours(self, macs: float) -> float:
        """GPU hours of that many MACs."""
        return 2 * macs / (self.tflops * 1e12 * self.mfu) / 3600


@dataclass(frozen=True)
class Part:
    """One model in a stage.

    Args:
        name: of the model.
        macs: forward, per sample.
        passes: how many forwards' worth a sample costs.
        params: its parameters.
    """

    name: str
    macs: float
    passes: int
    params: int

    @property
    def training_macs(self) -> float:
        """MACs per sample, the backward pass included."""
        return self.macs * self.passes


@dataclass(frozen=True)
class Stage:
    """One of a run's stages.

    Args:
        name: ``cache``, ``rdm``, ``student``, or an assistant's.
        samples: image–text pairs that go through it, over all epochs.
        parts: what runs.
        memory_bytes: weights, gradients and optimizer state, on every GPU; no activations.
        disk_bytes: what it leaves behind: cache, bank, student, checkpoints.
        read_bytes: what it reads from shards and caches.
    """

    name: str
    samples: int
    parts: tuple[Part, ...]
    memory_bytes: int
    disk_bytes: int
    read_bytes: int

    @property
    def macs(self) -> float:
        """MACs of the whole stage."""
        return self.samples * sum(part.training_macs for part in self.parts)


# -- the stages of a command line ------------------------------------------------------------------


def stages(args: Namespace) -> list[Stage]:
    """Every stage of a run, in order.

    Args:
        args: as `parse` returns them.
    """
    teachers = [macs.clip(name, "--distill-model") for name in teacher_names(args)]
    found = [cache_stage(args, teacher) for teacher in teachers if args.teacher_cache]
    if args.distill == "rdm":
        return [*found, rdm_stage(args, teachers[0], args.epochs)]
    if args.distill == "cifd" and args.rates and not args.rdm_bank:
        found.append(rdm_stage(args, teachers[0], args.rdm_epochs))
    return [*found, student_stage(args, args.model, teachers)]


def cache_stage(args: Namespace, teacher: Clip, name: str = "cache") -> Stage:
    """One pass of a teacher over ``--views`` views of the whole data set."""
    samples = args.dataset_samples
    text_views = args.views if args.captions == "all" else 1
    return Stage(
        name,
        samples * args.views,
        (Part(teacher.name, teacher.macs, FROZEN, teacher.params),),
        memory_bytes=FLOAT32 * teacher.params,
        disk_bytes=samples * (args.views + text_views) * teacher.dim * FLOAT16,
        read_bytes=samples * args.views * args.sample_bytes,
    )


def rdm_stage(args: Namespace, teacher: Clip, epochs: int) -> Stage:
    """Stage 1 of CIFD: the bank on the teacher's embeddings."""
    bank = macs.bank(len(args.rates), teacher.dim, args.rdm_hidden, args.rdm_channels)
    samples = epochs * args.train_num_samples
    live, read = _teaching(args, [teacher], images=False)
    return Stage(
        "rdm",
        samples,
        (*live, Part(f"{len(args.rates)} RDMs", bank.macs, TRAINED, bank.params)),
        memory_bytes=_memory(live, bank.params),
        disk_bytes=bank.params * (FLOAT32 + _kept(args, epochs) * CHECKPOINT_STATE),
        read_bytes=samples * read,
    )


def student_stage(
    args: Namespace, model: str, teachers: Sequence[Clip], name: str = "student"
) -> Stage:
    """Stage 2 of CIFD, and every other method's only stage."""
    options = _student_options(args) if model == args.model else ()
    student = macs.clip(model, "--model", options)
    rows = args.global_batch or args.batch_size * args.accum_freq * args.gpus
    rdms = len(args.rates) if args.distill == "cifd" else 0
    dims = tuple(teacher.dim for teacher in teachers)
    head = macs.head(args.distill, model, dims, rows, rdms, options)
    # Accumulation runs the towers once more for the gradients of its micro-batches, checkpointing
    # of activations once more for what it did not keep.
    passes = TRAINED + (args.accum_freq > 1) + args.grad_checkpointing
    image = FROZEN if args.lock_image and not args.lock_image_unlocked_groups else passes
    text = FROZEN if args.lock_text and not args.lock_text_unlocked_layers else passes
    trained = head.params
    trained += student.image_params if image > FROZEN else 0
    trained += student.text_params if text > FROZEN else 0
    live, read = _teaching(args, teachers, images=True)
    if rdms:
        bank = macs.bank(rdms, teachers[0].dim, args.rdm_hidden, args.rdm_channels)
        live += (Part(f"{rdms} RDMs", bank.macs, FROZEN, bank.params),)
    samples = args.epochs * args.train_num_samples
    weights = student.params + head.params
    copies = 1 + bool(args.ema)  # the average beside the weights
    return Stage(
        name,
        samples,
        (
            *live,
            Part(f"{model} image", student.image_macs, image, student.image_params),
            Part(f"{model} text", student.text_macs, text, student.text_params),
            Part("losses and heads", head.macs, TRAINED, head.params),
        ),
        memory_bytes=_memory(live, trained) + FLOAT32 * (copies * weights - trained),
        disk_bytes=FLOAT32 * student.params
        + _kept(args, args.epochs) * FLOAT32 * (copies * weights + 2 * trained),
        read_bytes=samples * read,
    )


def _teaching(
    args: Namespace, teachers: Sequence[Clip], images: bool
) -> tuple[tuple[Part, ...], int]:
    """The frozen models that run on every sample, and the bytes read for it."""
    if not args.teacher_cache:
        parts = tuple(Part(t.name, t.macs, FROZEN, t.params) for t in teachers)
        return parts, args.sample_bytes
    # A cached stage 1 reads embeddings only.
    return (), images * args.sample_bytes + sum(2 * t.dim * FLOAT16 for t in teachers)


def _memory(frozen: Sequence[Part], trained: int) -> int:
    return FLOAT32 * sum(p.params for p in frozen) + TRAINING_STATE * trained


def _kept(args: Namespace, epochs: int) -> int:
    """Checkpoints on disk in the end."""
    saved = max(1, epochs // args.save_frequency)
    return min(args.keep, saved) if args.keep else saved


def _student_options(args: Namespace) -> tuple[tuple[str, Any], ...]:
    size = args.force_image_size
    options = {
        "force_quick_gelu": args.force_quick_gelu,
        "force_custom_text": args.force_custom_text,
        "force_patch_dropout": args.force_patch_dropout,
        "force_image_size": size and (size[0] if len(size) == 1 else tuple(size)),
        "force_context_length": args.force_context_length,
    }
    return tuple(options.items())


# -- every method beside the others ---------------------------------------------------------------

#: Assistants in the place of RDMs; True where everything larger teaches, not only the next larger.
CHAINS = {"takd": False, "dgkd": True}
DEFAULT_ASSISTANT = "ViT-B-16"


def method_stages(args: Namespace, method: str, cached: bool) -> list[Stage]:
    """A method's stages with the teacher, student and data of a command line.

    TAKD distils each model of the chain teacher, assistants, student from the one before, DGKD
    from all before; every assistant is trained for as long as the student. MobileCLIP has two
    teachers of the teacher's size, as in the paper's Table 14.

    Args:
        args: as `parse` returns them.
        method: a name of `cifd_clip.METHODS` or of `CHAINS`.
        cached: whether each frozen model runs once, on ``--views`` views of the data set.

    Returns:
        None of them where no assistant lies between teacher and student.
    """
    teacher = teacher_names(args)[0]
    cache = "cache" if cached and method != "none" else None
    args = _with(args, distill=method, teacher_cache=cache, rdm_bank=None, distill_model=teacher)
    args.views = args.views or 2
    if method == "mobileclip":
        args.distill_model = f"{teacher},{teacher}"
    if method not in CHAINS:
        return stages(args)
    args.distill = "kd"
    names = assistant_names(args, teacher)
    larger, found = [macs.clip(teacher, "--distill-model")], []
    for name in (*names, args.model) if names else ():
        if cached:
            found.append(cache_stage(args, larger[-1], f"cache of {larger[-1].name}"))
        teachers = larger if CHAINS[method] else larger[-1:]
        title = "student" if name == args.model else f"assistant {name}"
        found.append(student_stage(args, name, teachers, title))
        larger = [*larger, macs.clip(name, "--assistants")]
    return found


def assistant_names(args: Namespace, teacher: str) -> list[str]:
    """``--assistants``, largest first, or the default one if it lies between the two models.

    Raises:
        UsageError: those named do not.
    """
    names = args.assistants.split(",") if args.assistants else [DEFAULT_ASSISTANT]
    student = macs.clip(args.model, "--model", _student_options(args))
    sizes = [macs.clip(name, "--assistants").macs for name in (teacher, *names)] + [student.macs]
    if all(larger > smaller for larger, smaller in pairwise(sizes)):
        return names
    if args.assistants:
        raise UsageError(
            f"--assistants {args.assistants}: expected models that grow smaller from the teacher "
            f"{teacher} to the student {args.model}, got {[round(s / 1e9, 1) for s in sizes]} GMACs"
        )
    return []


def compare(args: Namespace) -> dict[str, dict[str, list[Stage]]]:
    """Stages of every method, ``{"live": ..., "cached": ...}``; assistants where there are some."""
    found = {}
    for method in (*macs.METHODS, *CHAINS):
        ways = {w: method_stages(args, method, w == "cached") for w in ("live", "cached")}
        if ways["live"]:
            found[method] = ways
    return found


def _with(args: Namespace, **changes: Any) -> Namespace:
    return Namespace(**{**vars(args), **changes})


def total(stages: Sequence[Stage]) -> float:
    """MACs of all stages."""
    return sum(stage.macs for stage in stages)


# -- the command line ------------------------------------------------------------------------------


def gpu_hours(flags: list[str]) -> dict[str, float]:
    """GPU hours by stage of a command line of `training.main`.

    Raises:
        UsageError: a flag that cost depends on is missing or wrong.
    """
    return summary(parse(flags))["hours"]


def summary(args: Namespace) -> dict[str, dict[str, float]]:
    """``{"hours": {stage: GPU hours}, "disk_bytes": {stage: bytes}}``."""
    hardware = Hardware(args.tflops, args.mfu)
    hours: dict[str, float] = {}
    disk: dict[str, float] = {}
    for stage in stages(args):  # several teachers have several caches
        hours[stage.name] = hours.get(stage.name, 0) + hardware.hours(stage.macs)
        disk[stage.name] = disk.get(stage.name, 0) + stage.disk_bytes
    return {"hours": hours, "disk_bytes": disk}


class _Parser(argparse.ArgumentParser):
    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return shlex.split(arg_line, comments=True)

    def error(self, message: str):
        raise UsageError(f"{message} (see --help)")


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=100)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X"}.get(action.type, "NAME")


def parser() -> argparse.ArgumentParser:
    """The command line: flags of `training.main` that cost depends on, and the machine's."""
    p = _Parser(
        prog="python -m eval.cost",
        description=__doc__.partition("\n\n")[2],
        usage="python -m eval.cost [@recipe.args] [flags of training.main] [flags]",
        fromfile_prefix_chars="@",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    recipe_flags(
        p.add_argument_group(
            "a run",
            "flags of training.main that cost depends on (see its --help); its other flags are "
            "passed over",
        )
    )
    own = p.add_argument_group("what a run does not know beforehand")
    own.add_argument("--gpus", type=int, default=1, help="processes that share a global batch [1]")
    own.add_argument("--tflops", type=float, default=312.0, help="peak of one GPU [312: A100 bf16]")
    own.add_argument("--mfu", type=float, default=0.35, help="share of it that is reached [0.35]")
    own.add_argument("--dataset-samples", type=int, help="samples a cache covers [one epoch's]")
    own.add_argument(
        "--sample-bytes",
        type=int,
        default=30_000,
        help="of an image and its caption in the shards [30000: CC12M at 256 px]",
    )
    own.add_argument(
        "--assistants", metavar="NAME[,NAME]", help=f"of TAKD and DGKD [{DEFAULT_ASSISTANT}]"
    )
    out = p.add_argument_group("output")
    out.add_argument(
        "--paper", action="store_true", help="the paper's own figures, counted again; no run"
    )
    out.add_argument("--hours", action="store_true", help="one line of JSON: hours, disk_bytes")
    out.add_argument(
        "--sweep-views", type=int, nargs="+", metavar="V", help="what caches of V views save"
    )
    out.add_argument("--students", nargs="+", metavar="NAME", help="of --sweep-views [--model]")
    out.add_argument("--json", metavar="FILE", help="write everything as JSON too")
    return p


def recipe_flags(g) -> None:
    """Flags under training.main's names and defaults (a test compares them)."""
    g.add_argument("--distill", default="none")
    g.add_argument("--distill-model")
    g.add_argument("--model", default="RN50")
    g.add_argument("--model-config", nargs="+", default=[])
    g.add_argument("--rates", type=float, nargs="*", default=[1000.0, 300.0, 100.0])
    g.add_argument("--rdm-bank")
    g.add_argument("--rdm-epochs", type=int, default=7)
    g.add_argument("--rdm-hidden", type=int)
    g.add_argument("--rdm-channels", type=int)
    g.add_argument("--teacher-cache")
    g.add_argument("--views", type=int, default=0)
    g.add_argument("--captions", default="first")
    g.add_argument("--train-num-samples", type=int)
    g.add_argument("--epochs", type=int, default=32)
    g.add_argument("--batch-size", type=int, default=64)
    g.add_argument("--global-batch", type=int)
    g.add_argument("--accum-freq", type=int, default=1)
    g.add_argument("--ema", type=float)
    g.add_argument("--grad-checkpointing", action="store_true")
    g.add_argument("--save-frequency", type=int, default=1)
    g.add_argument("--keep", type=int, default=3)
    g.add_argument("--force-quick-gelu", action="store_true")
    g.add_argument("--force-custom-text", action="store_true")
    g.add_argument("--force-image-size", type=int, nargs="+")
    g.add_argument("--force-context-length", type=int)
    g.add_argument("--force-patch-dropout", type=float)
    g.add_argument("--lock-image", action="store_true")
    g.add_argument("--lock-image-unlocked-groups", type=int, default=0)
    g.add_argument("--lock-text", action="store_true")
    g.add_argument("--lock-text-unlocked-layers", type=int, default=0)


def parse(flags: list[str]) -> Namespace:
    """Read a command line; flags of training.main that cost does not depend on are passed over.

    Raises:
        UsageError: see the sentence.
    """
    return _checked(_read(flags))


def _read(flags: list[str]) -> Namespace:
    for word in flags:
        if word.startswith("@") and not Path(word[1:]).is_file():
            raise UsageError(f"{word}: no such flag file")
    return parser().parse_known_args(flags)[0]


def _checked(args: Namespace) -> Namespace:
    for path in args.model_config:
        if not Path(path).is_file():
            raise UsageError(f"--model-config '{path}': no such file; expected an OpenCLIP JSON")
        open_clip.add_model_config(path)
    if args.distill not in ("rdm", *macs.METHODS):
        raise UsageError(f"--distill '{args.distill}': expected rdm or one of {[*macs.METHODS]}")
    if not args.train_num_samples:
        raise UsageError(
            "--train-num-samples is missing: the samples of an epoch, which a run takes from its "
            "shards"
        )
    for flag in ("tflops", "mfu", "gpus"):
        if getattr(args, flag) <= 0:
            raise UsageError(f"--{flag} must be positive, got {getattr(args, flag)}")
    if args.sweep_views and args.distill == "none":
        raise UsageError("--sweep-views compares caches of a teacher, but --distill is none")
    if args.dataset_samples is None:
        args.dataset_samples = args.train_num_samples
    if args.teacher_cache and not args.views:
        args.views = _written_cache(args)["views"]
    return args


def teacher_names(args: Namespace) -> list[str]:
    """Architectures of the teachers; a written cache knows its own."""
    if args.distill == "none":
        return []
    if args.distill_model:
        return args.distill_model.split(",")
    if args.teacher_cache:
        return [_written_cache(args)["teacher"]["model"]]
    raise UsageError(f"--distill {args.distill} needs a teacher: --distill-model NAME")


def _written_cache(args: Namespace) -> dict[str, Any]:
    path = Path(args.teacher_cache.split(",")[0]) / "config.json"
    if not path.is_file():
        raise UsageError(
            f"--teacher-cache '{path.parent}' is not written yet: say what it will hold with "
            "--views V and --distill-model NAME"
        )
    return json.loads(path.read_text())


def main(argv: list[str]) -> int:
    """Print what a run costs."""
    args = _read(argv)
    if args.paper:
        text, found = paper_report()
    else:
        args = _checked(args)
        if args.teacher_cache and args.dataset_samples == args.train_num_samples:
            note = "note: the cache is taken to cover one epoch's samples"
            print(f"{note}; --dataset-samples N says otherwise", file=sys.stderr)
        if args.hours:
            print(json.dumps(summary(args)))
            return 0
        text, found = views_report(args) if args.sweep_views else run_report(args)
    print(text, end="")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({**found, "environment": environment()}, indent=1, sort_keys=True)
        Path(args.json).write_text(content + "\n")
    return 0


# -- what is printed -------------------------------------------------------------------------------


def _records(found: Any, hardware: Hardware) -> Any:
    """Stages, wherever they are in dicts and lists, as JSON values."""
    if isinstance(found, Stage):
        return {**asdict(found), "macs": found.macs, "gpu_hours": hardware.hours(found.macs)}
    if isinstance(found, dict):
        return {key: _records(value, hardware) for key, value in found.items()}
    return [_records(value, hardware) for value in found]


def run_report(args: Namespace) -> tuple[str, dict[str, Any]]:
    """A run's stages, and every method with its teacher, student and data."""
    hardware = Hardware(args.tflops, args.mfu)
    own = stages(args)
    text, found = stage_report(own, hardware, args.gpus), {"stages": own}
    if args.distill != "rdm" and teacher_names(args):
        methods = compare(args)
        text += f"\n{method_report(methods, hardware, args)}"
        found["methods"] = methods
    return text, {"hardware": asdict(hardware), **_records(found, hardware)}


def views_report(args: Namespace) -> tuple[str, dict[str, Any]]:
    """What a cache of V views saves, student by student."""
    hardware = Hardware(args.tflops, args.mfu)
    rows, found = [], {}
    for student in args.students or [args.model]:
        of = _with(args, model=student)
        ways = {"live": method_stages(of, args.distill, cached=False)}
        for views in args.sweep_views:
            ways[str(views)] = method_stages(_with(of, views=views), args.distill, cached=True)
        sums = {way: total(run) for way, run in ways.items()}
        row = [student, short(hardware.hours(sums["live"]))]
        for way in list(ways)[1:]:
            row += [short(hardware.hours(sums[way])), f"{sums[way] / sums['live']:.3f}"]
        rows.append(row)
        found[student] = ways
    caches = {way: run[0] for way, run in ways.items() if way != "live"}
    head = ["student", "live GPU h", *(h for v in caches for h in (f"V = {v}", "/ live"))]
    sizes = ", ".join(f"{short(c.disk_bytes / 2**30)} GiB for {v}" for v, c in caches.items())
    taught = sum(s.samples for s in ways["live"])
    text = table(head, rows) + (
        f"\n{args.distill} under {teacher_names(args)[0]}; V views of {args.dataset_samples:,} "
        f"samples are written first, which is counted: {sizes}. The live teacher sees "
        f"{taught / 1e6:g} M samples, as many as V = {taught / args.dataset_samples:.1f} views.\n"
    )
    return text, {"hardware": asdict(hardware), **_records({"students": found}, hardware)}


def stage_report(stages: Sequence[Stage], hardware: Hardware, gpus: int) -> str:
    """What runs on every sample, and what each stage comes to."""
    per_sample = [
        [
            stage.name,
            part.name,
            short(part.params / 1e6),
            short(part.macs / 1e9),
            str(part.passes),
            short(part.training_macs / 1e9),
        ]
        for stage in stages
        for part in stage.parts
    ]
    rows = [
        [
            stage.name,
            short(stage.samples / 1e6),
            short(stage.macs / 1e15),
            short(hardware.hours(stage.macs)),
            *(short(b / 2**30) for b in (stage.memory_bytes, stage.disk_bytes, stage.read_bytes)),
        ]
        for stage in stages
    ]
    hours = hardware.hours(total(stages))
    disk, read = (
        short(sum(getattr(s, name) for s in stages) / 2**30)
        for name in ("disk_bytes", "read_bytes")
    )
    rows.append(["total", "", short(total(stages) / 1e15), short(hours), "", disk, read])
    head = ["stage", "M samples", "PMACs", "GPU h", "memory GiB", "disk GiB", "read GiB"]
    return (
        f"{per_sample_table(per_sample)}\n{table(head, rows)}\n"
        f"GPU hours at {hardware.tflops:g} TFLOPS × {hardware.mfu:g}; on {gpus} "
        f"GPU{'s' * (gpus > 1)} {short(hours / gpus)} hours. Memory: weights, gradients and "
        "optimizer state of each GPU, without activations.\n"
    )


def per_sample_table(rows: list[list[str]]) -> str:
    """What runs on every sample of each stage."""
    head = ["runs on every sample", "M parameters", "GMACs forward", "passes", "GMACs in training"]
    return table(["stage", *head], rows, words=2)


def method_report(
    methods: dict[str, dict[str, list[Stage]]], hardware: Hardware, args: Namespace
) -> str:
    """Every method with the live teacher and from caches, relative to plain KD."""
    kd = {way: total(stages) for way, stages in methods["kd"].items()}
    rows = []
    for method, ways in methods.items():
        row = [method]
        for way, found in ways.items():
            sum_ = total(found)
            row += [short(sum_ / 1e15), short(hardware.hours(sum_)), f"{sum_ / kd[way]:.3f}"]
        row.append(f"{total(ways['cached']) / total(ways['live']):.3f}")
        rows.append(row)
    head = ["method", "PMACs", "GPU h", "× kd"]
    head += ["PMACs cached", "GPU h cached", "× kd cached", "cached / live"]
    views = args.views or 2
    lines = [
        table(head, rows),
        f"Cached: every frozen model runs once on {views} views of {args.dataset_samples:,} "
        "samples, which is counted.",
    ]
    names = assistant_names(args, teacher_names(args)[0])
    if names:
        lines.append(f"takd, dgkd: assistants {', '.join(names)}, trained as long as the student.")
    else:
        lines.append(
            f"takd, dgkd: {DEFAULT_ASSISTANT} does not lie between teacher and student; name "
            "others with --assistants."
        )
    return "\n".join(lines) + "\n"


def paper_report() -> tuple[str, dict[str, Any]]:
    """Appendix D.2, Figure 1(b) and Table 1's costs, printed and counted."""
    head = ["appendix D.2", "counted as", "printed", "counted", "ratio"]
    d2, figure, one, fits = (
        macs.appendix_d2(),
        macs.figure_1b(),
        macs.table_1(),
        macs.assistants_that_fit(),
    )
    rows = [[what, how, si(p), si(c), f"{c / p:.3f}"] for what, how, p, c in d2]
    text = (
        f"{table(head, rows, words=2)}\n{ways_table('Figure 1(b), × KD', figure)}\n"
        f"3.5 and 4.5 fit one assistant: {' or '.join(fits)}.\n\n"
        f"{ways_table('Table 1, × CIFD', one)}"
    )
    return text, {"appendix_d2": d2, "figure_1b": figure, "table_1": one, "assistants": fits}


def ways_table(title: str, ways: dict[str, dict[str, float]]) -> str:
    """Methods as rows, ways of counting as columns."""
    methods = next(found for found in reversed(ways.values()))
    rows = [
        [method, *(f"{found[method]:.3f}" if method in found else "" for found in ways.values())]
        for method in methods
    ]
    return table([title, *ways], rows)


def si(value: float) -> str:
    """Four significant digits and M, G, T or P."""
    power = max(2, min(5, int(math.log10(value)) // 3))
    return f"{short(value / 1000**power)} {' kMGTP'[power]}"


def short(value: float) -> str:
    """Four significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def table(head: list[str], rows: list[list[str]], words: int = 1) -> str:
    """A Markdown table that reads as plain text too; the first columns hold words."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    sides = [str.ljust if i < words else str.rjust for i in range(len(head))]
    rule = ["-" * w if i < words else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = [head, rule, *rows]
    padded = [[side(c, w) for side, c, w in zip(sides, line, widths)] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


if __name__ == "__main__":
    cli(main)
