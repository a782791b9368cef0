"""The stages of a run: which models run on how many samples, and what is kept.

A trained part costs three forward passes per sample (its own, and two for the backward's two
products); a frozen one costs one, or none where the teacher's cache stands for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from cifd_clip.methods import DECLARED
from eval.cost import macs
from eval.cost.config import CostConfig
from eval.cost.macs import Clip
from training.clip import models
from training.clip.flags import method_options
from training.data.views import height_width as pair
from training.errors import UsageError

#: A sample's cost in forwards.
FROZEN, TRAINED = 1, 3
FLOAT32, FLOAT16 = 4, 2  # weights; the teacher cache
#: Weight, gradient and AdamW's two moments.
TRAINING_STATE, CHECKPOINT_STATE = 4 * FLOAT32, 3 * FLOAT32
#: What backward needs of each layer, in bytes a value of its tokens in bfloat16: measured on
#: ViT-S-16 and ViT-B-16 (`python -m benchmarks.gpu`); with --grad-checkpointing an estimate.
ACTIVATION, CHECKPOINTED = 37, 6
#: Assistants in the place of RDMs; True where everything larger teaches, not only the next larger.
CHAINS = {"takd": False, "dgkd": True}
DEFAULT_ASSISTANT = "ViT-B-16"


@dataclass(frozen=True)
class Part:
    """A model in a stage, or a part of one.

    Args:
        macs: of its forward pass, per sample.
        passes: how many of these a sample costs.
        model_macs: those of the whole model [its own].
    """

    name: str
    macs: float
    passes: int
    params: int
    model_macs: float | None = None

    @property
    def training_macs(self) -> float:
        return self.macs * self.passes


@dataclass(frozen=True)
class Stage:
    """One of a run's stages: ``cache``, ``rdm``, ``student``, or an assistant's.

    Args:
        samples: image–text pairs that go through it, over all epochs.
        memory_bytes: weights, gradients and optimizer state, on every GPU.
        activation_bytes: of a micro-batch, which come to it; of OpenCLIP's own towers alone.
        disk_bytes: what it leaves behind: cache, bank, student, checkpoints.
        read_bytes: what it reads from shards and caches.
    """

    name: str
    samples: int
    parts: tuple[Part, ...]
    memory_bytes: int
    disk_bytes: int
    read_bytes: int
    activation_bytes: int = 0

    @property
    def macs(self) -> float:
        return self.samples * sum(part.training_macs for part in self.parts)


def total(stages: Sequence[Stage]) -> float:
    """MACs of all stages."""
    return sum(stage.macs for stage in stages)


def gpu_hours(config: CostConfig, stages: Sequence[Stage]) -> float:
    """Hours on one GPU; two floating-point operations are a MAC."""
    at_peak = sum(
        2 * stage.samples * part.training_macs / config.share(part.model_macs or part.macs)
        for stage in stages
        for part in stage.parts
    )
    return at_peak / (config.tflops * 1e12) / 3600


def run_stages(config: CostConfig) -> list[Stage]:
    """Every stage of a run, in order."""
    teachers = [macs.clip(name, "--distill-model") for name in config.architectures]
    stages = [cache_stage(config, teacher) for teacher in teachers if config.teacher_cache]
    if config.distill == "rdm":
        return [*stages, rdm_stage(config, teachers[0], config.epochs)]
    if config.distill == "cifd" and config.rates and not config.rdm_bank:
        stages += [rdm_stage(config, teacher, config.rdm_epochs) for teacher in teachers]
    return [*stages, student_stage(config, config.model, teachers)]


def cache_stage(config: CostConfig, teacher: Clip, name: str = "cache") -> Stage:
    """One pass of a teacher over ``--views`` views of the whole data set."""
    samples, views = config.covered, config.views
    text_views = 1 if config.captions == "first" else views
    return Stage(
        name,
        samples * views,
        (Part(teacher.name, teacher.macs, FROZEN, teacher.params),),
        memory_bytes=FLOAT32 * teacher.params,
        disk_bytes=samples * (views + text_views) * teacher.dim * FLOAT16,
        read_bytes=samples * views * config.sample_bytes,
    )


def rdm_stage(config: CostConfig, teacher: Clip, epochs: int) -> Stage:
    """Stage 1 of CIFD: the bank on the teacher's embeddings."""
    rdms = _rdms(config, teacher, TRAINED)
    samples = epochs * config.train_num_samples
    live, read = _teaching(config, [teacher], images=False)
    return Stage(
        "rdm",
        samples,
        (*live, rdms),
        memory_bytes=_memory(live, rdms.params),
        disk_bytes=rdms.params * (FLOAT32 + _kept(config, epochs) * CHECKPOINT_STATE),
        read_bytes=samples * read,
    )


def student_stage(
    config: CostConfig, model: str, teachers: Sequence[Clip], name: str = "student"
) -> Stage:
    """Stage 2 of CIFD, and every other method's only stage."""
    forced = tuple(models.forced(config).items()) if model == config.model else ()
    student = macs.clip(model, "--model", forced)
    dims = tuple(teacher.dim for teacher in teachers)
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in config.options.items()}
    head = macs.head(
        config.distill,
        model,
        dims,
        config.global_batch,
        len(config.rates),
        tuple(options.items()),
        forced,
    )
    # Accumulation runs the towers once more for the gradients of its micro-batches, checkpointing
    # of activations once more for what it did not keep.
    passes = TRAINED + (config.accum_freq > 1) + config.grad_checkpointing
    image = FROZEN if config.lock_image and not config.lock_image_unlocked_groups else passes
    text = FROZEN if config.lock_text and not config.lock_text_unlocked_layers else passes
    trained = head.params
    trained += student.image.params if image > FROZEN else 0
    trained += student.text.params if text > FROZEN else 0
    live, read = _teaching(config, teachers, images=True)
    frozen = (*live, _rdms(config, teachers[0], FROZEN)) if config.rates else live
    samples = config.epochs * config.train_num_samples
    weights = student.params + head.params
    copies = 1 + bool(config.ema)  # the average beside the weights
    return Stage(
        name,
        samples,
        (
            *frozen,
            Part(f"{model} image", student.image.macs, image, student.image.params, student.macs),
            Part(f"{model} text", student.text.macs, text, student.text.params, student.macs),
            Part("losses and heads", head.macs, TRAINED, head.params, student.macs),
        ),
        memory_bytes=_memory(frozen, trained) + FLOAT32 * (copies * weights - trained),
        disk_bytes=FLOAT32 * student.params
        + _kept(config, config.epochs) * FLOAT32 * (copies * weights + 2 * trained),
        read_bytes=samples * read,
        activation_bytes=_activations(config, model),
    )


def _activations(config: CostConfig, model: str) -> int:
    """Bytes that a micro-batch keeps for its backward in OpenCLIP's own ViT and text towers."""
    own = model == config.model
    stock = models.student_config(config) if own else models.model_config(model, "--assistants")
    vision, text = stock["vision_cfg"], stock["text_cfg"]
    values = 0
    if isinstance(vision.get("layers"), int):  # a ResNet has several
        tokens = math.prod(side // vision["patch_size"] for side in pair(vision["image_size"])) + 1
        values += tokens * vision["width"] * vision["layers"]
    if "hf_model_name" not in text:
        tokens = text.get("context_length", 77)
        values += tokens * text.get("width", 512) * text.get("layers", 12)
    each = CHECKPOINTED if config.grad_checkpointing else ACTIVATION
    return each * config.batch_size * values


def _rdms(config: CostConfig, teacher: Clip, passes: int) -> Part:
    count = len(config.rates)
    bank = macs.bank(count, teacher.dim, config.rdm_hidden, config.rdm_channels)
    return Part(f"{count} RDMs", bank.macs, passes, bank.params)


def _teaching(
    config: CostConfig, teachers: Sequence[Clip], images: bool
) -> tuple[tuple[Part, ...], int]:
    """The frozen models that run on every sample, and the bytes read for it."""
    if not config.teacher_cache:
        parts = tuple(Part(t.name, t.macs, FROZEN, t.params) for t in teachers)
        return parts, config.sample_bytes
    # A cached stage 1 reads embeddings only.
    return (), images * config.sample_bytes + sum(2 * t.dim * FLOAT16 for t in teachers)


def _memory(frozen: Sequence[Part], trained: int) -> int:
    return FLOAT32 * sum(p.params for p in frozen) + TRAINING_STATE * trained


def _kept(config: CostConfig, epochs: int) -> int:
    saved = max(1, epochs // (config.save_frequency or epochs))
    return min(config.keep, saved) if config.keep else saved


def compare(config: CostConfig) -> dict[str, dict[str, list[Stage]]]:
    """Stages of every method, ``{"live": ..., "cached": ...}``; of chains where there are any."""
    chains = CHAINS if assistant_names(config) else ()
    return {
        method: {way: method_stages(config, method, way == "cached") for way in ("live", "cached")}
        for method in (*DECLARED, *chains)
    }


def method_stages(config: CostConfig, method: str, cached: bool) -> list[Stage]:
    """A method's stages with the teacher, student and data of a configuration.

    TAKD distils each model of the chain teacher, assistants, student from the one before, DGKD
    from all before; every assistant is trained for as long as the student. MobileCLIP has two
    teachers of the teacher's size, as in the paper's Table 14. ``cached``: each frozen model runs
    once, on ``--views`` views of the data set.
    """
    distill, teacher = "kd" if method in CHAINS else method, config.architectures[:1]
    run = replace(
        config,
        distill=distill,
        options=method_options(distill, config.options),
        rates=config.rates if distill == "cifd" else (),
        architectures={"none": (), "mobileclip": 2 * teacher}.get(method, teacher),
        teacher_cache="cache" if cached else "",
        rdm_bank="",
        views=config.views or 2,
    )
    return chain_stages(run, CHAINS[method]) if method in CHAINS else run_stages(run)


def chain_stages(config: CostConfig, dense: bool) -> list[Stage]:
    """KD's stages for each assistant and the student; `dense` if everything larger teaches."""
    larger, stages = [macs.clip(config.architectures[0], "--distill-model")], []
    for name in (*assistant_names(config), config.model):
        if config.teacher_cache:
            stages.append(cache_stage(config, larger[-1], f"cache of {larger[-1].name}"))
        title = "student" if name == config.model else f"assistant {name}"
        stages.append(student_stage(config, name, larger if dense else larger[-1:], title))
        larger = [*larger, macs.clip(name, "--assistants")]
    return stages


def assistant_names(config: CostConfig) -> list[str]:
    """``--assistants``, largest first, or the default one if it lies between the two models.

    Raises:
        UsageError: those named do not.
    """
    teacher = config.architectures[0]
    names = config.assistants.split(",") if config.assistants else [DEFAULT_ASSISTANT]
    student = macs.clip(config.model, "--model", tuple(models.forced(config).items()))
    sizes = [macs.clip(name, "--assistants").macs for name in (teacher, *names)] + [student.macs]
    if all(larger > smaller for larger, smaller in pairwise(sizes)):
        return names
    if config.assistants:
        raise UsageError(
            f"--assistants {config.assistants}: expected models that grow smaller from the teacher "
            f"{teacher} to the student {config.model}, got {[round(s / 1e9, 1) for s in sizes]} "
            "GMACs"
        )
    return []
