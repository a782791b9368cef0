"""The console scripts: each is a ``python -m`` command under a name of its own.

A `training/` or `eval/` in the working directory, which ``python -m`` would prefer, is not in their
way.
"""

import runpy
import sys
from pathlib import Path

COMMANDS = {
    "cifd-bank": "eval.bank",
    "cifd-cache": "training.cache_teacher",
    "cifd-calibrate": "training.calibrate",
    "cifd-check-data": "training.check_data",
    "cifd-classify": "training.classify",
    "cifd-cost": "eval.cost",
    "cifd-eval": "eval.benchmark",
    "cifd-export": "cifd_clip.export",
    "cifd-pack": "training.pack",
    "cifd-prefetch": "training.prefetch",
    "cifd-reinforced": "training.reinforced",
    "cifd-report": "eval.report",
    "cifd-train": "training.main",
    "cifd-tune": "training.tune",
}


def main() -> None:
    """Run the command whose script this is."""
    runpy.run_module(COMMANDS[Path(sys.argv[0]).stem], run_name="__main__", alter_sys=True)
