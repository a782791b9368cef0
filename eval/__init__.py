"""From a trained student to the paper's tables: evaluation and report."""

from pathlib import Path

import training

if Path(training.__file__).parents[1] != Path(__file__).parents[1]:
    raise SystemExit(
        f"error: {training.__file__} stands in the way of cifd_clip's own package `training`: "
        "start from another directory, or use the command's script, such as cifd-eval"
    )
