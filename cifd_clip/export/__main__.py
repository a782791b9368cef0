"""``python -m cifd_clip.export RUN --format {open_clip,onnx,…} [--quantize int8] [-o OUT]``."""

import argparse
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from cifd_clip.export import FORMATS
from cifd_clip.files import BadFile, read_json
from cifd_clip.names import did_you_mean, unknown_flag


def main(argv: list[str]) -> int:
    """Export one student; wrong input is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m cifd_clip.export", description=__doc__)
    add = parser.add_argument
    add("run", help="a run directory, or an OpenCLIP model folder (local-dir:...)")
    add("--format", required=True, metavar="FORMAT", help=", ".join(FORMATS))
    add("-o", "--out", type=Path, help="folder to make (RUN/export/FORMAT, or FOLDER-FORMAT)")
    add("--quantize", choices=["int8"], help="of --format onnx: weights and activations")
    shards = "image-text pairs to calibrate with (those that the run was trained on)"
    add("--calibration-data", metavar="SHARDS", help=shards)
    add("--data-root", metavar="DIR", help="measure what int8 costs on eval.benchmark's data sets")
    add("--datasets", nargs="+", default=[], metavar="NAME", help="which of them")
    if unknown := unknown_flag(argv, parser._option_string_actions):
        parser.error(f"unrecognized arguments: {unknown}")
    args = parser.parse_args(argv)
    if args.format not in FORMATS:
        hint = did_you_mean(args.format, FORMATS)
        parser.error(f"--format '{args.format}': expected one of {', '.join(FORMATS)}{hint}")

    from cifd_clip.export.checked import export, export_int8

    try:
        if args.quantize and args.format != "onnx":
            raise ValueError(f"--quantize is for --format onnx, not for {args.format}")
        if bool(args.data_root) != bool(args.datasets) or (args.data_root and not args.quantize):
            raise ValueError("--data-root DIR, --datasets NAME [...] and --quantize go together")
        if args.quantize:
            out, cost = export_int8(args.run, args.out, args.calibration_data, zeroshot(args))
            print(f"{out}: {cost.sentence}")
        else:
            out, difference = export(args.run, args.format, args.out)
            print(f"{out}: features differ from the student's by at most {difference:.1e}")
    except (ValueError, OSError, BadFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def zeroshot(args: argparse.Namespace):
    """What measures the student and its quantised towers: `eval.benchmark`, in another process."""

    def evaluate(source, folder: Path) -> dict[str, tuple[float, float]]:
        if not args.data_root:
            return {}
        figures = defaultdict(dict)
        with tempfile.TemporaryDirectory() as out:
            command = ["-m", "eval.benchmark", str(source.folder), str(folder), "--out", out]
            data = ["--data-root", args.data_root, "--datasets", *args.datasets]
            done = subprocess.run(
                [sys.executable, *command, *data], stdout=subprocess.DEVNULL, check=False
            )
            if done.returncode:
                raise ValueError("--data-root: the student could not be evaluated, see above")
            for one in map(read_json, Path(out).glob("*.json")):
                recalls = [v for k, v in one["metrics"].items() if "_retrieval_recall" in k]
                score = fmean(recalls) if recalls else one["metrics"]["acc1"]
                figures[one["dataset"]][one["provenance"]["source"] == str(folder)] = score
        return {name: (both[False], both[True]) for name, both in sorted(figures.items())}

    return evaluate


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
