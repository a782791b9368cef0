"""``python -m training.reinforced``: MobileCLIP's reinforced shards as caches of their teachers.

Of each sample of DataCompDR's shards, joined with their images and captions, the first V stored
augmentations are applied again and stored as views. The teachers' embeddings of them, and of the
captions that they get, become caches, which training.main reads with the same --train-data and
--teacher-cache. No teacher is needed. Shards that are there already are skipped.
"""

import argparse
from collections.abc import Sequence

from training.engine.environment import cores
from training.engine.flags import CommandLine
from training.errors import UsageError, cli


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandLine("training.reinforced", __doc__)
    add = parser.add_argument
    add("--train-data", required=True, metavar="SHARDS", help="reinforced shards, with images")
    add("--teacher-cache", required=True, metavar="DIR,DIR", help="to write; views: in the first")
    add("--views", required=True, type=int, metavar="V", help="augmentations to apply again")
    add("--synthetic", default=0.5, type=float, metavar="P", help="share of synthetic captions")
    add("--workers", default=cores(), type=int, help="processes")
    args = parser.parse_args(argv)
    if args.views < 1 or args.workers < 0 or not 0 <= args.synthetic <= 1:
        raise UsageError("expected --views from 1, --synthetic from 0 to 1, --workers from 0")
    return args


def main(argv: list[str]) -> int:
    """Entry point; a wrong command line ends before torch is imported."""
    args = parse(argv)

    from training.clip.reinforced import convert

    return convert(args)


if __name__ == "__main__":
    cli(main)
