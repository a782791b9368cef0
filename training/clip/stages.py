"""The two stages of CLIP training: what trains, what it reads, what it leaves behind."""

import copy
import logging
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.optim import Optimizer

from cifd_clip import (
    METHODS,
    DistillationTask,
    RDMBank,
    RDMTask,
    Student,
    World,
    with_assistants,
)
from cifd_clip.artefact import modalities_of, read_bank_config
from cifd_clip.losses import Features
from cifd_clip.noise import Noise, derive_seed
from cifd_clip.teacher import weights_hash
from cifd_clip.towers import compile_towers
from training.clip.cache import CachedTeachers
from training.clip.config import Config, MethodConfig, summed_rates
from training.clip.live import LiveTeachers, Transforms
from training.clip.models import (
    build_student,
    build_teachers,
    has_batch_norm,
    save_student,
    student_config,
    teacher_config,
)
from training.data.loader import Batch
from training.data.views import (
    ImageSpec,
    eval_view,
    normalise,
    private_randomness,
)
from training.engine.config import OptimConfig
from training.engine.optim import one_adamw
from training.engine.stage import Stage
from training.errors import UsageError

RECALL_AT = (1, 5, 10)


class ClipStage(Stage[Batch]):
    """What both stages share: teachers that give features of a batch.

    Attributes:
        transforms: the images and tokens that the loader must deliver.
        source: the teachers.
        banks: RDMs that train, or that assist the teachers of these numbers.
    """

    transforms: Transforms
    source: LiveTeachers | CachedTeachers
    banks: dict[int, RDMBank]

    def teacher_info(self) -> dict[str, Any]:
        """Who the teachers are, and what the banks are: for the run directory."""
        banks = self.banks.values()
        frozen = [] if self.rates else banks  # one that trains here is no one's teacher yet
        return {
            "teachers": self.source.identities,
            "banks": [bank.config() for bank in banks],
            "bank_weights": [weights_hash(bank) for bank in frozen],
        }

    def optimizers(self, config: OptimConfig) -> list[Optimizer]:
        return one_adamw(config, self.task)

    def targets(self, batch: Batch) -> list[Features]:
        """Features of every teacher."""
        return self.source(batch)

    def bad_samples(self) -> Counter[str]:
        return self.source.bad_samples()

    def concatenate(self, parts: list[list[Features]]) -> list[Features]:
        return [
            features[0]._replace(
                **{m: torch.cat([getattr(f, m) for f in features]) for m in features[0].modalities}
            )
            for features in zip(*parts)
        ]

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """Losses and report; a contrastive loss is that of this batch alone, on any rank."""
        targets = self.with_assistants(self.targets(batch), None)
        losses, report = self.shipped(*self.inputs(batch), targets, None)
        return {name: value.float() * len(batch) for name, value in {**losses, **report}.items()}


def retrieval(features: Features, captions: Tensor) -> dict[str, Tensor]:
    """Recall at 1, 5 and 10 among a batch's pairs, both ways: (b,) 0 or 1 each.

    Args:
        features: of the batch.
        captions: (b, L) tokens. Pairs of one caption match each other; a tie counts as a miss.
    """
    same = (captions[:, None] == captions).all(-1)
    scores, hits = features.image.float() @ features.text.float().t(), {}
    for way, rows in (("image", scores.t()), ("text", scores)):
        best = rows.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
        before = ((rows >= best) & ~same).sum(1)
        hits |= {f"{way}_retrieval_recall@{k}": (before < k).float() for k in RECALL_AT}
    return hits


class RDMStage(ClipStage):
    """Stage 1: train the bank of the (only) teacher.

    Args:
        config: of the run.
        device: of this process.
        source: the teacher [the one that the configuration names].
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        source: LiveTeachers | CachedTeachers | None = None,
    ):
        self.transforms = Transforms(config.aug_cfg, config.image_backend)
        self.source = source or make_teachers(config, device, self.transforms)
        teacher = self.source.identities[0]
        rates = summed_rates(config.rates, config.rdm_reduction, teacher["dim"])
        self.banks = {0: make_bank(config, teacher, rates, config.seed)}
        self.rates = self.banks[0].rates
        self.task = RDMTask(self.banks[0]).to(device)

    def inputs(self, batch: Batch) -> tuple[None, None]:
        """Nothing: the bank reads the teacher's features."""
        return None, None

    def payload(self) -> dict[str, Any]:
        return {"bank": self.banks[0].state_dict(), "bank_config": self.banks[0].config()}

    def load(self, payload: dict[str, Any]) -> None:
        self.banks[0].load_state_dict(payload["bank"])

    def finish(self, directory: Path) -> Path:
        self.banks[0].save(directory / "bank")
        logging.info("wrote the bank %s", directory / "bank")
        return directory / "bank"


class StudentStage(ClipStage):
    """Stage 2 of CIFD, every other method, and training without a teacher.

    Args:
        config: of the run.
        device, world: of this process.
        banks: folders of the banks whose RDMs assist their teachers.
        source: the teachers [those that the configuration names].
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        world: World,
        banks: Sequence[Path] = (),
        source: LiveTeachers | CachedTeachers | None = None,
    ):
        self.transforms = Transforms(config.aug_cfg, config.image_backend)
        # The student.
        self.config = student_config(config)
        model = build_student(config, config.seed)
        check_accumulation(config, model)
        self.spec = ImageSpec.of(model.visual.preprocess_cfg)
        self.images = self.transforms.add_images(self.spec)
        self.texts = self.transforms.add_texts(config.model, self.config)
        check_encoding(config, model, self.spec, self.transforms.tokenizers[self.texts])
        if config.use_bn_sync and world.size > 1:
            model = convert_sync_batchnorm(model)  # timm's keeps the activations of its own layers
        # Its teachers, and the embedding space of each teacher and assistant.
        self.source = source or make_teachers(config, device, self.transforms)
        self.banks = {n: bank.to(device) for n, bank in load_banks(banks, self.source).items()}
        self.options = config.options
        self.lambdas = share_weights(config.options.get("lambda_n", ()), self.banks)
        dims, modalities = list(self.source.dims), list(map(modalities_of, self.source.identities))
        self.first_space = {}  # of a teacher's assistants, where each has a projector of its own
        for teacher, bank in self.banks.items():
            if self.options.get("projector") == "each":
                self.first_space[teacher] = len(dims)
                dims += [dims[teacher]] * len(bank.rates)
                modalities += [modalities[teacher]] * len(bank.rates)
        # What trains, and the average of its weights.
        self.rates = []
        self.task = make_task(config, model, dims, world, config.seed, modalities)
        self.task.to(device, memory_format=torch.channels_last)  # convolutions run faster
        if not self.task.method.uses_logit_scale:
            self._fix_temperature(model)
        if config.ema is not None:
            self.average = copy.deepcopy(self.task).requires_grad_(False).eval()
        if config.torchcompile:
            compile_towers(self.task.student)

    def _fix_temperature(self, model: nn.Module) -> None:
        """No term trains the temperature: ship a teacher's, if one has any; it gets no gradient."""
        model.logit_scale.requires_grad_(False)
        scales = filter(None, (teacher.get("logit_scale") for teacher in self.source.identities))
        with torch.no_grad():
            if scale := next(scales, None):
                model.logit_scale.fill_(scale).log_()
        if model.logit_bias is not None:
            model.logit_bias.requires_grad_(False)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The student's normalised images and its tokens."""
        return normalise(batch.images[self.images], self.spec), batch.texts[self.texts]

    def with_assistants(self, targets: list[Features], noise: Noise | None) -> list[Features]:
        output = self.options.get("rdm_output", "rounded")
        for teacher, bank in self.banks.items():
            weights, space = self.lambdas[teacher], self.first_space.get(teacher)
            targets = with_assistants(bank, targets, weights, noise, output, space, teacher)
        return targets

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """How well the batch's pairs find each other, and losses where the teachers answer."""
        images, texts = self.inputs(batch)
        features = self.shipped.student.embed(self.shipped.encode(images, texts)).features()
        recall = {name: hits.sum() for name, hits in retrieval(features, texts).items()}
        return recall | (super().measure(batch) if self.source.answers(batch) else {})

    def payload(self) -> dict[str, Any]:
        """``state_dict`` is what ships; with an average, what trains lies under ``training``."""
        content = _content(self.shipped)
        if self.average is not None:
            content["training"] = _content(self.task)
        return content

    def load(self, payload: dict[str, Any]) -> None:
        _load(self.shipped, payload)
        if self.average is not None:
            _load(self.task, payload["training"])

    def finish(self, directory: Path) -> Path:
        tokenizer = self.transforms.tokenizers[self.texts]
        save_student(self.shipped.student.model, self.config, directory / "student", tokenizer)
        logging.info("wrote the student %s", directory / "student")
        return directory / "student"


def _content(task: DistillationTask) -> dict[str, Any]:
    return {"state_dict": task.student.model.state_dict(), "method": task.method.state_dict()}


def _load(task: DistillationTask, content: dict[str, Any]) -> None:
    task.student.model.load_state_dict(content["state_dict"])
    task.method.load_state_dict(content["method"])


def check_student(config: Config) -> None:
    """Refuse a student that stage 2 would refuse after stage 1.

    Raises:
        UsageError: what was wrong.
    """
    model = build_student(config, config.seed)
    check_accumulation(config, model)
    spec, transforms = ImageSpec.of(model.visual.preprocess_cfg), Transforms()
    try:
        transforms.add_texts(config.model, student_config(config))
    except Exception as error:  # of several libraries
        raise UsageError(f"--model {config.model} has no tokenizer: {error}") from error
    check_encoding(config, model, spec, transforms.tokenizers[0])


@torch.no_grad()
def check_encoding(config: Config, model: nn.Module, spec: ImageSpec, tokenizer: Any) -> None:
    """Refuse a student that can't encode one image and one caption of its tokenizer.

    Raises:
        UsageError: what was wrong.
    """
    training = model.training
    try:
        pixels = eval_view(spec)(Image.new("RGB", (300, 200)))
        student = Student(model.eval(), config.options.get("ibm_site", "projection"))
        with private_randomness():
            tokens = tokenizer(["a photo of a dog"])
        student.embed(student(normalise(pixels[None], spec), tokens))
    except Exception as error:  # of several libraries
        raise UsageError(
            f"--model {config.model} can't encode an image and a caption: {error}"
        ) from error
    model.train(training)


def check_accumulation(config: Config, model: nn.Module) -> None:
    """Refuse micro-batches of a model with batch normalisation."""
    if config.accum_freq > 1 and has_batch_norm(model):
        raise UsageError(
            f"--accum-freq {config.accum_freq} with --model {config.model}: batch normalisation "
            "over micro-batches differs from the whole batch; use more processes, or a student "
            "without"
        )


def make_task(
    config: MethodConfig,
    model: nn.Module,
    teacher_dims: list[int],
    world: World,
    seed: int,
    modalities: Sequence[Sequence[str]] | None = None,
) -> DistillationTask:
    """A student under its method; arguments as of `cifd_clip.Method`."""
    student = Student(model, config.options.get("ibm_site", "projection"))
    generator = torch.Generator().manual_seed(derive_seed(seed, "method"))
    method = METHODS[config.distill](student, teacher_dims, config.options, generator, modalities)
    return DistillationTask(student, method, world)


def make_bank(
    config: MethodConfig, teacher: dict[str, Any], rates: Sequence[float], seed: int
) -> RDMBank:
    """An untrained bank of a teacher."""
    hidden: Sequence[int] | None = config.rdm_hidden or None
    if config.rdm_channels is not None:
        outer = hidden[0] if hidden else teacher["dim"]
        hidden = (outer, config.rdm_channels, outer)
    generator = torch.Generator().manual_seed(derive_seed(seed, "bank"))
    return RDMBank(teacher, rates, teacher["dim"], hidden, generator=generator)


def make_teachers(
    config: Config, device: torch.device, transforms: Transforms
) -> LiveTeachers | CachedTeachers:
    """The teachers of the command line, from their caches or run on every batch."""
    if config.caches:
        names = ("view_seed", "views", "captions", "aug_cfg", "image_backend")
        wanted = {name: getattr(config, name) for name in names}
        cached = CachedTeachers(config.caches, config.teachers, wanted)
        transforms.stored = cached.stored
        return cached
    configs = [teacher_config(name) for name, _ in config.teachers]
    return LiveTeachers(build_teachers(config, device), configs, transforms)


def share_weights(weights: Sequence[float], banks: dict[int, RDMBank]) -> dict[int, list[float]]:
    """λ_n of every bank's assistants, from one for all of them, or one for each in order.

    Raises:
        UsageError: there are neither.
    """
    count = sum(len(bank.rates) for bank in banks.values())
    if banks and len(weights) not in (1, count):
        raise UsageError(f"--lambda-n has {len(weights)} values for {count} assistants")
    left = iter(list(weights) * (count if len(weights) == 1 else 1))
    return {teacher: list(islice(left, len(bank.rates))) for teacher, bank in banks.items()}


def load_banks(
    folders: Sequence[Path], source: LiveTeachers | CachedTeachers
) -> dict[int, RDMBank]:
    """Frozen banks, by the numbers of their teachers.

    Raises:
        UsageError: one is missing, or another teacher's.
    """
    banks: dict[int, RDMBank] = {}
    try:
        for folder in folders:
            owner = read_bank_config(folder)["teacher"].get("weights")
            known = [n for n, t in enumerate(source.identities) if t["weights"] == owner]
            teacher = next((n for n in known if n not in banks), 0)  # 0 refuses a stranger's
            if known and teacher in banks:
                raise ValueError(f"{folder} is a second bank of teacher {teacher}")
            banks[teacher] = RDMBank.load(folder, source.identities[teacher])
        return dict(sorted(banks.items()))
    except FileNotFoundError as error:
        raise UsageError(
            f"--rdm-bank: {error}; train one with --distill rdm, or leave --rdm-bank out"
        ) from error
    except ValueError as error:
        raise UsageError(f"--rdm-bank: {error}; train a bank for this teacher") from error
