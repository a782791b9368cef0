"""Scenes of coloured handwritten digits: a real image-text data set that needs no download.

The handwriting is scikit-learn's copy of the UCI optical digits (1797 greys of 8x8 pixels,
E. Alpaydin and C. Kaynak, 1998). One or two digits are coloured, scaled and placed on a dark
canvas, and the caption says what is to be seen: "a red three to the left of a blue seven".

Rows that follow each other are by the same hand (the nearest digit of the same class lies within
130 rows for 58 % of the digits, for 14 % by chance), so the split is cut in blocks: training,
validation and test show different hands, but for one at each cut.

``python -m demo.scenes OUT`` writes

    OUT/train/*.tar, OUT/val/*.tar      image-text pairs, img2dataset layout (key.png, .txt, .json)
    OUT/benchmark/digits/               zero-shot classification, clip_benchmark's layout
    OUT/benchmark/digit_scenes/         retrieval, clip_benchmark's layout, several captions a scene

Both benchmarks hold a split ``test`` and a split ``val`` (to tune on). All of it is a pure
function of the seed.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from experiments.shards import describe, encoded, write_shards, write_split
from experiments.study import command_line
from training.errors import UsageError, cli

SIZE = 32
KEY = "{:09}"  # of a sample
ALONE = 0.4
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (235, 50, 45),
    "orange": (245, 145, 25),
    "yellow": (245, 230, 50),
    "green": (45, 190, 70),
    "cyan": (60, 215, 225),
    "blue": (60, 95, 245),
    "purple": (165, 65, 215),
    "white": (245, 245, 245),
}
# share of the handwriting, in file order
BLOCKS = {"train": (0.0, 0.7), "val": (0.7, 0.8), "test": (0.8, 1.0)}

TEMPLATES = ("the digit {c}", "a handwritten {c}", "a picture of the number {c}", "{c}")
ONE = (
    "{a}",
    "the digit {word} in {colour}",
    "the number {word}, written in {colour}",
    "a handwritten {word}, coloured {colour}",
)
# first, relation, second; the same scene can be told from either side
TWO = (
    "{a} {relation} {b}",
    "there is {a} {relation} {b}",
    "{a} with {b} {mirror} it",
)
RELATIONS = {"row": ("to the left of", "to the right of"), "column": ("above", "below")}


class Digit(NamedTuple):
    """One coloured digit: its value, its colour and the row of the handwriting it is drawn from."""

    value: int
    colour: str
    row: int

    @property
    def name(self) -> str:
        return f"{self.colour} {WORDS[self.value]}"

    @property
    def a_name(self) -> str:
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.name}"


@dataclass(frozen=True)
class Scene:
    """One digit, or two of them in a ``row`` (left, right) or a ``column`` (upper, lower)."""

    digits: tuple[Digit, ...]
    arrangement: str = "alone"

    @property
    def meaning(self) -> tuple:
        """What a caption can tell: two scenes of one meaning have the same captions."""
        return (self.arrangement, *((d.value, d.colour) for d in self.digits))


def handwriting(split: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Greys (N, 8, 8) in [0, 1], values (N,) and the first row's number of a split's block."""
    digits = load_digits()
    start, stop = (round(share * len(digits.target)) for share in BLOCKS[split])
    return digits.images[start:stop] / 16.0, digits.target[start:stop], start


def captions(scene: Scene) -> list[str]:
    """Every caption of a scene; two scenes of different meaning share none."""
    if scene.arrangement == "alone":
        (digit,) = scene.digits
        word = WORDS[digit.value]
        return [t.format(a=digit.a_name, colour=digit.colour, word=word) for t in ONE]
    first, second = (digit.a_name for digit in scene.digits)
    there, back = RELATIONS[scene.arrangement]
    sides = [(first, there, back, second), (second, back, there, first)]
    return [t.format(a=a, relation=r, mirror=m, b=b) for t in TWO for a, r, m, b in sides]


class Artist:
    """Draws scenes of one split's handwriting; every choice comes from the generator given."""

    def __init__(self, split: str, rng: np.random.Generator):
        self.greys, self.values, self.first_row = handwriting(split)
        self.rng = rng

    def digit(self, row: int | None = None) -> Digit:
        """A digit of this split's handwriting (of a given row of the block) in a random colour."""
        row = int(self.rng.integers(len(self.values))) if row is None else row
        colour = str(self.rng.choice(list(COLOURS)))
        return Digit(int(self.values[row]), colour, self.first_row + row)

    def pair(self) -> Scene:
        """Two digits that differ in value or colour, in a row or in a column."""
        first = second = self.digit()
        while second[:2] == first[:2]:
            second = self.digit()
        return Scene((first, second), str(self.rng.choice(list(RELATIONS))))

    def draw(self, scene: Scene) -> Image.Image:
        rng = self.rng
        canvas = np.full((SIZE, SIZE, 3), rng.uniform(0, 45, size=3))
        cells = {
            "alone": [(0, 0, SIZE, SIZE)],
            # narrow lanes: a row never looks like a column
            "row": [(0, 5, 16, 27), (16, 5, 32, 27)],
            "column": [(5, 0, 27, 16), (5, 16, 27, 32)],
        }[scene.arrangement]
        largest = 24 if scene.arrangement == "alone" else 16
        for digit, (left, top, right, bottom) in zip(scene.digits, cells):
            side = int(rng.integers(largest - 4, largest + 1))
            x = int(rng.integers(left, right - side + 1))
            y = int(rng.integers(top, bottom - side + 1))
            grey = Image.fromarray(np.uint8(255 * self.greys[digit.row - self.first_row]))
            grey = grey.resize((side, side), Image.Resampling.BICUBIC)
            grey = grey.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC)
            ink = np.asarray(grey) / 255.0
            colour = np.clip(COLOURS[digit.colour] + rng.normal(0, 12, size=3), 0, 255)
            patch = canvas[y : y + side, x : x + side]
            patch += ink[..., None] * (colour - patch)
        return Image.fromarray(np.uint8(np.clip(canvas.round(), 0, 255)))


def pairs(split: str, size: int, rng: np.random.Generator) -> Iterator[dict[str, bytes]]:
    """Image-text samples of one split: ``ALONE`` of them of one digit, the rest of two."""
    artist = Artist(split, rng)
    for _ in range(size):
        scene = Scene((artist.digit(),)) if rng.random() < ALONE else artist.pair()
        choices = captions(scene)
        if scene.arrangement == "alone" and rng.random() < 0.5:  # without its colour
            choices = [t.format(c=WORDS[scene.digits[0].value]) for t in TEMPLATES]
        caption = str(rng.choice(choices))
        facts = {
            "caption": caption,
            "width": SIZE,
            "height": SIZE,
            "arrangement": scene.arrangement,
            "digits": [digit._asdict() for digit in scene.digits],
            "status": "success",
        }
        image = encoded(artist.draw(scene))
        yield {"png": image, "txt": caption.encode(), "json": json.dumps(facts).encode()}


def classification(split: str, rng: np.random.Generator) -> Iterator[dict[str, bytes]]:
    """Every digit of a split's handwriting once, alone, in a random colour; its value as label."""
    artist = Artist(split, rng)
    for row in range(len(artist.values)):
        digit = artist.digit(row)
        yield {"png": encoded(artist.draw(Scene((digit,)))), "cls": str(digit.value).encode()}


def retrieval(split: str, size: int, rng: np.random.Generator) -> Iterator[dict[str, bytes]]:
    """Scenes of two digits, no two of the same meaning, each with four different captions."""
    artist = Artist(split, rng)
    seen = set()
    while len(seen) < size:
        scene = artist.pair()
        if scene.meaning in seen:
            continue
        seen.add(scene.meaning)
        choices = captions(scene)
        chosen = [choices[i] for i in rng.permutation(len(choices))[:4]]
        yield {"png": encoded(artist.draw(scene)), "txt": "\n".join(chosen).encode()}


def write(out: Path, *, train: int = 12_000, val: int = 1_000, scenes: int = 500, seed: int = 0):
    """Write the data set: ``train`` and ``val`` pairs, and ``scenes`` scenes a retrieval split.

    The folder appears when all of it is there.
    """
    draft = out.with_name(f"{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    streams = iter(np.random.default_rng(seed).spawn(6))
    for split, size in (("train", train), ("val", val)):
        write_shards(draft / split, pairs(split, size, next(streams)), 2_000, KEY, "{:05}")
    digits, digit_scenes = draft / "benchmark" / "digits", draft / "benchmark" / "digit_scenes"
    for split in ("val", "test"):
        write_split(digits, split, classification(split, next(streams)), 250, KEY)
        write_split(digit_scenes, split, retrieval(split, scenes, next(streams)), 250, KEY)
    describe(digits, WORDS, TEMPLATES)
    describe(digit_scenes)
    draft.rename(out)


def main(argv: list[str]) -> None:
    """Entry point of ``python -m demo.scenes``."""
    parser = command_line("demo.scenes", __doc__)
    add = parser.add_argument
    add("out", type=Path, help="folder to write")
    add("--train", type=int, default=12_000, help="training scenes")
    add("--val", type=int, default=1_000, help="validation scenes")
    add("--scenes", type=int, default=500, help="scenes of each retrieval split")
    add("--seed", type=int, default=0, help="of everything")
    args = parser.parse_args(argv)
    meanings = len(WORDS) * len(COLOURS) * (len(WORDS) * len(COLOURS) - 1) * len(RELATIONS)
    if min(args.train, args.val, args.scenes) < 1 or args.scenes > meanings:
        raise UsageError(f"expected 1 or more of each, {meanings} --scenes at most")
    if args.out.exists() and any(args.out.iterdir()):
        raise UsageError(f"'{args.out}' holds files already; give another folder")
    write(args.out, train=args.train, val=args.val, scenes=args.scenes, seed=args.seed)


if __name__ == "__main__":
    cli(main)
