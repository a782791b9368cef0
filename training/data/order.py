"""The order of training: one infinite stream of sample rows, addressed by position.

A *row* is a global sample id: the usable samples of all shards, in file order, counted from 0.
Position ``p`` of the stream is a pure function of (seed, p), so a run's place in its data is one
integer, and every rank and worker finds its part of any batch by itself.

Without replacement the stream is pass 0, pass 1, ..., each a permutation of all rows: shards are
permuted, grouped to windows of about ``window`` samples, and samples permuted inside a window.
Reads therefore stay within a few shards at a time, and seeking costs one window.
"""

import numpy as np

from training.data.draws import permutation, words

WINDOW = 1 << 15


class Order:
    """The stream of rows.

    Args:
        sources: has ``counts`` (samples per shard), ``source`` (source number per shard) and
            ``weights`` (upsampling factor per source, or None), as `training.data.index.Sources`.
        seed: names the stream.
        window: samples shuffled together; about this many (whole shards) are open at a time.
        replacement: draw with replacement (implied by weights): a sample of source s is drawn with
            probability proportional to the factor of s.
        kept: (K,) the rows that the stream has, ascending; None: all.

    Attributes:
        num_samples: samples per pass.
    """

    def __init__(
        self,
        sources,
        seed: int,
        *,
        window: int = WINDOW,
        replacement: bool = False,
        kept: np.ndarray | None = None,
    ):
        self.counts = np.asarray(sources.counts, dtype=np.int64)
        self.kept = kept
        if kept is not None:  # rows are counted among these alone, until they are handed out
            ends = np.searchsorted(kept, np.cumsum(self.counts))
            self.counts = np.diff(ends, prepend=0)
        self.first_row = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        self.source = np.asarray(sources.source)
        self.weights = sources.weights
        self.seed, self.window = seed, window
        self.replacement = replacement or sources.weights is not None
        self.num_samples = int(self.counts.sum())
        self._plan_of = self._block_of = (None, None)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Stream positions [start, stop) -> int64 (stop - start, 2): row, turn.

        The *turn* tells the visits of one sample apart: the number of the pass, or a random number
        (below 2^31) when drawing with replacement.
        """
        parts = [np.empty((0, 2), dtype=np.int64)]
        while start < stop:
            begin, block = self._block(start)
            parts.append(block[start - begin : stop - begin])
            start += len(parts[-1])
        rows = np.concatenate(parts)
        if self.kept is not None:
            rows[:, 0] = self.kept[rows[:, 0]]
        return rows

    def any_row(self, *name) -> int:
        """A row of the stream at random, named as `training.data.draws.words` are."""
        row = int(words(1, *name)[0] % np.uint64(self.num_samples))
        return row if self.kept is None else int(self.kept[row])

    def _block(self, position: int) -> tuple[int, np.ndarray]:
        """(begin, rows) of the window that holds a stream position."""
        find = self._drawn_window if self.replacement else self._shuffled_window
        name, build = find(position)
        if self._block_of[0] != name:
            self._block_of = (name, build())
        return self._block_of[1]

    def _shuffled_window(self, position: int):
        turn, inside = divmod(position, self.num_samples)
        shards, starts = self._plan(turn)
        window = int(np.searchsorted(starts, inside, side="right")) - 1

        def build():
            rows = np.concatenate(
                [self.first_row[s] + np.arange(self.counts[s]) for s in shards[window]]
            )
            rows = rows[permutation(len(rows), self.seed, "samples", turn, window)]
            begin = turn * self.num_samples + int(starts[window])
            return begin, np.stack([rows, np.full_like(rows, turn)], axis=1)

        return (turn, window), build

    def _plan(self, turn: int) -> tuple[list[np.ndarray], np.ndarray]:
        """One pass: the shards of each window, and the windows' first positions in the pass."""
        if self._plan_of[0] != turn:
            shards = permutation(len(self.counts), self.seed, "shards", turn)
            shards = shards[self.counts[shards] > 0]
            before = np.cumsum(self.counts[shards]) - self.counts[shards]
            # equal windows of whole shards: none is left over, too small to shuffle well
            number = before * max(1, self.num_samples // self.window) // self.num_samples
            cuts = np.flatnonzero(np.diff(number)) + 1
            self._plan_of = (turn, (np.split(shards, cuts), before[np.concatenate([[0], cuts])]))
        return self._plan_of[1]

    def _drawn_window(self, position: int):
        number = position // self.window

        def build():
            u = words(4 * self.window, self.seed, "drawn", number).reshape(4, self.window)
            totals = np.bincount(self.source, weights=self.counts)
            mass = np.cumsum(totals * (1.0 if self.weights is None else np.asarray(self.weights)))
            # 53 bits make the float exact, so the draw is the same everywhere
            chosen = np.searchsorted(mass, (u[0] >> 11) * 2.0**-53 * mass[-1], side="right")
            rows = np.empty(self.window, dtype=np.int64)
            for source in range(len(totals)):
                here = chosen == source
                rows[here] = self._draw(source, number, u[1][here], u[2][here])
            return number * self.window, np.stack([rows, u[3] >> 33], axis=1).astype(np.int64)

        return number, build

    def _draw(self, source: int, number: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Rows of one source, each sample equally likely.

        A source larger than a window is drawn from a few of its shards (chosen by their size), so
        that reads stay local, as in a pass.
        """
        shards = np.flatnonzero(self.source == source)
        ends = np.cumsum(self.counts[shards])
        total = int(ends[-1])
        if total > self.window:
            few = -(-self.window * len(shards) // total)
            picks = words(few, self.seed, "drawn shards", number, source) % np.uint64(total)
            shards = shards[np.searchsorted(ends, picks, side="right")]
            shard = shards[u % np.uint64(few)]
            return self.first_row[shard] + (v % self.counts[shard].astype(np.uint64)).astype(int)
        inside = (v % np.uint64(total)).astype(np.int64)
        shard = np.searchsorted(ends, inside, side="right")
        return self.first_row[shards[shard]] + inside - (ends - self.counts[shards])[shard]
