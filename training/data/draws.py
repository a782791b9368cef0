"""Random numbers as pure functions: the same labels give the same draw, everywhere.

Only the raw words of numpy's Philox are used: they are the one stream that numpy promises never to
change (the methods of `numpy.random.Generator` may change between versions).
"""

from hashlib import blake2b

import numpy as np


def seed_of(*labels: int | str | bytes) -> int:
    """64-bit seed of a tuple of labels (no label may hold a NUL)."""
    return int.from_bytes(_digest(labels)[:8], "little")


def words(n: int, *labels: int | str | bytes) -> np.ndarray:
    """``n`` independent uint64 words, a pure function of ``labels``."""
    key = np.frombuffer(_digest(labels), dtype="<u8")
    return np.random.Philox(key=key).random_raw(n)


def permutation(n: int, *labels: int | str | bytes) -> np.ndarray:
    """A permutation of ``range(n)`` (int64), a pure function of ``labels``."""
    return np.argsort(words(n, *labels), kind="stable")


def _digest(labels) -> bytes:
    parts = (label if isinstance(label, bytes) else str(label).encode() for label in labels)
    return blake2b(b"\0".join(parts), digest_size=16).digest()
