"""``torchrun -m tests.ranks PLAN.json``: runs of `training.main`, one after another, on every rank.

The plan maps names to command lines. Each rank writes ``ranks.R.json`` beside it: for each name the
hash of its own weights after ten steps, or the sentence with which the command was refused.
"""

import json
import os
import sys
from hashlib import sha256
from pathlib import Path

import torch
import torch.distributed as dist

from training.engine.trainer import Trainer
from training.errors import UsageError
from training.main import main

STEPS = 10


def digest(module: torch.nn.Module) -> str:
    """Of a module's parameters."""
    found = sha256()
    for parameter in module.parameters():
        found.update(parameter.detach().numpy().tobytes())
    return found.hexdigest()


def run(plan: dict[str, list[str]]) -> dict[str, dict]:
    """What this rank found in each run."""
    seen = {}
    step = Trainer.step

    def watched(trainer: Trainer, batch):
        values = step(trainer, batch)
        if trainer.progress.step == STEPS:
            stage = trainer.stage
            seen[name] = {
                "weights": digest(stage.task),
                "shipped": digest(stage.shipped),
                "rows": len(batch),
            }
        return values

    Trainer.step = watched
    for name, command in plan.items():
        try:
            code = main(command)
            seen[name]["exit"] = code
        except UsageError as error:
            seen[name] = {"refused": str(error)}
    return seen


def keep_the_process_group() -> None:
    """Let one process group serve all runs: torchrun's store remembers the keys of the first."""
    join = dist.init_process_group
    dist.init_process_group = lambda **how: None if dist.is_initialized() else join(**how)
    dist.destroy_process_group = lambda group=None: None


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep_the_process_group()
    file = Path(sys.argv[1])
    results = run(json.loads(file.read_text()))
    (file.parent / f"ranks.{os.environ['RANK']}.json").write_text(json.dumps(results))
