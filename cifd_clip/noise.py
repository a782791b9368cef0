"""Noise that is a pure function of (seed, step, site, row of the global batch).

There is no generator state to save: a resumed run draws what the uninterrupted one would have
drawn, and N ranks (or accumulation micro-batches) draw together what one would draw alone.
"""

from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

# Rows are drawn in blocks, one generator each, so that a rank draws only the blocks its rows
# touch, however large the global batch is.
BLOCK_ROWS = 128
# Columns of a draw: what a wider one would give hangs on the number of a GPU's processors.
DRAWN_COLUMNS = 1024


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; equal parts give equal seeds, on every machine."""
    digest = blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Noise:
    """The noise of one optimizer step, for the rows ``[start, start + rows)`` of its global batch.

    Attributes:
        seed: the run's seed.
        step: global optimizer step.
        start: index of this process's first row in the global batch.
    """

    seed: int
    step: int
    start: int = 0

    def uniform(self, site: str, rows: int, width: int, device: torch.device) -> Tensor:
        """Independent draws from U[-1/2, 1/2].

        Args:
            site: name of the place that needs noise, such as ``"ibm/image"``.
            rows: number of rows of this process.
            width: number of channels.
            device: where to draw; draws differ between device types.

        Returns:
            (rows, width) float32.
        """
        first, last = self.start // BLOCK_ROWS, (self.start + rows - 1) // BLOCK_ROWS
        noise = torch.empty(((last - first + 1) * BLOCK_ROWS, width), device=device)
        generator = torch.Generator(device)
        for index, block in enumerate(noise.split(BLOCK_ROWS)):
            generator.manual_seed(derive_seed(self.seed, self.step, site, first + index))
            for columns in block.split(DRAWN_COLUMNS, 1):
                columns.uniform_(-0.5, 0.5, generator=generator)
        return noise.narrow(0, self.start - first * BLOCK_ROWS, rows)
