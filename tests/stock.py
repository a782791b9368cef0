"""What of stock clip_benchmark can be compared with here."""

from types import ModuleType

import numpy as np
import pytest
from clip_benchmark.metrics import zeroshot_classification


def stock_classification() -> ModuleType:
    """clip_benchmark's zero-shot classification; skips the test where it can't work."""
    if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("stock clip_benchmark 1.6's accuracy breaks under numpy >= 2.4")
    return zeroshot_classification
