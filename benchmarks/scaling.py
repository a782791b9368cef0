"""``python -m benchmarks.scaling``: what a step's messages between processes cost, by a model.

The bytes that one training step of each method hands to torch.distributed are those of a formula,
`messages`; tests count the messages of real processes, and they agree. What they take, at 8, 64 and
512 GPUs, follows from a ring's bandwidth and latency.
"""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import record
from cifd_clip import METHODS, DistillationTask, Features, World
from cifd_clip.student import Pooled
from experiments.seeds import table
from training.clip.flags import parse_args
from training.clip.models import add_model_configs
from training.clip.stages import make_task
from training.engine.flags import CommandLine
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


# -- the command -----------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    """Model and print."""
    parser = CommandLine("benchmarks.scaling", __doc__.partition(": ")[2])
    add = parser.add_argument
    add("--teacher", default="ViT-L-14", help="architecture")
    add("--student", default="ViT-B-16", help="architecture")
    add("--model-config", nargs="+", default=[], metavar="FILE.json", help="of other models")
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="which of them")
    add("--json", type=Path, metavar="FILE", help="save the figures here")
    args = parser.parse_args(argv)
    add_model_configs(args.model_config)
    cluster = Cluster()
    rows = model(args.student, args.teacher, args.methods, cluster)
    print(f"{args.teacher} -> {args.student}\n{model_table(rows)}", end="")
    record("scaling", args, {"model": {"cluster": cluster._asdict(), "rows": rows}})


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
