"""What every benchmark shares: paired timing in one process, and a record of how it was made."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from training.engine.environment import environment


def paired(
    contestants: dict[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    device: torch.device | None = None,
) -> dict[str, list[float]]:
    """Seconds of each contestant, taken in turn A B C A B C …, so that drift hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmup + rounds):
        for name, run in contestants.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], name: str, to: str) -> dict[str, float]:
    """Median, minimum and maximum over rounds of one contestant's time to another's."""
    pairs = [a / b for a, b in zip(seconds[name], seconds[to])]
    return {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)}


def record(name: str, content: dict[str, Any], path: Path | None) -> None:
    """Save figures with command, commit, versions and hardware, if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"benchmark": name, "environment": environment(), **content}
        path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
        print(f"wrote {path}")


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
