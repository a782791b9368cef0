"""What a run costs before it starts: MACs, bytes and GPU hours of its stages.

Models are counted from their architectures (`eval.cost.macs`) and make up stages
(`eval.cost.stages`), which other methods share (`eval.cost.methods`); the paper's own arithmetic is
in `eval.cost.paper`. ``python -m eval.cost`` prints.
"""

from argparse import Namespace

from eval.cost.flags import parse
from eval.cost.stages import Hardware, run_stages

__all__ = ["gpu_hours", "parse", "summary"]


def gpu_hours(flags: list[str]) -> dict[str, float]:
    """GPU hours by stage of a command line of `training.main`.

    Raises:
        UsageError: a flag is wrong, or one that cost depends on is missing.
    """
    return summary(parse(flags))["hours"]


def summary(args: Namespace) -> dict[str, dict[str, float]]:
    """``{"hours": {stage: GPU hours}, "disk_bytes": {stage: bytes}}`` of what `parse` returns."""
    hardware = Hardware(args.tflops, args.mfu)
    hours: dict[str, float] = {}
    disk: dict[str, float] = {}
    for stage in run_stages(args):  # several teachers have several caches
        hours[stage.name] = hours.get(stage.name, 0) + hardware.hours(stage.macs)
        disk[stage.name] = disk.get(stage.name, 0) + stage.disk_bytes
    return {"hours": hours, "disk_bytes": disk}
