"""``python -m training.pack IMAGES CAPTIONS -o SHARDS``: your own images and captions as shards.

CAPTIONS is a table, CSV (with tabs where its name ends in .tsv) or Parquet, with a column of image
files, which lie under IMAGES, and one of captions. Several rows of an image are several captions of
it: the first is key.txt, and all are in key.json, for --captions all; there too is what the other
columns say, for --caption-keys. The layout is img2dataset's; images are copied as they are.
"""

import argparse
import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cifd_clip.files import writing_folder
from cifd_clip.names import did_you_mean, nearby
from training.data.shard import IMAGES
from training.data.write import Sample, write_shards
from training.engine.flags import CommandLine
from training.errors import UsageError, cli

#: What columns are called where the command does not say.
IMAGE, CAPTION = (
    ("filepath", "image", "file_name", "filename", "path"),
    ("caption", "title", "text"),
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandLine("training.pack", __doc__)
    add = parser.add_argument
    add("images", type=Path, help="folder of the images")
    add("captions", type=Path, help="table.csv, table.tsv or table.parquet")
    add("-o", "--out", type=Path, required=True, help="folder to make")
    add("--image-column", metavar="NAME", help=f"[the first there is of {', '.join(IMAGE)}]")
    add("--caption-column", metavar="NAME", help=f"[the first there is of {', '.join(CAPTION)}]")
    add("--per-shard", type=int, default=10_000, help="samples of a shard")
    return parser.parse_args(argv)


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, by the names of its columns.

    Raises:
        UsageError: it can't be read.
    """
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return parquet.read_table(path).to_pylist()
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    except ImportError:
        raise UsageError(f"{path}: Parquet needs pyarrow: pip install 'cifd_clip[pack]'") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{path}: can't be read: {error}{nearby(path)}") from error


def column(table: list[dict[str, Any]], given: str | None, usual: Sequence[str], flag: str) -> str:
    """The name of a column.

    Raises:
        UsageError: there is none of this name, or of those that are usual.
    """
    names = list(table[0]) if table else []
    found = next((name for name in ([given] if given else usual) if name in names), None)
    if found is None:
        raise UsageError(
            f"{flag} {given or ''}: the table's columns are {', '.join(names) or 'none'}"
            f"{did_you_mean(given, names) if given else ''}"
        )
    return found


def samples(
    images: Path, table: list[dict[str, Any]], image: str, caption: str, skipped: Counter[str]
) -> Iterator[Sample]:
    """Image, first caption and JSON of each image of a table; others are counted by reason."""
    by_image: dict[str, list[dict[str, Any]]] = {}
    for row in table:
        by_image.setdefault(str(row[image]), []).append(row)
    for name, of_image in by_image.items():
        captions = [text for row in of_image if (text := str(row[caption] or "").strip())]
        path, kind = images / name, Path(name).suffix.lower().removeprefix(".")
        if kind not in IMAGES:
            skipped[f"images are {', '.join(IMAGES)}"] += 1
        elif not captions:
            skipped["no caption"] += 1
        else:
            try:
                with Image.open(path) as opened:
                    width, height = opened.size
                content = path.read_bytes()
            except (OSError, ValueError, Image.DecompressionBombError):
                skipped["the image is missing or can't be read"] += 1
                continue
            about = {**of_image[0], "captions": captions, "width": width, "height": height}
            text = json.dumps(about, ensure_ascii=False, default=str)
            yield {kind: content, "txt": captions[0].encode(), "json": text.encode()}


def main(argv: list[str]) -> int:
    """Entry point; 2 where the input is wrong."""
    args = parse(argv)
    if args.per_shard < 1:
        raise UsageError(f"--per-shard must be at least 1, got {args.per_shard}")
    if not args.images.is_dir():
        raise UsageError(f"'{args.images}': no such folder of images{nearby(args.images)}")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UsageError(f"--out '{args.out}' exists already: nothing is overwritten")
    table, skipped = rows(args.captions), Counter()
    image = column(table, args.image_column, IMAGE, "--image-column")
    caption = column(table, args.caption_column, CAPTION, "--caption-column")
    with writing_folder(args.out) as folder:
        packed = samples(args.images, table, image, caption, skipped)
        shards = write_shards(folder, packed, args.per_shard, "{:09}", "{:05}")
        for reason, count in skipped.items():
            print(f"{count} images left out: {reason}")
        if not shards:
            raise UsageError(f"{args.captions}: no row has an image under {args.images}")
    print(f"{args.out}: {shards} shards; python -m training.check_data '{args.out}'")
    return 0


if __name__ == "__main__":
    cli(main)
