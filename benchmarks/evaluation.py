"""``python -m benchmarks.evaluation MODEL``: zero-shot evaluation, against clip_benchmark.

eval.benchmark and clip_benchmark's own command take turns on the same weights, data, batch
size, worker processes and threads; each is timed as a user runs it, from start to exit. Both must
give the same figures. MODEL is an OpenCLIP folder, such as RUN/student; the data sets are in
clip_benchmark's layout. Those of ImageNet's variants share classes, which stock embeds set by set.
"""

import statistics
import tempfile
from pathlib import Path

from benchmarks.harness import command_line, paired, ratios, record, spelled
from cifd_clip.files import read_json
from eval.datasets import open_folder
from experiments.study import output
from training.errors import Failure, cli

EQUAL = 1e-4


def figures(folder: Path) -> dict[str, dict[str, float]]:
    """Metrics by data set, of result files."""
    results = [read_json(path) for path in folder.glob("*.json")]
    return {result["dataset"].removeprefix("wds/"): result["metrics"] for result in results}


def difference(a: dict, b: dict) -> float:
    """The largest difference of two figures of the same data set and name."""
    if a.keys() != b.keys():
        raise Failure(f"evaluated: {sorted(a)} and {sorted(b)}")
    return max(abs(a[name][metric] - b[name][metric]) for name in a for metric in a[name])


def main(argv: list[str]) -> None:
    """Measure, compare figures and print."""
    parser = command_line("evaluation", __doc__, rounds=2)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="a folder with open_clip_config.json")
    add("--data-root", type=Path, required=True, metavar="DIR", help="folder of the data sets")
    add("--datasets", nargs="+", required=True, metavar="NAME", help="their folders")
    add("--batch-size", default="64", help="of both")
    add("--workers", default="1", help="processes that decode, of both")
    args = parser.parse_args(argv)
    prints = {name: open_folder(args.data_root, name, "test").fingerprint for name in args.datasets}
    with tempfile.TemporaryDirectory() as temporary:
        folder, turns = Path(temporary), iter(range(args.rounds))
        (folder / "stock").mkdir()

        def ours() -> None:
            output(
                "eval.benchmark", f"local-dir:{args.model}", f"--data-root={args.data_root}",
                "--datasets", *args.datasets, "--out", str(folder / f"ours{next(turns)}"),
                "--batch-size", args.batch_size, "--workers", args.workers,
            )  # fmt: skip

        def stock() -> None:
            output(
                "clip_benchmark.cli", "eval", "--dataset", *(f"wds/{n}" for n in args.datasets),
                "--dataset_root", f"{args.data_root}/{{dataset}}", "--model",
                f"local-dir:{args.model}", "--pretrained", "", "--no_amp",
                "--output", f"{folder}/stock/{{dataset}}.json",
                "--batch_size", args.batch_size, "--num_workers", args.workers,
            )  # fmt: skip

        contestants = {"ours": ours, "clip_benchmark": stock}
        seconds = paired(contestants, args.rounds, warmup=0)
        measured = {"ours": figures(folder / "ours0"), "clip_benchmark": figures(folder / "stock")}
    largest = difference(*measured.values())
    if largest > EQUAL:
        raise Failure(f"figures differ by {largest}: {measured}")
    for name, times in seconds.items():
        print(f"{name:15} {statistics.median(times):8.1f} s")
    ratio = ratios(seconds, "clip_benchmark", "ours")
    print(f"clip_benchmark / ours, pair by pair: {spelled(ratio)}")
    print(f"largest difference of a figure: {largest:.1e}")
    content = {"seconds": seconds, "ratio": ratio, "largest_difference": largest}
    record("evaluation", args, content | {"figures": measured, "data": prints})


if __name__ == "__main__":
    cli(main)
