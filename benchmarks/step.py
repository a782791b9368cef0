"""``python -m benchmarks.step``: what each method costs in a training step.

Step time (forward, backward, update, through the real Trainer) and peak memory of every method with
one student and teacher, and of cifd with K = 1 and 3 assistants. Methods are also timed without the
teacher's forward pass (as with a teacher cache), where their own cost is not hidden behind it.

--simulate h100 -- FLAGS OF training.main: what a step of any recipe would take on that card, part
by part, without it.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmarks import simulate
from benchmarks.contestants import Contestant, Students, add_flags
from benchmarks.harness import command_line, memory, paired, ratios, record, spelled
from cifd_clip import METHODS
from training.errors import cli

TO = "fd"  # what the others are compared with
#: Name → the arguments of `Students.under`.
CONTESTANTS = {method: ([method], {}) for method in METHODS if method != "cifd"}
CONTESTANTS |= {f"cifd (K={count})": (["cifd"], {"rdms": count}) for count in (1, 3)}
CONTESTANTS["cifd (K=3, no IBM)"] = ["cifd", "--no-ibm"], {}


def contestant(students: Students, name: str) -> Contestant:
    """A student under one of `CONTESTANTS`."""
    words, options = CONTESTANTS[name]
    return students.under(*words, **options, cached=students.args.cached)


def steps(args: argparse.Namespace, folder: Path, name: str) -> list[Contestant]:
    """Two steps of a contestant."""
    return [contestant(Students(args, folder), name)] * 2


def main(argv: list[str]) -> int | None:
    """Measure and print."""
    parser = command_line("step", __doc__, rounds=10)
    add_flags(parser, "ViT-B-32", "ViT-S-32")
    parser.add_argument("--cached", action="store_true", help="leave the teacher's forward out")
    parser.add_argument("--simulate", choices=simulate.CARDS, help="a card that need not be there")
    beside = "with --simulate: the steps that benchmarks.gpu measured, simulated beside"
    parser.add_argument("--beside", type=Path, metavar="steps.json", help=beside)
    parser.add_argument("flags", nargs="*", help="with --simulate, after --: of training.main")
    args = parser.parse_args(argv)
    if args.flags and not args.simulate:
        parser.error(f"{args.flags[0]}: flags of training.main are for --simulate")
    if args.simulate:
        return simulate.main(argv, args.simulate, args.flags, args.beside)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        peak = {name: memory(steps, args, folder, name)[1] for name in CONTESTANTS}
        students = Students(args, folder)
        runs = {name: contestant(students, name) for name in CONTESTANTS}
        seconds = paired(runs, args.rounds, 2, students.device)
    against = {name: ratios(seconds, name, TO) for name in CONTESTANTS}
    where = f"batch {args.batch_size}, {args.precision}, {args.device}"
    print(f"{args.teacher} -> {args.student}, {where}")
    for name, times in seconds.items():
        middle, ratio = 1000 * statistics.median(times), against[name]
        print(f"{name:20} {middle:9.1f} ms {peak[name]:8.0f} MiB; times {TO}: {spelled(ratio)}")
    record("step", args, {"seconds": seconds, "peak_mib": peak, f"ratio_to_{TO}": against})


if __name__ == "__main__":
    cli(main)
