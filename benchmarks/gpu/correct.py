"""The figures of a CPU, without waiting for the host; through a stop, a bad step and NCCL."""

import copy
import math
import tempfile
from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.contestants import Contestant, Students, random_teacher
from benchmarks.gpu.bench import Bench
from cifd_clip import METHODS, Noise
from cifd_clip.distributed import _Gather
from training.engine.trainer import Trainer

ROWS = 16
PRECISIONS = ("fp32", "amp_bf16", "amp")
#: Ways to take a step, beside the plain one.
WAYS = {
    "plain": [],
    "accumulation": [f"--batch-size={ROWS // 2}", "--accum-freq=2"],
    "EMA": ["--ema=0.99"],
    "checkpointing": ["--grad-checkpointing"],
    "amp": ["--precision=amp"],
}


class HostNoise(Noise):
    """Noise drawn on the host wherever it is needed: draws differ between kinds of devices."""

    def uniform(self, site: str, rows: int, width: int, device: torch.device) -> Tensor:
        return super().uniform(site, rows, width, torch.device("cpu")).to(device)


def correct(bench: Bench, figures: dict[str, Any]) -> None:
    """Every method on small models: against the CPU, then in every way of taking a step."""
    little = Little(bench)
    with torch.compiler.set_stance("force_eager"):  # what is compiled is compared in `speed`
        figures["resumed"] = {method: resumed(little, method) for method in ("none", "cifd")}
        figures["infinite_gradient"] = infinite(little)
        if bench.on_gpu:
            figures["nccl_world_1"] = one_rank(little)
        for part, measure in {"waits": waits, "to_cpu_fp32": against_cpu}.items():
            figures[part] = {}
            for method in METHODS:
                figures[part][method] = measure(little, method)


class Little:
    """Students of one small teacher, with the same weights on the host and on the device."""

    def __init__(self, bench: Bench):
        self.bench = bench
        host = random_teacher("small-gap10-vit", torch.device("cpu"))
        teachers = {"cpu": host}
        if bench.on_gpu:
            teachers["cuda"] = copy.deepcopy(host)
            teachers["cuda"].teachers[0].model.to(bench.device)
        folder = bench.folder / "little"
        own = {"student": "tiny-gap10-vit", "batch_size": ROWS, "seed": 0, "precision": "fp32"}
        self.on = {
            device: Students(Namespace(**{**vars(bench.args), **own, "device": device}), folder, of)
            for device, of in teachers.items()
        }

    def student(self, method: str, device: str, *flags: str) -> Contestant:
        """A contestant; the same seed gives the same weights and batch on every device."""
        contestant = self.on[device].under(method, *flags)
        if "--accum-freq=2" in flags:
            contestant.batch = self.on[device].under(method).batch
        return contestant


def first_step(contestant: Contestant) -> dict[str, float]:
    """Loss and gradient norm of a step whose noise is the same on every device."""
    trainer, batch = contestant.trainer, contestant.batch
    losses, _ = trainer.gradients(batch, HostNoise(0, 0))
    scale = trainer.scaler.get_scale() if trainer.scaler else 1.0
    norms = [p.grad.norm().item() for p in trainer.parameters if p.grad is not None]
    return {"loss": sum(losses.values()).item(), "gradient": math.hypot(*norms) / scale}


def against_cpu(little: Little, method: str) -> dict[str, Any]:
    """Relative differences of loss and gradient norm from the CPU's in float32."""
    exact = first_step(little.student(method, "cpu"))
    device = little.bench.device.type
    precisions = PRECISIONS if little.bench.on_gpu else PRECISIONS[:2]
    away: dict[str, Any] = {}
    for precision in precisions:
        own = first_step(little.student(method, device, f"--precision={precision}"))
        away[precision] = {k: own[k] / exact[k] - 1 for k in exact}
    return away


def waits(little: Little, method: str) -> dict[str, str]:
    """What waits for the device in five steps, of each way; nothing, if all is well."""
    waiting = {}
    for way, flags in WAYS.items() if little.bench.on_gpu else ():
        contestant = little.student(method, "cuda", *flags)
        contestant()
        contestant()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                contestant()
        except RuntimeError as error:
            waiting[way] = str(error)[:200]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return waiting


def resumed(little: Little, method: str) -> float:
    """Largest difference of the losses of three steps after a stop from those without one."""
    device = little.bench.device.type
    through, again = (little.student(method, device, "--ema=0.99") for _ in range(2))
    through()
    again.trainer.load(copy.deepcopy(through.trainer.payload()))
    losses = [[c.trainer.step(c.batch)["loss"] for _ in range(3)] for c in (through, again)]
    return max((a - b).abs().item() for a, b in zip(*losses))


def infinite(little: Little) -> dict[str, Any]:
    """Whether a step with an infinite gradient leaves the weights as they were, and is counted."""
    contestant = little.student("cifd", little.bench.device.type)
    trainer: Trainer = contestant.trainer
    contestant()
    before = [p.detach().clone() for p in trainer.parameters]
    hook = trainer.parameters[0].register_hook(lambda grad: grad * math.inf)
    contestant()
    hook.remove()
    same = all(torch.equal(a, b) for a, b in zip(before, trainer.parameters))
    contestant()
    moved = any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters))
    return {"weights_kept": same, "counted": int(trainer.bad_total.item()), "goes_on": moved}


def one_rank(little: Little) -> dict[str, Any]:
    """NCCL with one process: the gather and its backward, and a step under DDP."""
    with tempfile.TemporaryDirectory() as folder:
        place = f"file://{folder}/rendezvous"
        dist.init_process_group("nccl", init_method=place, rank=0, world_size=1)
        rows = torch.randn(8, 4, device="cuda", requires_grad=True)
        _Gather.apply(rows, 0, 1).square().sum().backward()
        alone = little.student("cifd", "cuda", "--custom-blocks")
        wrapped = little.student("cifd", "cuda", "--custom-blocks")
        wrapped.trainer.model = DistributedDataParallel(wrapped.stage.task, device_ids=[0])
        losses = [c.trainer.step(c.batch)["loss"].item() for c in (alone, wrapped)]
        dist.destroy_process_group()
    gather = (rows.grad - 2 * rows.detach()).abs().max().item()
    return {"gather": gather, "ddp_loss": losses[1] / losses[0] - 1}
