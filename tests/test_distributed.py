"""N processes compute what one would: two real gloo ranks against one."""

import json
import os
import subprocess
import sys
from collections import Counter
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.scaling import gathers, messages
from cifd_clip import Features, World
from combinations import RANKS, ROWS, case_and_flags, table
from runs import CONFIGS, ROOT
from test_task import distance
from trainers import CASES, batch, gradients, part, prepare, trainer, worst
from training.clip.config import DISTILL

OPERATIONS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
}
TABLE = table()
ACCUMULATED = ["--batch-size", "2", "--accum-freq", "2"]
#: name → (case, flags of each rank, how near the plain step): the table's cells, every case
#: accumulated as well, and the sites and branches of the bottleneck that no case has.
STEPS = {
    " × ".join(cell): (*case_and_flags(*cell), mark)
    for cell, mark in TABLE.items()
    if "2 ranks" in cell and mark in "=≈"
}
STEPS |= {f"{case} × 2 ranks, accumulated": (case, ACCUMULATED, "=") for case in CASES}
STEPS |= {
    f"cifd {' '.join(flags)}": ("cifd", ["--batch-size", "4", *flags], "=")
    for flags in (
        ["--ibm-site", "embedding"],
        ["--ibm-branch", "distill"],
        ["--no-ibm"],
        ["--lambda-cl", "0"],
    )
}
STEPS["none × 2 ranks, sigmoid"] = ("none", ["--batch-size", "4", "--siglip"], "=")
TRIPLE = ["--batch-size", "4", "--grad-checkpointing", "--torchcompile"]
STEPS["cifd × 2 ranks, checkpointed, compiled"] = ("cifd", TRIPLE, "=")
#: Flags that the single rank needs too, because they change what is computed.
MEANING = ("--ibm-site", "--ibm-branch", "--no-ibm", "--lambda-cl", "--siglip")


def compare(name: str, home: Path, world: World) -> dict:
    """A step of two ranks against the single rank's; what rank 0 found."""
    case, flags, mark = STEPS[name]
    if "--torchcompile" in flags:
        torch._dynamo.reset()
    shared = trainer(case, home, *flags, world=world)
    values = shared.step(part(batch(ROWS), world.rank, RANKS))
    found = gradients(shared)
    names = [term for term in values if term.endswith("loss")]
    losses = torch.stack([values[term].detach() for term in names])
    dist.all_reduce(losses)
    shipped = torch.cat([p.detach().flatten() for p in shared.stage.shipped.parameters()])
    first = shipped.clone()
    dist.broadcast(first, src=0)
    equal = torch.tensor(float(torch.equal(first, shipped)))
    dist.all_reduce(equal)
    if world.rank > 0:
        return {}
    own = flags[2:] if any(flag in MEANING for flag in flags) else []
    alone = trainer(case, home, *own, "--batch-size", str(ROWS))
    expected = alone.step(batch(ROWS))
    if mark == "=":
        off, where = worst(found, gradients(alone))
    else:
        off, where = distance(found, gradients(alone)), "the whole"
    wanted = torch.stack([expected[term].detach() for term in names])
    loss_off = ((losses / RANKS - wanted) / wanted).abs()
    return {
        "gradient": off,
        "where": where,
        "losses": dict(zip(names, loss_off.tolist())),
        "ranks_with_equal_weights": int(equal.item()),
    }


class Collectives(TorchDispatchMode):
    """Counts the collectives issued inside the ``with`` block, DistributedDataParallel's included.

    Attributes:
        bytes: of each operation's whole message: what is reduced, what has been gathered.
    """

    def __init__(self):
        super().__init__()
        self.bytes: Counter = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "c10d":
            name = operator.__name__.partition(".")[0]
            name = OPERATIONS.get(name, name)
            tensors = [[t for t in tree_leaves(a) if isinstance(t, Tensor)] for a in args]
            self.bytes[name] += max(sum(t.nbytes for t in some) for some in tensors)
        return operator(*args, **(kwargs or {}))


def communication(case: str, flags: list[str], home: Path, world: World) -> dict:
    """Bytes that a settled step hands to torch.distributed, and those of the formula."""
    made = trainer(case, home, *flags, world=world)
    mine = part(batch(ROWS), world.rank, RANKS)
    for _ in range(3):  # DDP arranges its buckets
        made.step(mine)
    with Collectives() as counted:
        made.step(mine)
    task = made.stage.task
    parameters = sum(p.numel() for p in task.parameters() if p.requires_grad)
    method = CASES[case][0]
    dims = made.stage.source.dims
    columns = (0, 0) if method == "rdm" else gathers(task, dims)
    said = messages(parameters, ROWS, columns, "gloo")[:-1]
    formula: Counter = Counter()
    for message in said:
        formula[message.operation] += message.bytes
    trains = {id(p) for p in task.parameters()}
    frozen = [p for t in made.stage.source.teachers for p in t.model.parameters()]
    frozen += list(made.stage.banks[0].parameters()) if method == "cifd" else []
    return {
        "counted": dict(counted.bytes),
        "formula": formula,
        "gathers": columns,
        "dims": [0 if method == "rdm" else 2 * task.student.dim, 2 * sum(dims)],
        "gradient": said[0].bytes,
        "frozen_in_what_trains": sum(id(p) in trains for p in frozen),
    }


def gathered(world: World) -> float:
    """How far the two ranks' logits are from those of one, for embeddings without gradient."""
    rows = torch.randn(RANKS, 3, 5, generator=torch.Generator().manual_seed(0))
    mine = Features(rows[world.rank], -rows[world.rank], torch.tensor(2.0))
    whole = World().logits(Features(rows.flatten(0, 1), -rows.flatten(0, 1), torch.tensor(2.0)))
    logits = world.logits(mine)
    place = slice(3 * world.rank, 3 * world.rank + 3)
    assert torch.equal(world.labels(mine), torch.arange(6)[place])
    return (logits.image_to_text - whole.image_to_text[place]).abs().max().item()


def process(rank: int, home: Path) -> None:
    torch.set_num_threads(1)
    # Tracing is what meets DDP here; Inductor's code takes a minute to compile.
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")
    # A file instead of a port: nothing else on this machine can have taken it.
    dist.init_process_group(
        "gloo", init_method=f"file://{home}/rendezvous", rank=rank, world_size=RANKS
    )
    world = World(rank, RANKS)
    results = {"gathered": gathered(world)}
    results["steps"] = {name: compare(name, home, world) for name in STEPS}
    four = ["--batch-size", "4"]
    results["communication"] = {case: communication(case, four, home, world) for case in CASES}
    results["without contrastive term"] = communication(
        "cifd", [*four, "--lambda-cl", "0"], home, world
    )
    results["accumulated"] = communication("kd", ACCUMULATED, home, world)
    if rank == 0:
        (home / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """What two processes found about every case; started once."""
    home = prepare(tmp_path_factory.mktemp("distributed"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(process, args=(home,), nprocs=RANKS)
    return json.loads((home / "results.json").read_text())


def test_every_method_is_among_the_cases():
    assert {method for method, *_ in CASES.values()} == set(DISTILL)


@pytest.mark.parametrize("name", STEPS)
def test_two_ranks_have_the_gradient_of_one_with_the_whole_batch(name, results):
    found = results["steps"][name]
    tolerance = 1e-5 if STEPS[name][2] == "=" else 5e-2
    off, where = found["gradient"], found["where"]
    assert off < tolerance, f"the gradient of {where} is off by {off:.1e} of its largest element"
    for term, loss_off in found["losses"].items():
        assert loss_off < tolerance, f"{term}, averaged over ranks, is off by {loss_off:.1e}"
    assert found["ranks_with_equal_weights"] == RANKS, "what ships differs after the step"


def test_gathered_logits_are_rows_of_the_global_ones(results):
    assert results["gathered"] < 1e-6


#: Whose embeddings a method gathers (docs/scaling.md): the student's, its teachers'.
GATHERS = {"none": (1, 0), "cifd": (1, 0), "fd": (0, 0), "rdm": (0, 0)}
GATHERS |= dict.fromkeys(("kd", "clipkd", "tinyclip", "mobileclip", "rkd"), (1, 1))


@pytest.mark.parametrize("case", CASES)
def test_a_step_says_what_the_formula_says_and_teachers_and_banks_say_nothing(case, results):
    found = results["communication"][case]
    assert found["counted"] == found["formula"]
    who = GATHERS[CASES[case][0]]
    assert found["gathers"] == [take * dim for take, dim in zip(who, found["dims"])]
    assert found["frozen_in_what_trains"] == 0, "a teacher's or a bank's weights are synchronised"


def test_accumulation_says_the_same_once_per_step(results):
    assert results["accumulated"]["counted"] == results["communication"]["kd"]["counted"]


def test_embedding_and_rate_terms_exchange_nothing_but_the_gradient(results):
    fd, cifd = results["communication"]["fd"], results["without contrastive term"]
    assert fd["counted"] == {"all_reduce": fd["gradient"]}
    assert cifd["counted"] == cifd["formula"] == {"all_reduce": cifd["gradient"]}


# -- through the real entry point ----------------------------------------------------------------


GPU_ONLY = [cell for cell, mark in TABLE.items() if mark == "GPU"]


@pytest.fixture(scope="module")
def entered(flags, teacher, bank, tmp_path_factory) -> list[dict]:
    """What each rank found in runs of ``training.main`` under torchrun; started once."""
    folder = tmp_path_factory.mktemp("entered")

    def command(case: str) -> list[str]:
        method, *own = CASES[case]
        given = ["--distill", method, *own]
        if method != "none":
            given += ["--distill-model", f"{teacher},{teacher}" if "two" in case else teacher]
        return [*given, *(["--rdm-bank", str(bank)] if method == "cifd" else [])]

    plan = {}
    for case in CASES:
        plan[case] = [*flags, *command(case), "--epochs", "3", "--batch-size", "12"]
    for case in ("cifd", "rdm"):
        plan[f"{case}, accumulated"] = [*plan[case], "--batch-size", "6", "--accum-freq", "2"]
    plan["cifd, averaged"] = [*plan["cifd"], "--ema", "0.9"]
    for cell in GPU_ONLY:
        case, own = case_and_flags(*cell)
        plan[" × ".join(cell)] = [*flags, *command(case), *own]
    for number, line in enumerate(plan.values()):
        line += ["--model-config", *CONFIGS, f"--logs={folder}", f"--name={number}"]
    (folder / "plan.json").write_text(json.dumps(plan))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc_per_node", str(RANKS), "-m", "tests.ranks", str(folder / "plan.json")],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads((folder / f"ranks.{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("run", [*CASES, "cifd, accumulated", "rdm, accumulated", "cifd, averaged"])
def test_weights_are_equal_on_all_ranks_after_ten_steps_of_the_command(run, entered):
    one, other = (rank[run] for rank in entered)
    assert one == other
    assert one["exit"] == 0 and one["rows"] == 12, "each rank had half the batch, to the end"
    assert (one["shipped"] != one["weights"]) == (run == "cifd, averaged")


@pytest.mark.parametrize("cell", GPU_ONLY, ids=" × ".join)
def test_synchronised_batch_norm_is_refused_on_cpu_ranks_in_one_sentence(cell, entered):
    for rank in entered:
        sentence = rank[" × ".join(cell)]["refused"]
        assert sentence.startswith("--use-bn-sync needs GPUs") and "\n" not in sentence
