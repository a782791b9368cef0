"""A step on a card that isn't there: what each of its kernels would take, one by one.

The real step is taken on fake CUDA tensors, which have shapes but no data. A kernel takes the
longest of its products at the card's rate, its bytes at the card's bandwidth, and a launch; where
torch.compile would fuse, all between two products that ends in at most one reduction is one kernel,
which reads what it did not make and writes what is still held. Ranks say nothing to each other.
"""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.contestants import Remembered, random_batch
from benchmarks.fake_cuda import on_fake_cuda, starts_kernel, stub
from cifd_clip import FactorizedDensity, Noise, Teacher, World
from cifd_clip.files import read_json
from cifd_clip.towers import use_custom_blocks
from eval.cost.config import CostConfig, parse
from eval.cost.macs import build_clip
from eval.cost.report import short, table
from eval.cost.stages import run_stages
from training.clip.live import LiveTeachers, Transforms
from training.clip.models import TEACHER_DTYPES, add_model_configs, model_config
from training.clip.stages import RDMStage, StudentStage, make_bank, share_weights
from training.data.loader import Batch
from training.engine.trainer import Trainer
from training.errors import UsageError

HOST = torch.device("cpu")
METHODS = ("fd", "cifd")  # beside what was measured
#: They end a fused kernel.
REDUCTIONS = ("sum", "mean", "amax", "native_layer_norm_backward")


class Card(NamedTuple):
    """A GPU: what its maker says of it, and the share of that which each kind of kernel reaches."""

    tflops: float  # of dense bfloat16 products
    float32_tflops: float
    tb_per_s: float
    gib: float
    launch_us: float
    shares: dict[str, float]


#: An H100's are measured, results/gpu/steps.json (NVIDIA H100 80GB HBM3, 8f42fd5): products
#: as its ceiling (747 TFLOP/s); attention as the 84 kernels in its profiles (2.46 and 3.13 TFLOP in
#: 20.4 and 25.1 ms); memory so that `beside` is right in the median. Another H100's launches took
#: 6 µs, this one's 10.5.
SHARES = {"product": 0.755, "attention": 0.124, "memory": 0.58}
CARDS = {"h100": Card(989, 67, 3.35, 80, 6.0, SHARES)}
#: Forms of `benchmarks.gpu`'s steps: their flags.
FORMS = {
    "before": ["--no-custom-blocks", "--distill-precision=fp32"],
    "default": [],
    "compiled": ["--torchcompile"],
}


class Kernel(NamedTuple):
    """One launch of a part of the step."""

    part: str
    kind: str  # product, attention, memory
    flops: float
    bytes: float
    float32: bool = False

    def seconds(self, card: Card) -> dict[str, float]:
        """By what could bind it; it takes the longest."""
        rate = card.float32_tflops if self.float32 else card.tflops
        return {
            "compute": self.flops / (rate * 1e12 * card.shares[self.kind]),
            "memory": self.bytes / (card.tb_per_s * 1e12 * card.shares["memory"]),
            "launch": card.launch_us / 1e6,
        }


class Kernels(TorchDispatchMode):
    """Lists the kernels of what runs in it.

    Args:
        fuses: whether there is a compiler, for the densities; others are fused as `begin` says.
    """

    def __init__(self, fuses: bool) -> None:
        super().__init__()
        self.seen: list[Kernel] = []
        self.density = "density", fuses
        self.region = self._last = "", False  # the part of the step, and whether it is fused
        self._read: dict[int, int] = {}  # bytes by storage, of the kernel that is being fused
        self._written: dict[int, tuple[StorageWeakRef, int]] = {}

    def begin(self, part: str, fused: bool = False) -> None:
        """What comes belongs to a part."""
        self.region = part, fused

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        node, region = torch._C._current_autograd_node(), self.region
        if node is not None and node.name() == "_LogLikelihoodBackward":
            region = self.density
        if region != self._last:
            self.flush()
            self._last = region
        result = function(*args, **(kwargs or {}))
        if starts_kernel(function):
            trees = (args, kwargs), result
            read, written = ([t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in trees)
            name = function.__name__.partition(".")[0]
            count = flop_registry.get(function._overloadpacket)
            if count or not region[1]:
                self.flush()
                kind = "attention" if "attention" in name else "product" if count else "memory"
                flops = count(*args, **(kwargs or {}), out_val=result) if count else 0
                wide = bool(count) and read[0].dtype == torch.float32
                size = sum(map(_bytes, read + written))
                self.seen.append(Kernel(region[0], kind, flops, size, wide))
            else:
                self._fuse(read, written)
                if name in REDUCTIONS:
                    self.flush()
        return result

    def _fuse(self, read: list[Tensor], written: list[Tensor]) -> None:
        for tensor in read:
            if (key := tensor.untyped_storage()._cdata) not in self._written:
                self._read[key] = _bytes(tensor)
        for tensor in written:
            storage = tensor.untyped_storage()
            self._written[storage._cdata] = StorageWeakRef(storage), _bytes(tensor)

    def flush(self) -> None:
        """The kernel that was being fused is whole."""
        if self._written:
            held = (size for ref, size in self._written.values() if not ref.expired())
            size = sum(self._read.values()) + sum(held)
            self.seen.append(Kernel(self._last[0], "memory", 0, size))
        self._read, self._written = {}, {}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


# -- a step of a command line ---------------------------------------------------------------------


class Weightless(LiveTeachers):
    """Teachers on the meta device, which no hash of weights identifies."""

    @property
    def identities(self) -> list[dict]:
        return [
            {"model": t.name, "weights": "", "dim": t.dim, "logit_scale": 100.0, "logit_bias": None}
            for t in self.teachers
        ]


def make_stage(config: CostConfig) -> StudentStage | RDMStage:
    """The stage that a command line trains: its last, where it trains a bank first."""
    add_model_configs(config.model_config)
    names = config.architectures
    teachers = [
        Teacher(build_clip(name, "--distill-model"), name, space, "none")
        for space, name in enumerate(names)
    ]
    for teacher in teachers:
        if config.custom_blocks:
            use_custom_blocks(teacher.model)
        teacher.cast(TEACHER_DTYPES[config.distill_precision])
    configs = [model_config(name, "--distill-model") for name in names]
    source = Weightless(teachers, configs, Transforms())
    if config.distill == "rdm":
        stage = RDMStage(config, HOST, source)
    else:
        stage = StudentStage(replace(config, pretrained=""), HOST, World(), source=source)
    if config.distill == "cifd" and config.rates:
        for space, teacher in enumerate(source.identities):
            bank = make_bank(config, teacher, config.rates, config.seed)
            stage.banks[space] = bank.requires_grad_(False).eval()
        stage.lambdas = share_weights(config.options["lambda_n"], stage.banks)
    stage.source = Weightless(teachers, configs, stage.transforms)  # of the student's images
    return stage


def kernels(config: CostConfig, fuses: bool = True) -> list[Kernel]:
    """Those of a settled step on one GPU, with a compiler or without."""
    stage = make_stage(config)
    rows = random_batch(stage.transforms, config.batch_size * config.accum_freq, config.seed)
    stage.task.train()
    with torch.compiler.set_stance("force_eager"), FakeTensorMode() as mode:
        trainer = on_fake_cuda(stage, config, config.precision)
        rows = rows.map(mode.from_tensor).to(trainer.device)
        if config.caches:
            stage.source = Remembered(stage.source, rows)
        trainer.step(rows)  # the optimizer makes its state
        with Kernels(fuses) as listed:
            step(trainer, rows, listed)
            listed.flush()
    return listed.seen


def step(trainer: Trainer, batch: Batch, listed: Kernels) -> None:
    """`Trainer.step`, part by part; with accumulation as `Trainer.gradients` has it."""
    stage, micro = trainer.stage, batch.split(trainer.config.accum_freq)
    compiled, noise = trainer.config.torchcompile, Noise(0, 0)

    def encode() -> list[Any]:
        return [stage.task.encode(*stage.inputs(m)) for m in micro]

    for module in stage.task.modules():
        if isinstance(module, FactorizedDensity):
            module.register_forward_pre_hook(lambda *_: listed.begin(*listed.density))
            module.register_forward_hook(lambda *_: listed.begin("losses"))
    # What teaches, and the encoded rows.
    with trainer.autocast():
        listed.begin("teacher", compiled)
        targets = stage.concatenate([stage.targets(m) for m in micro])
        listed.begin("RDMs")
        targets = stage.with_assistants(targets, noise)
        listed.begin("student forward", compiled)
        if len(micro) > 1:
            with torch.no_grad():
                encode()
        encoded = encode()
    # The losses, down to the rows, and from there down.
    listed.begin("losses")
    rows = encoded[0] and type(encoded[0])(
        *(torch.cat(w).detach().requires_grad_() for w in zip(*encoded))
    )
    losses, _ = stage.task.losses(rows, targets, noise)
    trainer._backward(losses)
    if rows:
        listed.begin("student backward", compiled)
        gradients = zip(*(w.grad.chunk(len(micro)) for w in rows))
        for part, of_rows in zip(encoded, gradients):
            torch.autograd.backward(list(part), list(of_rows))
    # The update.
    listed.begin("update")
    trainer._update(losses)
    if trainer.average is not None:
        trainer.average.update(1)


# -- what is printed ------------------------------------------------------------------------------


def bounds(kernels: list[Kernel], card: Card) -> Counter[str]:
    """Seconds of kernels, by what binds them."""
    bound: Counter = Counter()
    for kernel in kernels:
        by = kernel.seconds(card)
        longest = max(by, key=by.get)
        bound[longest] += by[longest]
    return bound


def report(config: CostConfig, card: Card) -> str:
    """A step's parts, and what it comes to."""
    parts: dict[str, list[Kernel]] = {}
    for kernel in kernels(config):
        parts.setdefault(kernel.part, []).append(kernel)
    bound = {part: bounds(own, card) for part, own in parts.items()}
    rows = []
    for part, own in parts.items():
        sums = sum(k.flops for k in own) / 1e9, sum(k.bytes for k in own) / 1e9
        cells = map(short, (*sums, 1e3 * bound[part].total()))
        rows.append([part, bound[part].most_common(1)[0][0], str(len(own)), *cells])
    head = ["part", "bound by", "launches", "GFLOP", "GB", "ms"]
    images, seconds = config.batch_size * config.accum_freq, sum(b.total() for b in bound.values())
    last = run_stages(config)[-1]
    peak = (last.memory_bytes + last.activation_bytes) / 2**30
    return (
        f"{table(head, rows, words=2)}\n{images:,} rows in {1e3 * seconds:.1f} ms: "
        f"{images / seconds:,.0f} images/s; about {short(peak)} of {card.gib:g} GiB.\n"
    )


def beside(measured: Path, card: Card) -> str:
    """The steps that `benchmarks.gpu` measured, and what is simulated of them."""
    content = read_json(measured)
    common = "--train-num-samples=1 --precision=amp_bf16 --batch-size=256 --rates 1000 300 100"
    teacher = "--distill-model=ViT-L-14 --distill-pretrained=datacomp_xl_s13b_b90k"
    rows, off = [], []
    for (student, forms), form in product(content["students"].items(), FORMS):
        own = ["--model", student, *FORMS[form], *f"{common} {teacher}".split()]
        live = {m: kernels(parse([*own, f"--distill={m}"]), form != "before") for m in METHODS}
        for way in ("cached", "live"):
            cells: list[str] = []
            for method, every in live.items():
                selected = [k for k in every if way == "live" or k.part != "teacher"]
                simulated = 256 / bounds(selected, card).total()
                real = forms[form][way]["images_per_s"][method]
                off.append(simulated / real)
                cells += [str(len(selected)), f"{simulated:,.0f}", f"{real:,.0f}"]
            rows.append([student, way, form, *cells])
    head = ["student", "teacher", "form"]
    head += [f"{m} {what}" for m in METHODS for what in ("launches", "simulated", "measured")]
    return (
        f"{table(head, rows, words=3)}\nSimulated / measured: {median(off):.2f} in the median, "
        f"{min(off):.2f} to {max(off):.2f}.\n"
    )


def main(argv: list[str], card: str, flags: list[str], measured: Path | None) -> int:
    """Print the table of a step, or those that were measured; where no CUDA is, with a stub of it.

    Args:
        argv: the whole command line, for the process that finds the stub.
        card: a name of `CARDS`.
        flags: of training.main.
        measured: `benchmarks.gpu`'s steps.json.

    Raises:
        UsageError: there is no CUDA, nor what a stub takes.
    """
    if torch.cuda.is_available():
        config = None if measured else parse(["--train-num-samples=1", *flags])
        print(beside(measured, CARDS[card]) if measured else report(config, CARDS[card]), end="")
        return 0
    with TemporaryDirectory() as folder:
        if (environment := stub(Path(folder))) is None:
            raise UsageError("--simulate needs a torch built with CUDA, and a C compiler")
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.step", *argv]
        return subprocess.run(command, env={**os.environ, **environment}, check=False).returncode
