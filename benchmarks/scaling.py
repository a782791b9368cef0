"""``python -m benchmarks.scaling``: what several processes say to each other, and what it costs.

Counted: the bytes that one training step of each method hands to ``torch.distributed``, two real
gloo processes, every collective included (gradient buckets, gathers, their backward, the stop
flag), beside the formula of `messages`; they must agree. Modelled: the same formula at 8, 64 and
512 GPUs for a full-size pair of models. Measured, with ``--timing``: samples per second of one
process and of two, in turn (weak scaling, the teacher's forward left out).
"""

import argparse
import json
import statistics
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import paired, ratios, record
from benchmarks.step import random_teacher
from cifd_clip import RDMBank, World
from training.clip.config import parse_args
from training.clip.models import add_model_configs
from training.clip.stages import StudentStage, make_task
from training.data.loader import Batch
from training.engine.control import StopFlag
from training.engine.trainer import Trainer

#: What each method gathers across ranks: (the student's embeddings, each teacher's).
GATHERS = {
    "none": (1, 0),
    "fd": (0, 0),
    "cifd": (1, 0),
    "kd": (1, 1),
    "clipkd": (1, 1),
    "tinyclip": (1, 1),
    "mobileclip": (1, 1),
    "rdm": (0, 0),
}
METHODS = [name for name in GATHERS if name != "rdm"]
OPERATIONS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
}
FLOAT32 = 4
RATES = (1000.0, 300.0, 100.0)


# -- counted -----------------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Counts the collectives issued inside the ``with`` block, DistributedDataParallel's included.

    Attributes:
        bytes: of each operation's whole message: what is reduced, what has been gathered.
        calls: of each operation.
    """

    def __init__(self):
        super().__init__()
        self.bytes: Counter = Counter()
        self.calls: Counter = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "c10d":
            name = operator.__name__.partition(".")[0]
            name = OPERATIONS.get(name, name)
            self.bytes[name] += max(sum(map(_bytes, tree_leaves(a))) for a in args)
            self.calls[name] += 1
        return operator(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


# -- the formula -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """One collective of a step, the same on every rank.

    Attributes:
        what: its purpose.
        operation: all_reduce, all_gather or reduce_scatter.
        bytes: of the whole message.
    """

    what: str
    operation: str
    bytes: int


def messages(
    method: str, parameters: int, rows: int, dim: int, teacher_dims: list[int], backend: str
) -> list[Message]:
    """What a step of a method says, from shapes alone.

    Args:
        method: its name.
        parameters: P, number of trainable elements.
        rows: B of the global batch.
        dim: D of the student.
        teacher_dims: T of each teacher.
        backend: with gloo, the backward of a gather is an all_reduce.
    """
    student, teachers = GATHERS[method]
    found = [Message("gradient", "all_reduce", FLOAT32 * parameters)]
    if student:
        size = FLOAT32 * 2 * rows * dim  # images and texts
        back = "reduce_scatter" if backend == "nccl" else "all_reduce"
        found += [Message("student's embeddings", "all_gather", size)]
        found += [Message("their gradient", back, size)]
    if teachers:
        size = FLOAT32 * 2 * rows * sum(teacher_dims)
        found += [Message("teachers' embeddings", "all_gather", size)]
    return [*found, Message("stop flag", "all_reduce", FLOAT32)]


def total(found: list[Message]) -> dict[str, int]:
    """Bytes by operation."""
    sums: Counter = Counter()
    for message in found:
        sums[message.operation] += message.bytes
    return dict(sums)


# -- the model ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """Assumptions of the ring model; a ring is as fast as its slowest link.

    Attributes:
        gpus_per_node: as many as share the fast links.
        inside: bytes per second of a ring within a node.
        across: bytes per second of a ring over nodes.
        latency_inside, latency_across: seconds of one hop.
    """

    gpus_per_node: int = 8
    inside: float = 200e9
    across: float = 20e9
    latency_inside: float = 5e-6
    latency_across: float = 15e-6

    def seconds(self, message: Message, gpus: int) -> float:
        """α–β time of a ring collective: (N − 1) hops of n/N bytes, twice for an all_reduce."""
        one_node = gpus <= self.gpus_per_node
        rate = self.inside if one_node else self.across
        hop = self.latency_inside if one_node else self.latency_across
        hops = (gpus - 1) * (2 if message.operation == "all_reduce" else 1)
        return hops * (hop + message.bytes / gpus / rate)


def sent(message: Message, gpus: int) -> float:
    """Bytes that each GPU sends in a ring."""
    return message.bytes * (gpus - 1) / gpus * (2 if message.operation == "all_reduce" else 1)


def model(student: str, teacher: str, cluster: Cluster) -> dict[str, Any]:
    """Megabytes and milliseconds per step of every method, GPU count and global batch."""
    built = open_clip.create_model(student)
    dim, teacher_dim = (open_clip.get_model_config(m)["embed_dim"] for m in (student, teacher))
    rows = []
    for method in METHODS:
        args = parse_args(["--train-data", "-", "--model", student, *_teacher_flags(method, "-")])
        task = make_task(args, built, [teacher_dim], World())
        parameters = sum(p.numel() for p in task.parameters())
        parameters -= not task.method.uses_logit_scale  # frozen then
        for gpus in (8, 64, 512):
            for batch in (1024, 32768):
                said = messages(method, parameters, batch, dim, [teacher_dim], "nccl")
                gradient, others = said[0], said[1:-1]  # the stop flag travels on the host
                rows.append(
                    {
                        "method": method,
                        "gpus": gpus,
                        "global_batch": batch,
                        "parameters": parameters,
                        "gradient_mb": sent(gradient, gpus) / 1e6,
                        "gradient_ms": cluster.seconds(gradient, gpus) * 1e3,
                        "gathers_mb": sum(sent(m, gpus) for m in others) / 1e6,
                        # each modality is a message of its own: twice the hops
                        "gathers_ms": sum(
                            2 * cluster.seconds(Message(m.what, m.operation, m.bytes // 2), gpus)
                            for m in others
                        )
                        * 1e3,
                    }
                )
    return {"student": student, "teacher": teacher, "cluster": asdict(cluster), "rows": rows}


# -- two processes -----------------------------------------------------------------------------


def _teacher_flags(method: str, teacher: str) -> list[str]:
    if method == "none":
        return ["--distill", "none"]
    flags = ["--distill", method, "--distill-model", teacher]
    return flags if teacher.startswith("local-dir:") else [*flags, "--distill-pretrained", "-"]


def make_bank(args: argparse.Namespace, teacher: str, folder: Path) -> None:
    """An untrained bank of the teacher, K = 3."""
    source = StudentStage(_flags("fd", args, teacher), torch.device("cpu"), World()).source
    generator = torch.Generator().manual_seed(args.seed)
    dim = source.dims[0]
    RDMBank(source.identities[0], list(RATES), dim, generator=generator).save(folder / "bank")


def _flags(method: str, args: argparse.Namespace, teacher: str, *more: str) -> argparse.Namespace:
    flags = ["--train-data", "-", "--model", args.student, "--batch-size", str(args.batch_size)]
    flags += ["--warmup", "1", "--epochs", "1000", "--seed", str(args.seed), "--device", "cpu"]
    return parse_args([*flags, "--precision", "fp32", *_teacher_flags(method, teacher), *more])


class Contestant:
    """A method's trainer in a world, taking steps on one random batch."""

    def __init__(
        self, method: str, args: argparse.Namespace, teacher: str, folder: Path, world: World
    ):
        bank = ["--rdm-bank", str(folder / "bank")] if method == "cifd" else []
        parsed = _flags(method, args, teacher, *bank)
        cpu = torch.device("cpu")
        self.stage = StudentStage(parsed, cpu, world)
        self.stage.task.train()
        self.trainer = Trainer(parsed, self.stage, world, cpu, 1000)
        self.batch = self._batch(args.batch_size, args.seed + world.rank)
        features = self.stage.source(self.batch)  # as from a cache: the teacher says nothing
        self.stage.source = lambda batch: list(features)
        self.stop = StopFlag(world)

    def _batch(self, rows: int, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        images, index = [], torch.arange(rows)
        for spec in self.stage.inputs.specs:
            size = spec.size if isinstance(spec.size, (tuple, list)) else (spec.size, spec.size)
            shape = (rows, 3, *size)
            images.append(torch.randint(256, shape, generator=generator, dtype=torch.uint8))
        captions = [f"a photo of scene number {i}" for i in range(rows)]
        texts = [tokenizer(captions) for tokenizer in self.stage.inputs.tokenizers]
        return Batch(images, texts, index, index, captions)

    def __call__(self) -> None:
        """One step, and the question whether to stop, as the loop asks it."""
        self.trainer.step(self.batch)
        self.stop.agreed()


def count(contestant: Contestant, method: str, world: World) -> dict[str, Any]:
    """Bytes by operation that a settled step hands over, and those of the formula."""
    for _ in range(3):  # DDP arranges its buckets
        contestant()
    with Collectives() as counted:
        contestant()
    task, rows = contestant.stage.task, len(contestant.batch) * world.size
    parameters = sum(p.numel() for p in task.parameters() if p.requires_grad)
    dims = [len(f.image[0]) for f in contestant.stage.source(contestant.batch)]
    said = messages(method, parameters, rows, task.student.dim, dims, dist.get_backend())
    if dict(counted.bytes) != total(said):
        raise AssertionError(f"{method}: counted {dict(counted.bytes)}, expected {total(said)}")
    return {
        "counted_bytes": dict(counted.bytes),
        "calls": dict(counted.calls),
        "formula": [asdict(message) for message in said],
    }


def _process(rank: int, args: argparse.Namespace, teacher: str, folder: Path) -> None:
    torch.set_num_threads(1)
    place = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    add_model_configs(args.model_config)
    results = {}
    for method in args.methods:
        world = World(rank, 2)
        shared = Contestant(method, args, teacher, folder, world)
        results[method] = count(shared, method, world)
        if args.timing:
            results[method]["throughput"] = _weak_scaling(shared, method, args, teacher, folder)
        shared.stop.close()
    (folder / f"results{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def _weak_scaling(shared: Contestant, method: str, args, teacher: str, folder: Path):
    """Seconds of a step of one process and of two, in turn; rank 1 rests while rank 0 is alone."""
    first = dist.get_rank() == 0
    alone = Contestant(method, args, teacher, folder, World()) if first else _rest

    def together() -> None:
        dist.barrier()
        shared()

    seconds = paired({"1": alone, "2": together}, args.rounds, 2)
    rows = len(shared.batch)
    return {
        "seconds": seconds,
        "samples_per_s": {n: int(n) * rows / statistics.median(s) for n, s in seconds.items()},
        "efficiency": ratios(seconds, "1", "2"),
    }


def _rest() -> None:
    """What rank 1 does while rank 0 is alone: it waits at the barrier of the next shared step."""


# -- the command -------------------------------------------------------------------------------


def main() -> None:
    """Count, model, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--student", default="ViT-S-32-alt", help="what is run here")
    parser.add_argument("--teacher", default="ViT-S-32")
    parser.add_argument("--model-config", nargs="+", default=[])
    parser.add_argument("--full-student", default="ViT-B-16", help="what the model is about")
    parser.add_argument("--full-teacher", default="ViT-L-14")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--batch-size", type=int, default=16, help="per process")
    parser.add_argument("--timing", action="store_true", help="measure samples per second too")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="save the figures here")
    args = parser.parse_args()
    add_model_configs(args.model_config)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        teacher = random_teacher(args, folder)
        make_bank(args, teacher, folder)
        mp.spawn(_process, args=(args, teacher, folder), nprocs=2)
        methods = json.loads((folder / "results0.json").read_text())
    modelled = model(args.full_student, args.full_teacher, Cluster())
    print(f"{args.teacher} -> {args.student}, 2 gloo processes x {args.batch_size}, per step")
    for line in (*counts_table(methods), "", *model_table(modelled)):
        print(line)
    settings = json.loads(json.dumps(vars(args), default=str))
    figures = {"methods": methods, "model": modelled, "settings": settings}
    record("scaling", figures, args.json)


def counts_table(methods: dict[str, dict]) -> list[str]:
    """Counted bytes as Markdown; the formula agreed, or the program had stopped."""
    timed = all("throughput" in m for m in methods.values())
    head = "| method | all_reduce | all_gather | more than `none` |"
    lines = [head + (" samples/s, 1 | 2 | efficiency |" if timed else "")]
    lines.append("|---|" + "---:|" * (lines[0].count("|") - 2))
    plain = sum(methods["none"]["counted_bytes"].values()) if "none" in methods else None
    for name, found in methods.items():
        by = found["counted_bytes"]
        more = f"{sum(by.values()) - plain:+,}" if plain else ""
        line = f"| {name} | {by['all_reduce']:,} | {by.get('all_gather', 0):,} | {more} |"
        if timed:
            rate, kept = found["throughput"]["samples_per_s"], found["throughput"]["efficiency"]
            line += f" {rate['1']:.1f} | {rate['2']:.1f} | "
            line += f"{kept['median']:.2f} ({kept['min']:.2f} to {kept['max']:.2f}) |"
        lines.append(line)
    return lines


def model_table(modelled: dict[str, Any]) -> list[str]:
    """The model as Markdown, one row per method and GPU count."""
    lines = [
        "| method | GPUs | gradient MB | ms | gathers MB at 1024 | ms | gathers MB at 32768 | ms |",
        "|---|" + "---:|" * 7,
    ]
    places = {(r["method"], r["gpus"], r["global_batch"]): r for r in modelled["rows"]}
    for method, gpus in dict.fromkeys((m, g) for m, g, _ in places):
        small, large = places[method, gpus, 1024], places[method, gpus, 32768]
        cells = [f"{small['gradient_mb']:.0f}", f"{small['gradient_ms']:.1f}"]
        for row in (small, large):
            cells += [f"{row['gathers_mb']:.1f}", f"{row['gathers_ms']:.1f}"]
        lines.append(f"| {method} | {gpus} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
