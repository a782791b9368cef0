"""The two stages as the loop sees them: what trains, what it reads, what it leaves behind."""

import copy
import logging
import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from cifd_clip import (
    METHODS,
    DistillationTask,
    RDMBank,
    RDMTask,
    Student,
    Task,
    Teacher,
    World,
    with_assistants,
)
from cifd_clip.losses import Features
from cifd_clip.noise import Noise, derive_seed
from training.clip.cache import CachedTeachers
from training.clip.flags import teacher_names
from training.clip.models import (
    build_student,
    build_teachers,
    model_config,
    quiet,
    save_student,
    student_config,
)
from training.data.index import Sources
from training.data.loader import Batch, Fetcher
from training.data.views import ImageSpec, View, eval_view, normalise, train_view
from training.errors import UsageError


class Inputs:
    """The distinct image transforms and tokenizers that a run's models need.

    Models whose images differ only in mean and std share one uint8 image, unless the augmentation
    works on normalised images.

    Args:
        aug_cfg: ``--aug-cfg``.
    """

    def __init__(self, aug_cfg: dict | None = None):
        self.aug_cfg = aug_cfg
        try:
            self._normalised = bool(train_view(ImageSpec(), aug_cfg).finish)
        except (TypeError, ValueError) as error:
            told = " ".join(f"{key}={value}" for key, value in aug_cfg.items())
            raise UsageError(f"--aug-cfg {told}: OpenCLIP can't use it: {error}") from error
        self.specs: list[ImageSpec] = []
        self.tokenizers: list[Callable[[list[str]], Tensor]] = []
        self._tokenizer_keys: list[tuple] = []

    def add_images(self, spec: ImageSpec) -> int:
        """The place in ``Batch.images`` of a model's images."""
        known = [self._shared(s) for s in self.specs]
        if self._shared(spec) not in known:
            self.specs.append(spec)
            return len(known)
        return known.index(self._shared(spec))

    def _shared(self, spec: ImageSpec) -> ImageSpec:
        """What models that share an image agree in."""
        return spec if self._normalised else replace(spec, mean=(), std=())

    def add_texts(self, name: str, config: dict) -> int:
        """The place in ``Batch.texts`` of a model's tokens."""
        text = config.get("text_cfg", {})
        with quiet():
            tokenizer = open_clip.get_tokenizer(name, context_length=text.get("context_length"))
        source = text.get("hf_tokenizer_name", "")
        options = repr(sorted(text.get("tokenizer_kwargs", {}).items()))
        key = (type(tokenizer).__name__, tokenizer.context_length, source, options)
        if key not in self._tokenizer_keys:
            self._tokenizer_keys.append(key)
            self.tokenizers.append(tokenizer)
        return self._tokenizer_keys.index(key)

    def train_views(self) -> list[View]:
        """The augmenting transforms."""
        return [train_view(spec, self.aug_cfg) for spec in self.specs]

    def eval_views(self) -> list[View]:
        """The transforms without augmentation."""
        return [eval_view(spec) for spec in self.specs]


class LiveTeachers:
    """Teachers that run on the batch's own images and texts."""

    def __init__(self, teachers: list[Teacher], configs: list[dict], inputs: Inputs):
        self.teachers = teachers
        self.specs = [ImageSpec.of(t.model.visual.preprocess_cfg) for t in teachers]
        self.images = [inputs.add_images(spec) for spec in self.specs]
        self.texts = [inputs.add_texts(t.name, c) for t, c in zip(teachers, configs)]

    @property
    def dims(self) -> list[int]:
        """T of each teacher."""
        return [t.dim for t in self.teachers]

    @property
    def identities(self) -> list[dict]:
        """Who they are."""
        return [t.identity for t in self.teachers]

    def fetchers(self, sources: Sources) -> list[Fetcher]:
        """Nothing that the loader would have to deliver."""
        return []

    def __call__(self, batch: Batch) -> list[Features]:
        """Every teacher's features of a batch."""
        return [
            teacher(normalise(batch.images[image], spec), batch.texts[text])
            for teacher, spec, image, text in zip(
                self.teachers, self.specs, self.images, self.texts
            )
        ]


class Stage:
    """What the loop needs of a stage.

    Attributes:
        task: the one trainable module.
        inputs: what the loader must deliver.
        source: the teachers.
        rates: R of each assistant that is trained here.
        average: a copy of the task that holds the moving average of its weights (``--ema``).
    """

    task: Task
    inputs: Inputs
    source: LiveTeachers | CachedTeachers
    rates: list[float]
    bank: RDMBank | None = None
    average: Task | None = None

    @property
    def shipped(self) -> Task:
        """What is validated and shipped: the task, or the average of its weights."""
        return self.task if self.average is None else self.average

    def taught_by(self) -> dict[str, Any]:
        """Who the teachers are, and what the bank is: for the run directory."""
        bank = None if self.bank is None else self.bank.config()
        return {"teachers": self.source.identities, "bank": bank}

    def student_inputs(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Normalised images and tokens for ``task.encode``."""
        return None, None

    def teachers(self, batch: Batch) -> list[Features]:
        """Features of every teacher."""
        return self.source(batch)

    def assisted(self, teachers: list[Features], noise: Noise | None) -> list[Features]:
        """The teachers of a whole batch and their assistants."""
        return teachers

    def payload(self) -> dict[str, Any]:
        """The stage's part of a checkpoint."""
        raise NotImplementedError

    def load(self, payload: dict[str, Any]) -> None:
        """Take `payload` back."""
        raise NotImplementedError

    def finish(self, directory: Path) -> None:
        """Write what the stage is for into the run directory."""
        raise NotImplementedError


class RDMStage(Stage):
    """Stage 1: train the bank of the (only) teacher."""

    def __init__(self, args: Namespace, device: torch.device):
        self.inputs = Inputs(args.aug_cfg)
        self.source = make_teachers(args, device, self.inputs)
        self.bank = RDMBank(
            self.source.identities[0],
            args.rates,
            self.source.dims[0],
            bank_widths(args, self.source.dims[0]),
            generator=torch.Generator().manual_seed(derive_seed(args.seed, "bank")),
        )
        self.rates = self.bank.rates
        self.task = RDMTask(self.bank).to(device)

    def payload(self) -> dict[str, Any]:
        return {"bank": self.bank.state_dict(), "bank_config": self.bank.config()}

    def load(self, payload: dict[str, Any]) -> None:
        self.bank.load_state_dict(payload["bank"])

    def finish(self, directory: Path) -> None:
        self.bank.save(directory / "bank")
        logging.info("wrote the bank %s", directory / "bank")


class StudentStage(Stage):
    """Stage 2 of CIFD, every other method, and training without a teacher."""

    def __init__(self, args: Namespace, device: torch.device, world: World):
        self.inputs = Inputs(args.aug_cfg)
        self.config = student_config(args)
        model = build_student(args)
        self.spec = ImageSpec.of(model.visual.preprocess_cfg)
        self.images = self.inputs.add_images(self.spec)
        self.texts = self.inputs.add_texts(args.model, self.config)
        self.source = make_teachers(args, device, self.inputs)
        self.bank = load_bank(args, self.source).to(device) if args.rdm_bank else None
        self.lambda_n, self.rdm_output = args.lambda_n, args.rdm_output
        dims = list(self.source.dims)
        self.own_space = None
        if self.bank is not None and args.projector == "each":
            self.own_space = len(dims)
            dims += dims[:1] * len(self.bank.rates)
        self.rates = []
        if args.use_bn_sync and world.size > 1:
            model = convert_sync_batchnorm(model)  # timm's keeps the activations of its own layers
        self.task = make_task(args, model, dims, world)
        self.task.to(device, memory_format=torch.channels_last)  # convolutions run faster
        if not self.task.method.uses_logit_scale:
            self._fix_temperature(model)
        if args.ema is not None:
            self.average = copy.deepcopy(self.task).requires_grad_(False).eval()
        if args.torchcompile:
            self.task.student.compile()

    def _fix_temperature(self, model: nn.Module) -> None:
        """No term trains the temperature: ship the teacher's, and give it no gradient."""
        model.logit_scale.requires_grad_(False)
        with torch.no_grad():
            model.logit_scale.fill_(self.source.identities[0]["logit_scale"]).log_()
        if model.logit_bias is not None:
            model.logit_bias.requires_grad_(False)

    def student_inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return normalise(batch.images[self.images], self.spec), batch.texts[self.texts]

    def assisted(self, teachers: list[Features], noise: Noise | None) -> list[Features]:
        if self.bank is None:
            return teachers
        return with_assistants(
            self.bank, teachers, [self.lambda_n], noise, self.rdm_output, self.own_space
        )

    def payload(self) -> dict[str, Any]:
        """``state_dict`` is what ships; with an average, what trains lies under ``training``."""
        content = _content(self.shipped)
        if self.average is not None:
            content["training"] = _content(self.task)
        return content

    def load(self, payload: dict[str, Any]) -> None:
        _take(self.shipped, payload)
        if self.average is not None:
            _take(self.task, payload["training"])

    def finish(self, directory: Path) -> None:
        tokenizer = self.inputs.tokenizers[self.texts]
        save_student(self.shipped.student.model, self.config, directory / "student", tokenizer)
        logging.info("wrote the student %s", directory / "student")


def _content(task: DistillationTask) -> dict[str, Any]:
    return {"state_dict": task.student.model.state_dict(), "method": task.method.state_dict()}


def _take(task: DistillationTask, content: dict[str, Any]) -> None:
    task.student.model.load_state_dict(content["state_dict"])
    # Runs older than --projector have its weights under another name.
    older = re.compile(r"^projectors\.(?!heads\.)")
    method = {older.sub("projectors.heads.", name): t for name, t in content["method"].items()}
    task.method.load_state_dict(method)


def make_task(
    args: Namespace, model: nn.Module, teacher_dims: list[int], world: World
) -> DistillationTask:
    """A student under the method that the flags describe."""
    student = Student(model, args.ibm_site)
    method = METHODS[args.distill]
    chosen = {
        "lambda_cl": args.lambda_cl,
        "lambda_i": args.lambda_i,
        "ibm": not args.no_ibm,
        "ibm_site": args.ibm_site,
        "ibm_branch": args.ibm_branch,
        "projector": args.projector,
        "lambda_kd": args.lambda_kd,
        "lambda_fd": args.lambda_fd,
        "lambda_crd": args.lambda_crd,
        "lambda_icl": args.lambda_icl,
    }
    declared = {option.name for option in method.declaration.options}
    options = {name: value for name, value in chosen.items() if name in declared}
    if args.distill != "cifd":
        options.pop("ibm", None)
    generator = torch.Generator().manual_seed(derive_seed(args.seed, "method"))
    return DistillationTask(student, method(student, teacher_dims, options, generator), world)


def bank_widths(args: Namespace, dim: int) -> tuple[int, int, int]:
    """Widths of the hidden layers of ``--rdm-hidden`` and ``--rdm-channels``."""
    hidden = args.rdm_hidden or dim
    return hidden, args.rdm_channels or dim, hidden


def make_teachers(
    args: Namespace, device: torch.device, inputs: Inputs
) -> LiveTeachers | CachedTeachers:
    """The teachers of the command line, from their caches or run on every batch."""
    if args.teacher_cache:
        directories = [Path(d) for d in args.teacher_cache.split(",")]
        names = teacher_names(args)
        wanted = {n: getattr(args, n) for n in ("view_seed", "views", "captions", "aug_cfg")}
        return CachedTeachers(directories, names, wanted)
    configs = [model_config(name, "--distill-model") for name, _ in teacher_names(args)]
    return LiveTeachers(build_teachers(args, device), configs, inputs)


def load_bank(args: Namespace, source: LiveTeachers | CachedTeachers) -> RDMBank:
    """The frozen bank of ``--rdm-bank``.

    Raises:
        UsageError: it is missing, or another teacher's.
    """
    try:
        return RDMBank.load(Path(args.rdm_bank), source.identities[0])
    except FileNotFoundError as error:
        raise UsageError(
            f"--rdm-bank: {error}; train one with --distill rdm, or leave --rdm-bank out"
        ) from error
    except ValueError as error:
        raise UsageError(f"--rdm-bank: {error}; train a bank for this teacher") from error
