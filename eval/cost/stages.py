"""The stages of a run: which models run on how many samples, and what is kept.

A trained part costs three forward passes per sample (its own, and two for the backward's two
products); a frozen one costs one, or none where the teacher's cache stands for it.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.cost import macs
from eval.cost.macs import Clip

#: A sample's cost in forwards.
FROZEN, TRAINED = 1, 3
FLOAT32, FLOAT16 = 4, 2  # weights; the teacher cache
#: Weight, gradient and AdamW's two moments.
TRAINING_STATE, CHECKPOINT_STATE = 4 * FLOAT32, 3 * FLOAT32


@dataclass(frozen=True)
class Hardware:
    """What turns MACs into hours.

    Args:
        tflops: peak of one GPU in 10¹² floating-point operations per second, two per MAC.
        mfu: share of the peak that training reaches (model FLOPs utilisation).
    """

    tflops: float
    mfu: float

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


def total(stages: Sequence[Stage]) -> float:
    """MACs of all stages."""
    return sum(stage.macs for stage in stages)


def run_stages(args: Namespace) -> list[Stage]:
    """Every stage of a run, in order.

    Args:
        args: as `eval.cost.flags.parse` returns them.
    """
    teachers = [macs.clip(name, "--distill-model") for name in args.teachers]
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
    rdms = _rdms(args, teacher, TRAINED)
    samples = epochs * args.train_num_samples
    live, read = _teaching(args, [teacher], images=False)
    return Stage(
        "rdm",
        samples,
        (*live, rdms),
        memory_bytes=_memory(live, rdms.params),
        disk_bytes=rdms.params * (FLOAT32 + _kept(args, epochs) * CHECKPOINT_STATE),
        read_bytes=samples * read,
    )


def student_stage(
    args: Namespace, model: str, teachers: Sequence[Clip], name: str = "student"
) -> Stage:
    """Stage 2 of CIFD, and every other method's only stage."""
    options = student_options(args) if model == args.model else ()
    student = macs.clip(model, "--model", options)
    rows = args.global_batch or args.batch_size * args.accum_freq * args.gpus
    rates = len(args.rates) if args.distill == "cifd" else 0
    dims = tuple(teacher.dim for teacher in teachers)
    head = macs.head(args.distill, model, dims, rows, rates, args.projector, options)
    # Accumulation runs the towers once more for the gradients of its micro-batches, checkpointing
    # of activations once more for what it did not keep.
    passes = TRAINED + (args.accum_freq > 1) + args.grad_checkpointing
    image = FROZEN if args.lock_image and not args.lock_image_unlocked_groups else passes
    text = FROZEN if args.lock_text and not args.lock_text_unlocked_layers else passes
    trained = head.params
    trained += student.image_params if image > FROZEN else 0
    trained += student.text_params if text > FROZEN else 0
    live, read = _teaching(args, teachers, images=True)
    frozen = (*live, _rdms(args, teachers[0], FROZEN)) if rates else live
    samples = args.epochs * args.train_num_samples
    weights = student.params + head.params
    copies = 1 + bool(args.ema)  # the average beside the weights
    return Stage(
        name,
        samples,
        (
            *frozen,
            Part(f"{model} image", student.image_macs, image, student.image_params),
            Part(f"{model} text", student.text_macs, text, student.text_params),
            Part("losses and heads", head.macs, TRAINED, head.params),
        ),
        memory_bytes=_memory(frozen, trained) + FLOAT32 * (copies * weights - trained),
        disk_bytes=FLOAT32 * student.params
        + _kept(args, args.epochs) * FLOAT32 * (copies * weights + 2 * trained),
        read_bytes=samples * read,
    )


def student_options(args: Namespace) -> tuple[tuple[str, Any], ...]:
    """What the student's architecture is changed by, as `eval.cost.macs.clip` takes it."""
    size = args.force_image_size
    options = {
        "force_quick_gelu": args.force_quick_gelu,
        "force_custom_text": args.force_custom_text,
        "force_patch_dropout": args.force_patch_dropout,
        "force_image_size": size and (size[0] if len(size) == 1 else tuple(size)),
        "force_context_length": args.force_context_length,
    }
    return tuple(options.items())


def _rdms(args: Namespace, teacher: Clip, passes: int) -> Part:
    count = len(args.rates)
    bank = macs.bank(count, teacher.dim, args.rdm_hidden, args.rdm_channels)
    return Part(f"{count} RDMs", bank.macs, passes, bank.params)


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
