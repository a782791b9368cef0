"""What ``python -m eval.cost`` prints, as Markdown tables, and the same as JSON values."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from eval.cost.config import MEASURED, CostConfig
from eval.cost.stages import (
    DEFAULT_ASSISTANT,
    Stage,
    assistant_names,
    compare,
    gpu_hours,
    method_stages,
    run_stages,
    total,
)
from eval.report.table import markdown


def run_report(config: CostConfig) -> tuple[str, dict[str, Any]]:
    """A run's stages, and every method with its teacher, student and data."""
    stages = run_stages(config)
    text, values = stage_report(stages, config), {"stages": stages}
    if config.distill not in ("none", "rdm"):
        methods = compare(config)
        text += f"\n{method_report(methods, config)}"
        values["methods"] = methods
    return text, _records(values, config)


def views_report(config: CostConfig) -> tuple[str, dict[str, Any]]:
    """What a cache of V views saves, student by student."""
    rows, values = [], {}
    for student in config.students or [config.model]:
        of = replace(config, model=student)
        ways = {"live": method_stages(of, config.distill, cached=False)}
        for views in config.sweep_views:
            ways[str(views)] = method_stages(replace(of, views=views), config.distill, cached=True)
        live, *cached = (gpu_hours(of, stages) for stages in ways.values())
        cells = ((short(hours), f"{hours / live:.3f}") for hours in cached)
        rows.append([student, short(live), *(c for pair in cells for c in pair)])
        values[student] = ways
    caches = {way: stages[0] for way, stages in ways.items() if way != "live"}
    head = ["student", "live GPU h", *(h for v in caches for h in (f"V = {v}", "/ live"))]
    sizes = ", ".join(f"{gib(c.disk_bytes)} GiB for {v}" for v, c in caches.items())
    seen = sum(s.samples for s in ways["live"])
    text = table(head, rows) + (
        f"\n{config.distill} under {config.architectures[0]}; V views of {config.covered:,} "
        f"samples are written first, which is counted: {sizes}. The live teacher sees "
        f"{seen / 1e6:g} M samples, as many as V = {seen / config.covered:.1f} views.\n"
    )
    return text, _records({"students": values}, config)


def stage_report(stages: Sequence[Stage], config: CostConfig) -> str:
    """What runs on every sample, and what each stage comes to."""
    per_sample, rows = [], []
    for stage in stages:
        for part in stage.parts:
            cells = (part.params / 1e6, part.macs / 1e9, part.training_macs / 1e9)
            params, forward, training = map(short, cells)
            per_sample.append([stage.name, part.name, params, forward, str(part.passes), training])
        sums = (stage.samples / 1e6, stage.macs / 1e15, gpu_hours(config, [stage]))
        peak = stage.memory_bytes + stage.activation_bytes
        sizes = (stage.memory_bytes, peak, stage.disk_bytes, stage.read_bytes)
        rows.append([stage.name, *map(short, sums), *map(gib, sizes)])
    hours = gpu_hours(config, stages)
    shares = [config.share(p.model_macs or p.macs) for stage in stages for p in stage.parts]
    disk, read = gib(sum(s.disk_bytes for s in stages)), gib(sum(s.read_bytes for s in stages))
    rows.append(["total", "", short(total(stages) / 1e15), short(hours), "", "", disk, read])
    runs = ["runs on every sample", "M parameters", "GMACs forward", "passes", "GMACs in training"]
    come_to = ["M samples", "PMACs", "GPU h", "memory GiB", "peak GiB", "disk GiB", "read GiB"]
    return (
        f"{table(['stage', *runs], per_sample, words=2)}\n{table(['stage', *come_to], rows)}\n"
        f"GPU hours at {config.tflops:g} TFLOPS × {_span(shares)}; on {config.gpus} "
        f"GPU{'s' * (config.gpus > 1)} {short(hours / config.gpus)} hours. Memory: weights, "
        "gradients and optimizer state of each GPU; peak: and the activations of a micro-batch of "
        f"{config.batch_size}.\n"
    )


def method_report(methods: dict[str, dict[str, list[Stage]]], config: CostConfig) -> str:
    """Every method with the live teacher and from caches, relative to plain KD."""
    hours = {
        m: {way: gpu_hours(config, s) for way, s in ways.items()} for m, ways in methods.items()
    }
    rows = []
    for method, own in hours.items():
        row = [method]
        for way, spent in own.items():
            relative = f"{spent / hours['kd'][way]:.3f}"
            row += [short(total(methods[method][way]) / 1e15), short(spent), relative]
        rows.append([*row, f"{own['cached'] / own['live']:.3f}"])
    head = ["method", "PMACs", "GPU h", "× kd"]
    head += ["PMACs cached", "GPU h cached", "× kd cached", "cached / live"]
    names = assistant_names(config)
    chains = (
        f"assistants {', '.join(names)}, trained as long as the student."
        if names
        else f"{DEFAULT_ASSISTANT} does not lie between teacher and student; name others with "
        "--assistants."
    )
    return (
        f"{table(head, rows)}\nCached: every frozen model runs once on {config.views or 2} views "
        f"of {config.covered:,} samples, which is counted.\ntakd, dgkd: {chains}\n"
    )


def table(head: list[str], rows: list[list[str]], words: int = 1) -> str:
    """A Markdown table that reads as plain text too; the first columns hold words."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    sides = [str.ljust if i < words else str.rjust for i in range(len(head))]
    rule = ["-" * w if i < words else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return markdown(
        [[side(c, w) for side, c, w in zip(sides, line, widths)] for line in (head, rule, *rows)]
    )


def short(value: float) -> str:
    """Four significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def gib(count: float) -> str:
    """Bytes in GiB."""
    return short(count / 2**30)


def _span(shares: Sequence[float]) -> str:
    least, most = f"{min(shares):.2f}", f"{max(shares):.2f}"
    return least if least == most else f"{least} to {most}, by the model's size"


def _records(values: dict[str, Any], config: CostConfig) -> dict[str, Any]:
    """Stages, wherever they are in dicts and lists, as JSON values; and what their hours assume."""

    def record(value: Any) -> Any:
        if isinstance(value, Stage):
            return {**asdict(value), "macs": value.macs, "gpu_hours": gpu_hours(config, [value])}
        if isinstance(value, dict):
            return {key: record(each) for key, each in value.items()}
        return [record(each) for each in value]

    return {"hardware": {"tflops": config.tflops, "mfu": config.mfu or MEASURED}, **record(values)}
