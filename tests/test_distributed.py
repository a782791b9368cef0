"""N processes compute what one would: two real gloo ranks against one."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cifd_clip import Features, World
from trainers import CASES, batch, gradients, part, prepare, trainer, worst

RANKS, ROWS = 2, 8
#: How the two ranks share the global batch of eight: flags of each.
WAYS = {
    "2 ranks × 4": ["--batch-size", "4"],
    "2 ranks × 2 × 2 accumulated": ["--batch-size", "2", "--accum-freq", "2"],
}


def compare(case: str, way: str, home: Path, world: World) -> dict:
    """One step against the single rank's, then ten steps; what rank 0 found."""
    shared = trainer(case, home, *WAYS[way], world=world)
    values = shared.step(part(batch(ROWS), world.rank, RANKS))
    found = gradients(shared)
    names = [name for name in values if name.endswith("loss")]
    losses = torch.stack([values[name].detach() for name in names])
    dist.all_reduce(losses)
    result = {}
    if world.rank == 0:
        alone = trainer(case, home, "--batch-size", str(ROWS))
        expected = alone.step(batch(ROWS))
        off, where = worst(found, gradients(alone))
        wanted = torch.stack([expected[name].detach() for name in names])
        loss_off = ((losses / RANKS - wanted) / wanted).abs()
        result = {"gradient": off, "where": where, "losses": dict(zip(names, loss_off.tolist()))}
    for step in range(1, 10):
        shared.step(part(batch(ROWS, seed=step), world.rank, RANKS))
    weights = torch.cat([p.detach().flatten() for p in shared.stage.task.parameters()])
    first = weights.clone()
    dist.broadcast(first, src=0)
    equal = torch.tensor(float(torch.equal(first, weights)))
    dist.all_reduce(equal)
    return {**result, "ranks_with_equal_weights": int(equal.item())}


def gathered(world: World) -> float:
    """How far the two ranks' logits are from those of one, for embeddings without gradient."""
    rows = torch.randn(RANKS, 3, 5, generator=torch.Generator().manual_seed(0))
    mine = Features(rows[world.rank], -rows[world.rank], torch.tensor(2.0))
    whole = World().logits(Features(rows.flatten(0, 1), -rows.flatten(0, 1), torch.tensor(2.0)))
    logits = world.logits(mine)
    place = slice(3 * world.rank, 3 * world.rank + 3)
    assert torch.equal(world.labels(logits), torch.arange(6)[place])
    return (logits.image_to_text - whole.image_to_text[place]).abs().max().item()


def process(rank: int, home: Path) -> None:
    torch.set_num_threads(1)
    # A file instead of a port: nothing else on this machine can have taken it.
    dist.init_process_group(
        "gloo", init_method=f"file://{home}/rendezvous", rank=rank, world_size=RANKS
    )
    world = World(rank, RANKS)
    results = {"gathered": gathered(world)}
    for case in CASES:
        for way in WAYS:
            results[f"{case} | {way}"] = compare(case, way, home, world)
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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_gradient_of_one_with_the_whole_batch(case, way, results):
    found = results[f"{case} | {way}"]
    off, where = found["gradient"], found["where"]
    assert off < 1e-5, f"{way}: the gradient of {where} is off by {off:.1e} of its largest element"
    for name, loss_off in found["losses"].items():
        assert loss_off < 1e-5, f"{way}: {name}, averaged over ranks, is off by {loss_off:.1e}"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_weights_are_equal_on_all_ranks_after_ten_steps(case, way, results):
    assert results[f"{case} | {way}"]["ranks_with_equal_weights"] == RANKS


def test_gathered_logits_are_rows_of_the_global_ones(results):
    assert results["gathered"] < 1e-6
