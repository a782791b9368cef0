"""``python -m benchmarks.scaling``: what several processes say to each other, and what it costs.

Modelled: the bytes that one training step of each method hands to torch.distributed, by the formula
of `messages`, at 8, 64 and 512 GPUs; tests count those of real processes, and they agree. With
--timing, measured: samples per second of one process and of two, in turn (weak scaling on CPU
cores, the teacher's forward left out).
"""

import argparse
import json
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contestants import Students, add_flags
from benchmarks.harness import Seconds, command_line, paired, ratios, record
from cifd_clip import METHODS, DistillationTask, Features, World
from cifd_clip.student import Pooled
from experiments.seeds import table
from training.clip.flags import parse_args
from training.clip.models import add_model_configs
from training.clip.stages import make_task
from training.engine.control import StopFlag
from training.errors import cli

FLOAT32 = 4
BATCHES = (1024, 32768)  # of the model: the whole batch


# -- the formula -------------------------------------------------------------------------------


class Message(NamedTuple):
    """One collective of a step, the same on every rank."""

    what: str  # its purpose
    operation: str  # all_reduce, all_gather or reduce_scatter
    bytes: int  # of the whole message


def gathers(task: DistillationTask, teacher_dims: list[int]) -> tuple[int, int]:
    """Columns of the embeddings that a step gathers: the student's, and its teachers'.

    Args:
        task: whose losses are computed, on two random rows.
        teacher_dims: T of each teacher.
    """
    columns: Counter = Counter()

    class Listening(World):
        def gather(self, rows: Tensor) -> Tensor:
            columns["student" if rows.requires_grad else "teachers"] += rows.shape[1]
            return rows

    def rows(width: int) -> Tensor:
        return F.normalize(torch.randn(2, width, generator=generator), dim=1)

    generator, scale = torch.Generator().manual_seed(0), torch.tensor(1.0)
    pooled = Pooled(**{k: rows(w).requires_grad_() for k, w in task.student.widths.items()})
    teachers = [Features(rows(t), rows(t), scale, space=i) for i, t in enumerate(teacher_dims)]
    task.method(task.student, pooled, teachers, Listening(), None)
    return columns["student"], columns["teachers"]


def messages(parameters: int, rows: int, gathered: tuple[int, int], backend: str) -> list[Message]:
    """What a step says, from shapes alone.

    Args:
        parameters: P, number of trainable elements.
        rows: B of the global batch.
        gathered: see `gathers`.
        backend: with gloo, the backward of a gather is an all_reduce.
    """
    student, teachers = (FLOAT32 * rows * columns for columns in gathered)
    back = "reduce_scatter" if backend == "nccl" else "all_reduce"
    step = [
        Message("gradient", "all_reduce", FLOAT32 * parameters),
        Message("student's embeddings", "all_gather", student),
        Message("their gradient", back, student),
        Message("teachers' embeddings", "all_gather", teachers),
        Message("stop flag", "all_reduce", FLOAT32),
    ]
    return [message for message in step if message.bytes]


# -- the model ---------------------------------------------------------------------------------


class Cluster(NamedTuple):
    """Assumptions of the ring model; a ring is as fast as its slowest link."""

    gpus_per_node: int = 8  # as many as share the fast links
    inside: float = 200e9  # bytes per second of a ring within a node
    across: float = 20e9  # bytes per second of a ring over nodes
    latency_inside: float = 5e-6  # seconds of one hop
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


def model(student: str, teacher: str, methods: list[str], cluster: Cluster) -> list[dict[str, Any]]:
    """Megabytes and milliseconds per step of every method, GPU count and global batch."""
    built = open_clip.create_model(student)
    teacher_dim = open_clip.get_model_config(teacher)["embed_dim"]
    rows = []
    for method in methods:
        flags = ["--train-data=-", f"--model={student}", f"--distill={method}"]
        flags += [] if method == "none" else ["--distill-model=local-dir:-"]
        task = make_task(parse_args(flags), built, [teacher_dim], World(), seed=0)
        parameters = sum(p.numel() for p in task.parameters())
        parameters -= not task.method.uses_logit_scale  # frozen then
        gathered = gathers(task, [teacher_dim])
        for gpus in (8, 64, 512):
            for batch in BATCHES:
                # the stop flag, last, travels on the host
                gradient, *others = messages(parameters, batch, gathered, "nccl")[:-1]
                # each modality is a message of its own: twice the hops
                halves = [Message(m.what, m.operation, m.bytes // 2) for m in others] * 2
                row = {"method": method, "gpus": gpus, "global_batch": batch}
                rows.append(row | {
                    "parameters": parameters,
                    "gradient_mb": sent(gradient, gpus) / 1e6,
                    "gradient_ms": cluster.seconds(gradient, gpus) * 1e3,
                    "gathers_mb": sum(sent(m, gpus) for m in others) / 1e6,
                    "gathers_ms": sum(cluster.seconds(m, gpus) for m in halves) * 1e3,
                })  # fmt: skip
    return rows


# -- two processes ---------------------------------------------------------------------------------


def throughput(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Samples per second of one process and of two, and half their ratio, of every method."""
    Students(args, folder).bank(3)
    mp.spawn(_process, args=(args, folder), nprocs=2)
    result = {}
    for method, seconds in json.loads((folder / "seconds.json").read_text()).items():
        rates = {n: int(n) * args.batch_size / statistics.median(s) for n, s in seconds.items()}
        efficiency = ratios(seconds, "1", "2")
        result[method] = {"seconds": seconds, "samples_per_s": rates, "efficiency": efficiency}
    return result


def _process(rank: int, args: argparse.Namespace, folder: Path) -> None:
    torch.set_num_threads(1)
    place = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    students = Students(args, folder)
    seconds = {method: _turns(students, method, rank) for method in args.methods}
    if rank == 0:
        (folder / "seconds.json").write_text(json.dumps(seconds))
    dist.destroy_process_group()


def _turns(students: Students, method: str, rank: int) -> Seconds:
    """Seconds of a step of one process and of two, in turn, as the loop takes it."""
    world = World(rank, 2)
    shared, stop = students.under(method, world=world, cached=True), StopFlag(world)

    def together() -> None:
        dist.barrier()
        shared()
        stop.agreed()

    def rest() -> None:
        """Rank 1, while rank 0 is alone, waits at the barrier of the next shared step."""

    alone = students.under(method, cached=True) if rank == 0 else rest
    seconds = paired({"1": alone, "2": together}, students.args.rounds, 2)
    stop.close()
    return seconds


# -- the command -----------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    """Model, measure, print."""
    parser = command_line("scaling", __doc__, rounds=10)
    add_flags(parser, "ViT-L-14", "ViT-B-16")
    add = parser.add_argument
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="which of them")
    add("--timing", action="store_true", help="measure samples per second too")
    args = parser.parse_args(argv)
    add_model_configs(args.model_config)
    cluster = Cluster()
    rows = model(args.student, args.teacher, args.methods, cluster)
    print(f"{args.teacher} -> {args.student}\n{model_table(rows)}", end="")
    figures = {"model": {"cluster": cluster._asdict(), "rows": rows}}
    if args.timing:
        args.device, args.precision = "cpu", "fp32"
        with tempfile.TemporaryDirectory() as folder:
            figures["throughput"] = throughput(args, Path(folder))
        print(
            f"2 gloo processes x {args.batch_size}\n{timing_table(figures['throughput'])}", end=""
        )
    record("scaling", args, figures)


def timing_table(methods: dict[str, dict[str, Any]]) -> str:
    """What was measured, as Markdown."""
    rows = []
    for method, measured in methods.items():
        rate, kept = measured["samples_per_s"], measured["efficiency"]
        share = f"{kept['median']:.2f} ({kept['min']:.2f} to {kept['max']:.2f})"
        rows.append([method, f"{rate['1']:.1f}", f"{rate['2']:.1f}", share])
    return table(["method", "samples/s, 1", "2", "efficiency"], rows)


def model_table(modelled: list[dict[str, Any]]) -> str:
    """The model as Markdown, one row per method and GPU count."""
    heads = ["method", "GPUs", "gradient MB", "ms"]
    heads += [head for batch in BATCHES for head in (f"gathers MB at {batch}", "ms")]
    places = {(row["method"], row["gpus"], row["global_batch"]): row for row in modelled}
    rows = []
    for method, gpus in dict.fromkeys((method, gpus) for method, gpus, _ in places):
        by_batch = [places[method, gpus, batch] for batch in BATCHES]
        first = by_batch[0]
        row = [method, str(gpus), f"{first['gradient_mb']:.0f}", f"{first['gradient_ms']:.1f}"]
        for one in by_batch:
            row += [f"{one['gathers_mb']:.1f}", f"{one['gathers_ms']:.1f}"]
        rows.append(row)
    return table(heads, rows)


if __name__ == "__main__":
    cli(main)
