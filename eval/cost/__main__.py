"""``python -m eval.cost``: print what a run costs."""

import json
import sys
from pathlib import Path

from eval.cost import parse, summary
from training.errors import cli


def main(argv: list[str]) -> None:
    """Print what a run costs."""
    config = parse(argv)
    if config.teacher_cache and config.dataset_samples is None:
        note = "note: the cache is taken to cover one epoch's samples"
        print(f"{note}; --dataset-samples N says otherwise", file=sys.stderr)
    if config.hours:
        print(json.dumps(summary(config)))
        return

    from cifd_clip.files import write_json
    from eval.cost import report
    from training.clip.models import add_model_configs
    from training.engine.environment import environment

    add_model_configs(config.model_config)
    make = report.views_report if config.sweep_views else report.run_report
    text, values = make(config)
    print(text, end="")
    if config.json:
        write_json(Path(config.json), {**values, "environment": environment()})


if __name__ == "__main__":
    cli(main)
