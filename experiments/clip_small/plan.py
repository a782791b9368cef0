"""What is run: teachers, caches, banks, and students under every method.

Teachers see all of CIFAR-100 and Flickr8k, students a part of CIFAR-100 beside Flickr8k: as the
paper's students, they are taught by who has seen much more. All students see the same views of the
same pairs for the same number of steps, with one optimizer and schedule; the teachers' embeddings
of those views are computed once.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from experiments.study import Run

MODELS = Path(os.path.relpath(Path(__file__).parent / "models"))
STUDENTS = ("gap10", "gap3")
#: Tuning and choices are made with one student; another shows where the bottleneck sits.
PROBE, VIT = "gap10", "gap10-vit"
DATASETS = ("cifar100", "cifar100_seen", "flickr8k", "flickr8k_seen")
TEACHER_DATA = "{data}/cifar100::{data}/flickr8k"
STUDENT_DATA = "{data}/cifar100_few::{data}/flickr8k_few"
#: How every training run sees its pairs, and caches see them.
VIEWS = ("--captions=all", "--view-seed=0", "--aug-cfg", "scale=[0.6,1.0]")
#: GiB: room for all views of the students' data.
VIEW_MEMORY = 0.5


class Sizes(NamedTuple):
    """Most samples of each kind; 0 for all there are."""

    cifar_train: int = 0
    cifar_few: int = 2_500
    """What students see of the training images; teachers see all."""
    cifar_val: int = 5_000
    cifar_test: int = 0
    flickr_train: int = 0
    flickr_few: int = 1_500
    flickr_val: int = 591
    """The two last shards: the last alone has 91 photos."""
    flickr_test: int = 0


class Scale(NamedTuple):
    """How large everything is."""

    models: str  # prefix of the model configurations
    sizes: Sizes
    samples: int  # pairs of an epoch
    batch: int  # pairs of a step
    teacher: int  # epochs, as the next two
    student: int
    bank: int
    upsample: float  # how much more often a teacher sees a photo of Flickr8k than its share
    calibrate: str | None  # flags of training.calibrate beside its cache; None: not done
    workers: int  # loader processes of a training run; 0: it reads by itself
    minutes: dict[str, float]  # of a core (or GPU): an epoch, a cached view, an evaluation, ...


#: Of one of two busy cores, as measured; gap3 from the processor time of a few steps.
CPU_MINUTES = {
    "teacher": 4.2, "gap3": 1.0, "gap10": 0.6, "gap10-vit": 1.5,
    "bank": 0.4, "view": 0.2, "eval": 0.3, "calibrate": 20.0,
}  # fmt: skip
SCALES = {
    "cpu": Scale(
        "small", Sizes(), 51_200, 128, 10, 2, 2, 3.0,
        "--steps 1000 --batch-size 512", 0, CPU_MINUTES,
    ),
    "gpu": Scale(
        "mid", Sizes(cifar_few=10_000, flickr_few=0), 51_200, 512, 40, 15, 20, 3.0,
        "--steps 2000 --batch-size 1024", 8, {k: 0.2 for k in CPU_MINUTES},
    ),
    "trial": Scale(
        "tiny", Sizes(200, 100, 100, 100, 60, 50, 20, 20), 64, 32, 1, 1, 1, 3.0,
        None, 0, {k: 0.1 for k in CPU_MINUTES},
    ),
}  # fmt: skip


class Method(NamedTuple):
    """A row of the table."""

    distill: str
    flags: tuple[str, ...] = ()  # beside those every student has
    teachers: int = 1
    rates: tuple[float, ...] = ()  # of its bank, if it has one
    weight: tuple[str, tuple[float, ...]] | None = None  # the flag that is tuned, and its values


#: As they were chosen before the study: an RDM at R = 100 loses most of this teacher ("Which rates"
#: in docs/paper.md, which is where the default comes from).
THREE = (3000.0, 1000.0, 300.0)
#: About one over the values of clipkd's λ_FD: like shares of contrastive and feature term.
LAMBDA_CL = ("lambda-cl", (0.00005, 0.00015, 0.0005))
METHODS = {
    "none": Method("none", teachers=0),
    "kd": Method("kd"),
    "fd": Method("fd"),
    "fd-separate": Method("fd", ("--projector=separate",)),
    "tinyclip": Method("tinyclip"),
    "mobileclip": Method("mobileclip", teachers=2, weight=("lambda-kd", (0.5, 0.8, 1.0))),
    "clipkd": Method("clipkd", weight=("lambda-fd", (2000.0, 6000.0, 20000.0))),
    "cifd0-noibm": Method("cifd", ("--rates", "--no-ibm"), weight=LAMBDA_CL),
    "cifd0": Method("cifd", ("--rates",), weight=LAMBDA_CL),
    "cifd1": Method("cifd", rates=(1000.0,), weight=LAMBDA_CL),
    "cifd3": Method("cifd", rates=THREE, weight=LAMBDA_CL),
    "cifd3-noibm": Method("cifd", ("--no-ibm",), rates=THREE, weight=LAMBDA_CL),
}
#: One learning rate for everybody: the one that is best for these on average.
RATES_OF_LEARNING = (2e-3, 4e-3, 8e-3)
JUDGES = ("none", "clipkd", "cifd3")


class Answer(NamedTuple):
    """What departs: flags, the student, the rates of its bank (None: calibrated ones), or more."""

    flags: str = ""
    model: str = PROBE
    rates: tuple[float, ...] | None = ()
    method: str = "cifd3"


#: Open choices of docs/paper.md: question → answers, each a departure from cifd3 as it was tuned
#: (`DEFAULT`). Where the bottleneck sits matters to a student whose image tower has a projection
#: to sit before, which a ResNet's attention pool is not. Sums in place of means make the embedding
#: terms 256 (T) and the rates 128 (D) times as large, which for AdamW are these weights. CLIP-KD,
#: whole and in parts, is there to see what sets the two apart.
DEFAULT = "default"
CHOICES = {
    DEFAULT: {PROBE: Answer(), VIT: Answer(model=VIT)},
    "projector": {v: Answer(f"--projector={v}") for v in ("separate", "each")},
    "rates": {
        "1000 300 100": Answer(rates=(1000.0, 300.0, 100.0)),
        "10000 3000 1000": Answer(rates=(10000.0, 3000.0, 1000.0)),
    },
    "λ_I": {f"{v:g}": Answer(f"--lambda-i={v:g}") for v in (1e-5, 1e-3, 1e-2)},
    "λ_CL": {f"{v:g}": Answer(f"--lambda-cl={v:g}") for v in (1.5e-3, 5e-3)},
    "reductions": {"sums": Answer(f"--lambda-cl={0.005 / 256:g} --lambda-i={1e-4 * 128 / 256:g}")},
    "RDM output": {v: Answer(f"--rdm-output={v}") for v in ("noisy", "raw")},
    "IBM": {
        "projection, distill": Answer("--ibm-branch=distill", VIT),
        "embedding, all": Answer("--ibm-site=embedding", VIT),
        "embedding, distill": Answer("--ibm-site=embedding --ibm-branch=distill", VIT),
        "none": Answer("--no-ibm", VIT),
    },
    "CLIP-KD instead": {
        "as tuned": Answer(method="clipkd"),
        "not interactive": Answer("--lambda-icl=0", method="clipkd"),
        "not relational": Answer("--lambda-crd=0", method="clipkd"),
    },
}
SHARES = "0.9 0.8 0.7"


@dataclass(frozen=True)
class Tuned:
    """What tuning gave: the learning rate of all, and the weight of each method that has one."""

    lr: float = 1e-3
    weights: dict[str, float] = field(default_factory=dict)

    def flags(self, method: str) -> tuple[str, ...]:
        """A method's tuned weight as a flag; nothing where it has none or keeps its default."""
        weight = METHODS[method].weight
        known = weight and method in self.weights
        return (f"--{weight[0]}={self.weights[method]:g}",) if known else ()


@dataclass
class Plan:
    """Runs, each named once and after those it needs.

    Attributes:
        scale: how large.
        device: of every command.
        tuned: learning rate and weights.
        seeds, students: of the steps that compare.
        by_name: what has been added so far.
    """

    scale: Scale
    device: str = "cpu"
    tuned: Tuned = Tuned()
    seeds: Sequence[int] = (0, 1, 2)
    students: Sequence[str] = STUDENTS
    by_name: dict[str, Run] = field(default_factory=dict)

    def _add(
        self, name: str, module: str, flags: Iterable[str], where: tuple[str, ...], **other
    ) -> str:
        run = Run(name, module, tuple(flags), where=(*where, f"--device={self.device}"), **other)
        self.by_name.setdefault(name, run)
        return name

    def _train(
        self,
        name: str,
        seed: int,
        epochs: int,
        lr: float,
        flags: Iterable[str],
        cost: float,
        data: str = STUDENT_DATA,
    ) -> str:
        scale = self.scale
        models = ("teacher", *STUDENTS, VIT)
        common = (
            f"--seed={seed}", f"--epochs={epochs}", f"--lr={lr:g}", "--wd=0.1",
            f"--batch-size={scale.batch}", f"--train-num-samples={scale.samples}", *VIEWS,
            f"--log-every-n-steps={max(1, scale.samples // scale.batch // 4)}",
            "--model-config", *(f"{MODELS}/{scale.models}-{model}.json" for model in models),
        )  # fmt: skip
        where = (
            f"--train-data={data}", "--logs={logs}", "--name={name}", "--resume=latest", "--keep=1",
            f"--workers={scale.workers}",
            f"--view-memory={VIEW_MEMORY if data == STUDENT_DATA else 0}",
        )  # fmt: skip
        return self._add(name, "training.main", (*common, *flags), where, cost=epochs * cost)

    def teacher(self, seed: int) -> str:
        """A plain CLIP that sees a new view each time, of all the data there are."""
        scale = self.scale
        flags = (
            "--distill=none", "--precision=amp_bf16", f"--model={scale.models}-teacher",
            f"--train-data-upsampling-factors=1::{scale.upsample:g}",
        )  # fmt: skip
        cost = scale.minutes["teacher"]
        return self._train(f"teacher{seed}", seed, scale.teacher, 1e-3, flags, cost, TEACHER_DATA)

    def cache(self, seed: int) -> str:
        """The embeddings of four views by a teacher."""
        flags = (
            f"--distill-model=local-dir:{{{self.teacher(seed)}}}/student", "--views=4", *VIEWS,
            "--precision=fp32", f"--batch-size={self.scale.batch}",
        )  # fmt: skip
        where = (
            f"--train-data={STUDENT_DATA}", "--teacher-cache={here}/cache",
            f"--workers={self.scale.workers}",
        )  # fmt: skip
        cost = 4 * self.scale.minutes["view"]
        return self._add(f"cache{seed}", "training.cache_teacher", flags, where, cost=cost)

    def calibration(self) -> str:
        """Rates whose RDMs keep given shares of the teacher."""
        flags = (
            f"--teacher-cache={{{self.cache(0)}}}/cache", *self.scale.calibrate.split(),
            "--shares", *SHARES.split(), "--lr=1e-3",
        )  # fmt: skip
        where = ("--out={here}/rates.json",)
        cost = self.scale.minutes["calibrate"]
        return self._add("calibration", "training.calibrate", flags, where, cost=cost)

    def bank(self, rates: tuple[float, ...] | None, seed: int, lr: float) -> str:
        """A bank of a student's seed; without rates, of those that calibration gives."""
        cache = self.cache(0)
        if rates is None:
            label, chosen = "calibrated", [f"@{{{self.calibration()}}}/rates.args"]
        else:
            chosen = ["--rates", *(f"{rate:g}" for rate in rates)]
            label = "-".join(chosen[1:])
        flags = (
            "--precision=fp32", "--views=4", "--distill=rdm", *chosen,
            f"--teacher-cache={{{cache}}}/cache",
        )  # fmt: skip
        name = f"bank_{label}_s{seed}_lr{lr:g}"
        return self._train(name, seed, self.scale.bank, lr, flags, self.scale.minutes["bank"])

    def student(
        self,
        name: str,
        method: str,
        model: str,
        seed: int,
        *flags: str,
        split: str = "test",
        rates: tuple[float, ...] | None = (),
        lr: float | None = None,
        **about,
    ) -> str:
        """A student and its evaluation.

        Args:
            name: of the run; its evaluation is ``NAME_SPLIT``.
            method: a row of `METHODS`.
            model: a student's name.
            seed: of the student, and of its bank.
            flags: beside the method's own.
            split: what it is evaluated on: ``val``, of what was held out of training, or ``test``.
            rates: of another bank than the method's; None: of a calibrated one.
            lr: another learning rate than the tuned one.
            about: kept with its result.
        """
        row, scale, lr = METHODS[method], self.scale, lr or self.tuned.lr
        caches = [f"{{{self.cache(number)}}}/cache" for number in range(row.teachers)]
        chosen = [
            "--precision=fp32", "--views=4", f"--distill={row.distill}",
            f"--model={scale.models}-{model}", *row.flags, *flags,
        ]  # fmt: skip
        if caches:
            chosen.append(f"--teacher-cache={','.join(caches)}")
        if row.rates:
            bank = self.bank(row.rates if rates == () else rates, seed, lr)
            chosen.append(f"--rdm-bank={{{bank}}}/bank")
        self._train(name, seed, scale.student, lr, chosen, scale.minutes[model])
        about = {"method": method, "student": model, "seed": seed, "lr": lr, **about}
        return self.evaluation(name, split, **about)

    def evaluation(self, name: str, split: str, **about) -> str:
        """Zero-shot classification and retrieval of a run's student."""
        flags = (
            f"{{{name}}}", "--datasets", *DATASETS, f"--split={split}", "--precision=fp32",
            "--batch-size=256",
        )  # fmt: skip
        chain = [self.by_name[need] for need in self.chain(name)]
        sizes = [f"{key}={value}" for key, value in self.scale.sizes._asdict().items()]
        settings = [["data", *sizes], *([run.module, *run.flags] for run in chain)]
        settings.append(["eval.benchmark", *flags])
        return self._add(
            f"{name}_{split}", "eval.benchmark", flags,
            ("--data-root={data}/benchmark", "--workers=0"), results=("",),
            cost=self.scale.minutes["eval"], settings=tuple(map(" ".join, settings)),
            about={"run": name, **about},
        )  # fmt: skip

    def chain(self, name: str) -> list[str]:
        """A run and everything that it needs, what is needed first."""
        chain: dict[str, None] = {}
        for need in self.by_name[name].needs:
            chain |= dict.fromkeys(self.chain(need))
        return [*chain, name]


# -- steps: what fills a plan ----------------------------------------------------------------------


def tune_lr(plan: Plan) -> None:
    """The judges at every learning rate."""
    for lr in RATES_OF_LEARNING:
        for method in JUDGES:
            name = f"tune_{method}_lr{lr:g}"
            plan.student(name, method, PROBE, 0, split="val", lr=lr, stage="tune lr")


def tune_weights(plan: Plan) -> None:
    """Every weight at every value, at the tuned learning rate."""
    for method, row in METHODS.items():
        flag, values = row.weight or ("", ())
        for value in values:
            name = f"tune_{method}_{flag}{value:g}_lr{plan.tuned.lr:g}"
            about = {"stage": "tune weight", "weight": value}
            plan.student(name, method, PROBE, 0, f"--{flag}={value:g}", split="val", **about)


def students(plan: Plan) -> None:
    """Every method, student and seed, and the teachers themselves."""
    for number in (0, 1):
        about = {"method": "teacher", "student": "teacher", "seed": number, "stage": "students"}
        plan.evaluation(plan.teacher(number), "test", **about)
    for model in plan.students:
        for seed in plan.seeds:
            for method in METHODS:
                name = f"{method}_{model}_s{seed}"
                flags = plan.tuned.flags(method)
                plan.student(name, method, model, seed, *flags, stage="students")


def choices(plan: Plan) -> None:
    """The open choices: the default, and each answer that departs from it."""
    for seed in plan.seeds:
        for question, answers in CHOICES.items():
            for name, answer in answers.items():
                _answer(plan, seed, question, name, answer)


def calibrated(plan: Plan) -> None:
    """One more answer to the rates: those whose RDMs keep given shares of the teacher.

    By itself, after the others: a teacher may not have a rate for every share.
    """
    for seed in plan.seeds if plan.scale.calibrate else ():
        _answer(plan, seed, "rates", f"keeping {SHARES}", Answer(rates=None))


def _answer(plan: Plan, seed: int, question: str, name: str, answer: Answer) -> None:
    about = {"stage": "choices", "question": question, "answer": name}
    slug = f"{question}_{name}".replace(", ", "-").replace(" ", "-").replace("λ", "lambda")
    flags = (*plan.tuned.flags(answer.method), *answer.flags.split())  # later flags win
    plan.student(
        f"choice_{slug}_s{seed}", answer.method, answer.model, seed, *flags, split="val",
        rates=answer.rates, **about,
    )  # fmt: skip


#: What each stage of the study plans; a step may need the results of the step before.
STAGES = {
    "tune": (tune_lr, tune_weights),
    "students": (students,),
    "choices": (choices, calibrated),
}
