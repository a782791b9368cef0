"""How fast, with how much memory: ceilings, steps before and after, the teacher."""

import contextlib
import copy
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contestants import Contestant, Remembered
from benchmarks.gpu.bench import METHODS, Bench
from benchmarks.harness import paired, ratios
from cifd_clip.towers import compile_towers, use_custom_blocks
from experiments.seeds import table as markdown
from training.data.batch import Batch
from training.data.views import normalise
from training.errors import Failure

#: Images per second of cifd at 256 rows that issue 19 asks of an H100: (student, cached) → rate.
AIMS = {
    ("ViT-S-16", "cached"): 5800,
    ("ViT-B-16", "cached"): 2700,
    ("ViT-S-16", "live"): 1900,
    ("ViT-B-16", "live"): 1350,
}


def milliseconds(bench: Bench, runs: dict[str, Callable[[], Any]], rounds: int = 5) -> dict:
    """Median milliseconds of calls, in turn."""
    seconds = paired(runs, rounds, 2, bench.device)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


# -- the card, and the teacher on it ------------------------------------------------------------


def card(bench: Bench, figures: dict[str, Any]) -> None:
    """Ceilings, and the teacher's forward pass in each of its forms."""
    figures["ceilings"] = ceilings(bench)
    figures["teacher"] = teacher(bench)


def ceilings(bench: Bench) -> dict[str, float]:
    """What the card reaches where nothing is in the way."""
    n = 8192 if bench.on_gpu else 256
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**30 if bench.on_gpu else 2**20, device=bench.device, dtype=torch.uint8)
    target, one = torch.empty_like(source), torch.zeros(1, device=bench.device)

    def launches() -> None:
        for _ in range(1000):
            one.add_(1)

    runs = {"product": lambda: a @ b, "copy": lambda: target.copy_(source), "launches": launches}
    times = milliseconds(bench, runs)
    bench.ceiling = 2 * n**3 / times["product"] * 1e3
    return {
        "tflops": bench.ceiling / 1e12,
        "copy_tb_per_s": 2 * len(source) / times["copy"] / 1e9,
        "launch_us": times["launches"],
    }


def teacher(bench: Bench) -> dict[str, Any]:
    """Images per second of the teacher's forms, and how far their features are from float32's."""
    plain = bench.teachers.teachers[0]
    forms = {"stock, autocast": plain, "custom, autocast": copy.deepcopy(plain)}
    use_custom_blocks(forms["custom, autocast"].model)
    for name in ("stock", "custom"):
        forms[f"{name}, bf16"] = copy.deepcopy(forms[f"{name}, autocast"])
        forms[f"{name}, bf16"].cast(torch.bfloat16)
    forms["custom, bf16, compiled"] = copy.deepcopy(forms["custom, bf16"])
    forms["custom, bf16, compiled"].compile()
    student = bench.student(bench.args.students[0], "none")
    spec, rows = bench.teachers.specs[0], bench.args.batch_size
    images, texts = normalise(student.batch.images[0], spec), student.batch.texts[0]

    def forward(form: Any) -> Callable[[], Any]:
        def run() -> Any:
            with torch.autocast(bench.device.type, torch.bfloat16):
                return form(images, texts)

        return run

    runs = {name: forward(form) for name, form in forms.items()}
    exact = plain(images, texts)
    away = {
        name: {
            tower: (1 - (getattr(run(), tower) * getattr(exact, tower)).sum(-1)).max().item()
            for tower in ("image", "text")
        }
        for name, run in runs.items()
    }
    times = milliseconds(bench, runs, 4)
    macs = bench.flops(bench.args.teacher, True) - bench.flops(bench.args.teacher, False)
    return {
        "images_per_s": {name: rows / ms * 1e3 for name, ms in times.items()},
        "share_of_ceiling": {n: macs * rows / ms * 1e3 / bench.ceiling for n, ms in times.items()},
        "largest_1_minus_cosine_to_fp32": away,
    }


# -- steps -------------------------------------------------------------------------------------


def steps(bench: Bench, figures: dict[str, Any]) -> None:
    """Each student as it was, as it is by default, and compiled; one run, one set of weights."""
    figures["waited_s"] = finish(bench.warming, 45)
    figures["ceilings"] = ceilings(bench)
    figures["students"] = {}
    for name in bench.args.students:
        own = figures["students"][name] = {}
        line = {method: bench.student(name, method) for method in METHODS}
        # As it was: torch's attention, an eager density, the teacher under autocast.
        with torch.compiler.set_stance("force_eager"):
            few = {method: line[method] for method in ("fd", "cifd")}
            own["before"] = both_ways(bench, name, few, bench.teachers, 3)
            own["before"]["profile"] = longest(bench, line["cifd"])
        # By default.
        for contestant in line.values():
            use_custom_blocks(contestant.stage.task)
        own["first_step_s"] = first(line["cifd"])
        own["default"] = both_ways(bench, name, line, bench.quick, bench.args.rounds)
        own["default"]["profile"] = longest(bench, line["cifd"])
        # With --torchcompile.
        for contestant in line.values():
            compile_towers(contestant.stage.task)
        compiled = copy.deepcopy(bench.quick)
        compiled.teachers[0].compile()
        own["compiled_first_step_s"] = first(line["cifd"])
        own["compiled"] = both_ways(bench, name, line, compiled, bench.args.rounds)
        own["compiled"]["profile"] = longest(bench, line["cifd"])
        own["compiled"]["waits"] = waits(bench, line["cifd"])
        del line, few, contestant
        if bench.on_gpu:
            torch.cuda.empty_cache()


def finish(processes: list[subprocess.Popen], seconds: float) -> float:
    """Wait for processes, so long at most, and end the others; how long it was."""
    start = time.monotonic()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, start + seconds - time.monotonic()))
        process.kill()
    return time.monotonic() - start


def waits(bench: Bench, contestant: Contestant) -> str | None:
    """What waits for the device in a step."""
    if not bench.on_gpu:
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        contestant()
    except RuntimeError as error:
        return str(error)[:200]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def first(contestant: Contestant) -> float:
    """Seconds of a step in which things are compiled."""
    start = time.monotonic()
    contestant()
    return time.monotonic() - start


def both_ways(
    bench: Bench, student: str, line: dict[str, Contestant], teachers: Any, rounds: int
) -> dict[str, Any]:
    """Figures of contestants from a cache, and beside the live teacher."""
    rows, result = bench.args.batch_size, {}
    for way in ("cached", "live"):
        runs = {m: c for m, c in line.items() if way == "cached" or m != "none"}
        with torch.autocast(bench.device.type, torch.bfloat16):
            for contestant in runs.values():
                source = Remembered(teachers, contestant.batch) if way == "cached" else teachers
                contestant.stage.source = source
        seconds = bench.timed(runs, rounds if way == "cached" else max(2, rounds // 2))
        median = {method: statistics.median(times) for method, times in seconds.items()}
        share = bench.flops(student, way == "live") * rows / bench.ceiling
        result[way] = {
            "images_per_s": {m: rows / s for m, s in median.items()},
            "to_fd": {m: ratios(seconds, m, "fd") for m in runs},
            "mfu": {m: share / s for m, s in median.items()},
            "peak_gib": {m: bench.peak(c) for m, c in runs.items()},
        }
    return result


def longest(bench: Bench, contestant: Contestant) -> dict[str, Any]:
    """The five kernels that take most of a step, its number of launches, and how busy it is."""
    kind = ProfilerActivity.CUDA if bench.on_gpu else ProfilerActivity.CPU
    contestant()
    start = time.monotonic()
    with profile(activities=[kind]) as profiled:
        contestant()
        if bench.on_gpu:
            torch.cuda.synchronize()
    took = time.monotonic() - start
    time_of = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    kernels = sorted(profiled.key_averages(), key=lambda e: -getattr(e, time_of))
    total = sum(getattr(e, time_of) for e in kernels) or 1
    return {
        "kernels": [[e.key[:160], e.count, getattr(e, time_of) / total] for e in kernels[:12]],
        "launches": sum(e.count for e in kernels if getattr(e, time_of)),
        "kernel_seconds": total / 1e6,
        "wall_seconds": took,
    }


def warm(bench: Bench, name: str) -> None:
    """Compile what a student's step needs, or the teacher: for other processes' cache."""
    if name == bench.args.teacher:
        bench.quick.teachers[0].compile()
        bench.quick(bench.student(bench.args.students[0], "none").batch)
        return
    bench.args.teacher = name  # its own: what it teaches does not matter
    contestant = bench.student(name, "cifd")
    use_custom_blocks(contestant.stage.task)
    compile_towers(contestant.stage.task)
    contestant()


# -- memory ------------------------------------------------------------------------------------


def memory(bench: Bench, figures: dict[str, Any]) -> None:
    """Peak GiB and images per second of cifd from a cache with many rows, and its remedies."""
    name, rows = bench.args.students[-1], bench.args.batch_size
    cases = {
        "2 x rows": (2 * rows, []),
        "4 x rows, --grad-checkpointing": (4 * rows, ["--grad-checkpointing"]),
        "4 x rows, --accum-freq 4": (rows, ["--accum-freq=4"]),
        "4 x rows": (4 * rows, []),
    }
    for case, (size, flags) in cases.items():
        try:
            contestant = bench.student(name, "cifd", f"--batch-size={size}", *flags)
            use_custom_blocks(contestant.stage.task)
            if "--accum-freq=4" in flags:
                contestant.batch = Batch.joined([contestant.batch] * 4)
            contestant.stage.source = Remembered(bench.quick, contestant.batch)
            peak = bench.peak(contestant)
            seconds = paired({case: contestant}, 2, 0, bench.device)[case]
            rate = len(contestant.batch) / min(seconds)
            figures[case] = {"peak_gib": peak, "images_per_s": rate, "rows": len(contestant.batch)}
        except (torch.OutOfMemoryError, Failure):  # the trainer's own words for it
            figures[case] = {"peak_gib": "out of memory"}
        contestant = None
        if bench.on_gpu:
            torch.cuda.empty_cache()


# -- what is printed ------------------------------------------------------------------------------


def table(out: Path) -> str:
    """The steps as Markdown, with how far the aims are met."""
    path = out / "steps.json"
    if not path.is_file():
        return ""
    heads = ["student", "teacher", "form", *METHODS, "cifd / fd", "MFU (fd)", "aim"]
    rows = []
    for student, forms in json.loads(path.read_text()).get("students", {}).items():
        for form, way in product(("before", "default", "compiled"), ("cached", "live")):
            if cell := forms.get(form, {}).get(way):
                rates, aim = cell["images_per_s"], AIMS.get((student, way))
                shown = [f"{rates[m]:,.0f}" if m in rates else "" for m in METHODS]
                ratio, share = cell["to_fd"]["cifd"]["median"], cell["mfu"].get("fd")
                rows.append([
                    student, way, form, *shown, f"{ratio:.3f}",
                    f"{share:.2f}" if share else "", f"{rates['cifd'] / aim:.2f}" if aim else "",
                ])  # fmt: skip
    return markdown(heads, rows)
