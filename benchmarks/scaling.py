"""``python -m benchmarks.scaling``: what several processes say to each other, and what it costs.

Counted: the bytes that one training step of each method hands to torch.distributed, two real gloo
processes, every collective included (gradient buckets, gathers, their backward, the stop flag),
beside the formula of `messages`; they must agree. Modelled: the same formula at 8, 64 and 512 GPUs
for a full-size pair of models. Measured, with --timing: samples per second of one process and of
two, in turn (weak scaling, the teacher's forward left out).
"""

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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.contestants import (
    RATES,
    Contestant,
    add_flags,
    common_flags,
    random_teacher,
    teachers,
    untrained_bank,
)
from benchmarks.harness import command_line, paired, ratios, record
from cifd_clip import METHODS, DistillationTask, Features, World
from cifd_clip.student import Pooled
from experiments.seeds import table
from training.clip.flags import parse_args
from training.clip.stages import make_task
from training.engine.control import StopFlag
from training.errors import cli

OPERATIONS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
}
FLOAT32 = 4
BATCHES = (1024, 32768)  # of the model: the whole batch


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
            tensors = [[t for t in tree_leaves(a) if isinstance(t, Tensor)] for a in args]
            self.bytes[name] += max(sum(t.nbytes for t in some) for some in tensors)
            self.calls[name] += 1
        return operator(*args, **(kwargs or {}))


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


def total(step: list[Message]) -> dict[str, int]:
    """Bytes by operation."""
    sums: Counter = Counter()
    for message in step:
        sums[message.operation] += message.bytes
    return dict(sums)


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


def model(student: str, teacher: str, cluster: Cluster) -> dict[str, Any]:
    """Megabytes and milliseconds per step of every method, GPU count and global batch."""
    built = open_clip.create_model(student)
    teacher_dim = open_clip.get_model_config(teacher)["embed_dim"]
    rows = []
    for method in METHODS:
        flags = ["--train-data=-", f"--model={student}", *distilled(method, "local-dir:-")]
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
    return {"student": student, "teacher": teacher, "cluster": cluster._asdict(), "rows": rows}


# -- two processes ---------------------------------------------------------------------------------


def distilled(method: str, teacher: str) -> list[str]:
    """The flags of a method."""
    taught = [] if method == "none" else [f"--distill-model={teacher}"]
    return [f"--distill={method}", *taught]


class Talking(Contestant):
    """A contestant with what the loop says besides."""

    def __init__(self, flags: list[str], world: World):
        super().__init__(flags, world, cached=True)
        self.stop = StopFlag(world)

    def __call__(self) -> None:
        """One step, and the question whether to stop, as the loop asks it."""
        super().__call__()
        self.stop.agreed()


def count(contestant: Talking, method: str) -> dict[str, Any]:
    """Bytes by operation that a settled step hands over, and those of the formula."""
    for _ in range(3):  # DDP arranges its buckets
        contestant()
    with Collectives() as counted:
        contestant()
    task, rows = contestant.stage.task, len(contestant.batch) * dist.get_world_size()
    parameters = sum(p.numel() for p in task.parameters() if p.requires_grad)
    gathered = gathers(task, contestant.stage.source.dims)
    step = messages(parameters, rows, gathered, dist.get_backend())
    if dict(counted.bytes) != total(step):
        raise AssertionError(f"{method}: counted {dict(counted.bytes)}, expected {total(step)}")
    return {
        "counted_bytes": dict(counted.bytes),
        "calls": dict(counted.calls),
        "formula": [message._asdict() for message in step],
    }


def _process(rank: int, flags: dict[str, list[str]], folder: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    place = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    results = {}
    for method, own in flags.items():
        shared = Talking(own, World(rank, 2))
        results[method] = count(shared, method)
        if rounds:
            results[method]["throughput"] = _weak_scaling(shared, own, rounds)
        shared.stop.close()
    (folder / f"results{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def _weak_scaling(shared: Talking, flags: list[str], rounds: int) -> dict[str, Any]:
    """Seconds of a step of one process and of two, in turn."""

    def together() -> None:
        dist.barrier()
        shared()

    def rest() -> None:
        """Rank 1, while rank 0 is alone, waits at the barrier of the next shared step."""

    alone = Talking(flags, World()) if dist.get_rank() == 0 else rest
    seconds = paired({"1": alone, "2": together}, rounds, 2)
    rows = len(shared.batch)
    return {
        "seconds": seconds,
        "samples_per_s": {n: int(n) * rows / statistics.median(s) for n, s in seconds.items()},
        "efficiency": ratios(seconds, "1", "2"),
    }


# -- the command -----------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    """Count, model, measure, print."""
    parser = command_line("scaling", __doc__, rounds=10)
    add_flags(parser, "ViT-S-32", "ViT-S-32-alt", gpu=False)
    add = parser.add_argument
    add("--full-student", default="ViT-B-16", help="what the model is about")
    add("--full-teacher", default="ViT-L-14", help="its teacher")
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="which of them")
    add("--timing", action="store_true", help="measure samples per second too")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        teacher, common = random_teacher(args, folder), common_flags(args)
        flags = {method: [*common, *distilled(method, teacher)] for method in args.methods}
        if "cifd" in flags:
            source = teachers([*common, *distilled("fd", teacher)])
            bank = untrained_bank(source, len(RATES), folder / "bank")
            flags["cifd"].append(f"--rdm-bank={bank}")
        mp.spawn(_process, args=(flags, folder, args.rounds if args.timing else 0), nprocs=2)
        methods = json.loads((folder / "results0.json").read_text())
    modelled = model(args.full_student, args.full_teacher, Cluster())
    print(f"{args.teacher} -> {args.student}, 2 gloo processes x {args.batch_size}, per step")
    print(f"{counts_table(methods)}\n{model_table(modelled['rows'])}", end="")
    record("scaling", args, {"methods": methods, "model": modelled})


def counts_table(methods: dict[str, dict]) -> str:
    """Counted bytes as Markdown; the formula agreed, or the program had stopped."""
    heads = ["method", "all_reduce", "all_gather", "more than `none`"]
    timed = all("throughput" in counted for counted in methods.values())
    heads += ["samples/s, 1", "2", "efficiency"] if timed else []
    plain = sum(methods["none"]["counted_bytes"].values()) if "none" in methods else None
    rows = []
    for name, counted in methods.items():
        by = counted["counted_bytes"]
        more = "" if plain is None else f"{sum(by.values()) - plain:+,}"
        row = [name, f"{by['all_reduce']:,}", f"{by.get('all_gather', 0):,}", more]
        if timed:
            rate, kept = (counted["throughput"][k] for k in ("samples_per_s", "efficiency"))
            row += [f"{rate['1']:.1f}", f"{rate['2']:.1f}"]
            row.append(f"{kept['median']:.2f} ({kept['min']:.2f} to {kept['max']:.2f})")
        rows.append(row)
    return table(heads, rows)


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
