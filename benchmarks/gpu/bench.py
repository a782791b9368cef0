"""What the stages of ``benchmarks.gpu`` share: a teacher that is built once, and its students."""

import argparse
import copy
import subprocess
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants import Contestant, Students
from benchmarks.harness import Seconds, paired
from cifd_clip.towers import use_custom_blocks
from eval.cost.macs import clip
from training.clip.live import LiveTeachers

METHODS = ("none", "fd", "clipkd", "cifd")  # of the table of a step
LITTLE = Path("experiments/map/models")  # small-gap10-vit teaches tiny-gap10-vit


class Bench(Students):
    """A card, its ceilings as they are measured, and what runs on it.

    Args:
        args: the command line's.
        folder: for what must be read from files.
    """

    def __init__(self, args: argparse.Namespace, folder: Path):
        little = (f"{LITTLE}/{name}-gap10-vit.json" for name in ("tiny", "small"))
        args.model_config = [*args.model_config, *little]
        super().__init__(args, folder)
        self.on_gpu = self.device.type == "cuda"
        self.ceiling: float | None = None  # FLOP/s of a large bfloat16 product
        self.warming: list[subprocess.Popen] = []  # processes that compile ahead

    @cached_property
    def quick(self) -> LiveTeachers:
        """The teacher as a run on this device has it by default."""
        quick = copy.deepcopy(self.teachers)
        use_custom_blocks(quick.teachers[0].model)
        if self.on_gpu:
            quick.teachers[0].cast(torch.bfloat16)
        return quick

    def student(self, name: str, method: str, *flags: str) -> Contestant:
        """A student under a method, as OpenCLIP builds its towers."""
        return self.under(method, f"--model={name}", "--no-custom-blocks", *flags)

    def flops(self, student: str, live: bool) -> float:
        """Of a step, per image and caption: the student's three passes and the teacher's one."""
        return 2 * (3 * clip(student).macs + live * clip(self.args.teacher).macs)

    def timed(self, runs: dict[str, Contestant], rounds: int) -> Seconds:
        """Seconds a step of each contestant, in turn, block by block."""
        steps = self.args.block

        def block(contestant: Contestant):
            def run() -> None:
                for _ in range(steps):
                    contestant()

            return run

        blocks = {name: block(contestant) for name, contestant in runs.items()}
        seconds = paired(blocks, rounds, 1, self.device)
        return {name: [s / steps for s in times] for name, times in seconds.items()}

    def peak(self, run: Callable[[], Any]) -> dict[str, float] | None:
        """GiB allocated before a call, and at most in it."""
        if not self.on_gpu:
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return {"before": before / 2**30, "most": torch.cuda.max_memory_allocated() / 2**30}
