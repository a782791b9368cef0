"""What ``python -m eval.cost`` prints, as Markdown tables, and the same as JSON values."""

import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from eval.cost import paper
from eval.cost.methods import DEFAULT_ASSISTANT, assistant_names, compare, method_stages
from eval.cost.stages import Hardware, Stage, run_stages, total
from eval.tables import markdown


def run_report(args: Namespace) -> tuple[str, dict[str, Any]]:
    """A run's stages, and every method with its teacher, student and data."""
    hardware = Hardware(args.tflops, args.mfu)
    own = run_stages(args)
    text, found = stage_report(own, hardware, args.gpus), {"stages": own}
    if args.distill not in ("none", "rdm"):
        methods = compare(args)
        text += f"\n{method_report(methods, hardware, args)}"
        found["methods"] = methods
    return text, {"hardware": asdict(hardware), **_records(found, hardware)}


def views_report(args: Namespace) -> tuple[str, dict[str, Any]]:
    """What a cache of V views saves, student by student."""
    hardware = Hardware(args.tflops, args.mfu)
    rows, found = [], {}
    for student in args.students or [args.model]:
        of = Namespace(**vars(args) | {"model": student})
        ways = {"live": method_stages(of, args.distill, cached=False)}
        for views in args.sweep_views:
            of.views = views
            ways[str(views)] = method_stages(of, args.distill, cached=True)
        live, *sums = (total(run) for run in ways.values())
        cells = ((short(hardware.hours(sum_)), f"{sum_ / live:.3f}") for sum_ in sums)
        rows.append([student, short(hardware.hours(live)), *(c for pair in cells for c in pair)])
        found[student] = ways
    caches = {way: run[0] for way, run in ways.items() if way != "live"}
    head = ["student", "live GPU h", *(h for v in caches for h in (f"V = {v}", "/ live"))]
    sizes = ", ".join(f"{gib(c.disk_bytes)} GiB for {v}" for v, c in caches.items())
    taught = sum(s.samples for s in ways["live"])
    text = table(head, rows) + (
        f"\n{args.distill} under {args.teachers[0]}; V views of {args.dataset_samples:,} "
        f"samples are written first, which is counted: {sizes}. The live teacher sees "
        f"{taught / 1e6:g} M samples, as many as V = {taught / args.dataset_samples:.1f} views.\n"
    )
    return text, {"hardware": asdict(hardware), **_records({"students": found}, hardware)}


def paper_report() -> tuple[str, dict[str, Any]]:
    """Appendix D.2, Figure 1(b) and Table 1's costs, printed and counted."""
    found = {
        "appendix_d2": paper.appendix_d2(),
        "figure_1b": paper.figure_1b(),
        "table_1": paper.table_1(),
        "assistants": paper.assistants_that_fit(),
    }
    head = ["appendix D.2", "counted as", "printed", "counted", "ratio"]
    rows = [[what, how, si(p), si(c), f"{c / p:.3f}"] for what, how, p, c in found["appendix_d2"]]
    text = (
        f"{table(head, rows, words=2)}\n{ways_table('Figure 1(b), × KD', found['figure_1b'])}\n"
        f"3.5 and 4.5 fit one assistant: {' or '.join(found['assistants'])}.\n\n"
        f"{ways_table('Table 1, × CIFD', found['table_1'])}"
    )
    return text, found


def stage_report(stages: Sequence[Stage], hardware: Hardware, gpus: int) -> str:
    """What runs on every sample, and what each stage comes to."""
    per_sample, rows = [], []
    for stage in stages:
        for part in stage.parts:
            cells = (part.params / 1e6, part.macs / 1e9, part.training_macs / 1e9)
            params, forward, training = map(short, cells)
            per_sample.append([stage.name, part.name, params, forward, str(part.passes), training])
        sums = (stage.samples / 1e6, stage.macs / 1e15, hardware.hours(stage.macs))
        sizes = (stage.memory_bytes, stage.disk_bytes, stage.read_bytes)
        rows.append([stage.name, *map(short, sums), *map(gib, sizes)])
    hours = hardware.hours(total(stages))
    disk, read = (
        gib(sum(getattr(s, f"{what}_bytes") for s in stages)) for what in ("disk", "read")
    )
    rows.append(["total", "", short(total(stages) / 1e15), short(hours), "", disk, read])
    runs = ["runs on every sample", "M parameters", "GMACs forward", "passes", "GMACs in training"]
    come_to = ["M samples", "PMACs", "GPU h", "memory GiB", "disk GiB", "read GiB"]
    return (
        f"{table(['stage', *runs], per_sample, words=2)}\n{table(['stage', *come_to], rows)}\n"
        f"GPU hours at {hardware.tflops:g} TFLOPS × {hardware.mfu:g}; on {gpus} "
        f"GPU{'s' * (gpus > 1)} {short(hours / gpus)} hours. Memory: weights, gradients and "
        "optimizer state of each GPU, without activations.\n"
    )


def method_report(
    methods: dict[str, dict[str, list[Stage]]], hardware: Hardware, args: Namespace
) -> str:
    """Every method with the live teacher and from caches, relative to plain KD."""
    sums = {m: {way: total(run) for way, run in ways.items()} for m, ways in methods.items()}
    rows = []
    for method, ways in sums.items():
        row = [method]
        for way, sum_ in ways.items():
            row += [
                short(sum_ / 1e15),
                short(hardware.hours(sum_)),
                f"{sum_ / sums['kd'][way]:.3f}",
            ]
        rows.append([*row, f"{ways['cached'] / ways['live']:.3f}"])
    head = ["method", "PMACs", "GPU h", "× kd"]
    head += ["PMACs cached", "GPU h cached", "× kd cached", "cached / live"]
    names = assistant_names(args)
    chains = (
        f"assistants {', '.join(names)}, trained as long as the student."
        if names
        else f"{DEFAULT_ASSISTANT} does not lie between teacher and student; name others with "
        "--assistants."
    )
    return (
        f"{table(head, rows)}\nCached: every frozen model runs once on {args.views or 2} views of "
        f"{args.dataset_samples:,} samples, which is counted.\ntakd, dgkd: {chains}\n"
    )


def ways_table(title: str, ways: dict[str, dict[str, float]]) -> str:
    """Methods as rows, ways of counting as columns; the last way has every method."""
    methods = [*ways.values()][-1]
    rows = [
        [method, *(f"{found[method]:.3f}" if method in found else "" for found in ways.values())]
        for method in methods
    ]
    return table([title, *ways], rows)


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


def si(value: float) -> str:
    """Four significant digits and M, G, T or P."""
    power = max(2, min(5, int(math.log10(value)) // 3))
    return f"{short(value / 1000**power)} {' kMGTP'[power]}"


def gib(count: float) -> str:
    """Bytes in GiB."""
    return short(count / 2**30)


def _records(found: Any, hardware: Hardware) -> Any:
    """Stages, wherever they are in dicts and lists, as JSON values."""
    if isinstance(found, Stage):
        return {**asdict(found), "macs": found.macs, "gpu_hours": hardware.hours(found.macs)}
    if isinstance(found, dict):
        return {key: _records(value, hardware) for key, value in found.items()}
    return [_records(value, hardware) for value in found]
