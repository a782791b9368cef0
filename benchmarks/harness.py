"""What every benchmark shares: paired timing, peak memory, and a record of how it was made."""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from cifd_clip.files import write_json
from experiments import study
from training.engine.environment import environment

Seconds = dict[str, list[float]]  # of each contestant, round by round


def command_line(name: str, doc: str, rounds: int) -> argparse.ArgumentParser:
    """The parser of a benchmark, with the flags that all of them have."""
    parser = study.command_line(f"benchmarks.{name}", doc)
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each contestant")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the figures here")
    return parser


def paired(
    contestants: dict[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    device: torch.device | None = None,
) -> Seconds:
    """Seconds of each contestant, taken in turn A B C A B C …, so that drift hits all alike."""
    seconds: Seconds = {name: [] for name in contestants}
    for turn in range(warmup + rounds):
        for name, run in contestants.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: Seconds, name: str, to: str) -> dict[str, float]:
    """Median, minimum and maximum over rounds of one contestant's time to another's."""
    pairs = [a / b for a, b in zip(seconds[name], seconds[to])]
    return {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)}


def spelled(ratio: dict[str, float]) -> str:
    """A ratio of `ratios` in a line."""
    return f"{ratio['median']:.3f} (min {ratio['min']:.3f}, max {ratio['max']:.3f})"


def memory(make: Callable[..., Iterable[Callable[[], Any]]], *args: Any) -> tuple[float, float]:
    """What a process has allocated before the last of some calls, and at most with it, in MiB.

    Args:
        make: a function of a module; gives the calls.
        args: its arguments.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure, args=(queue, make, args))
    process.start()
    result = queue.get(timeout=600)
    process.join()
    return result


def _measure(queue: multiprocessing.Queue, make: Callable, args: tuple) -> None:
    *before, last = make(*args)
    for call in before:
        call()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated() / 2**20
        last()
        queue.put((start, torch.cuda.max_memory_allocated() / 2**20))
        return
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    last()
    queue.put((start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def record(name: str, args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Save figures with settings, command, commit, versions and hardware, if a file is given."""
    if args.json is not None:
        settings = json.loads(json.dumps(vars(args), default=str))
        content = {"benchmark": name, "environment": environment(), "settings": settings, **figures}
        write_json(args.json, content)
        print(f"wrote {args.json}")


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
