"""``python -m cifd_clip.export RUN --format {open_clip,onnx,transformers} [-o OUT]``."""

import argparse
import sys
from pathlib import Path

from cifd_clip.export import FORMATS
from cifd_clip.files import BadFile
from cifd_clip.names import did_you_mean, unknown_flag


def main(argv: list[str]) -> int:
    """Export one student; wrong input is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m cifd_clip.export", description=__doc__)
    parser.add_argument("run", help="a run directory, or an OpenCLIP model folder (local-dir:...)")
    parser.add_argument("--format", required=True, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument(
        "-o", "--out", type=Path, help="folder to make (RUN/export/FORMAT, or FOLDER-FORMAT)"
    )
    if unknown := unknown_flag(argv, parser._option_string_actions):
        parser.error(f"unrecognized arguments: {unknown}")
    args = parser.parse_args(argv)
    if args.format not in FORMATS:
        hint = did_you_mean(args.format, FORMATS)
        parser.error(f"--format '{args.format}': expected one of {', '.join(FORMATS)}{hint}")

    from cifd_clip.export.checked import export

    try:
        out, difference = export(args.run, args.format, args.out)
    except (ValueError, OSError, BadFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: features differ from the student's by at most {difference:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
