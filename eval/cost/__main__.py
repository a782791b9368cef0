"""``python -m eval.cost``: print what a run costs, or the paper's own figures counted again."""

import json
import sys
from pathlib import Path

from eval.cost import flags, report, summary
from training.engine.environment import environment
from training.errors import cli


def main(argv: list[str]) -> int:
    """Print what a run costs."""
    own, recipe = flags.split(argv)
    if own.paper:
        text, found = report.paper_report()
    else:
        args = flags.resolve(own, recipe)
        if args.teacher_cache and own.dataset_samples is None:
            note = "note: the cache is taken to cover one epoch's samples"
            print(f"{note}; --dataset-samples N says otherwise", file=sys.stderr)
        if args.hours:
            print(json.dumps(summary(args)))
            return 0
        text, found = report.views_report(args) if args.sweep_views else report.run_report(args)
    print(text, end="")
    if own.json:
        Path(own.json).parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({**found, "environment": environment()}, indent=1, sort_keys=True)
        Path(own.json).write_text(content + "\n")
    return 0


if __name__ == "__main__":
    cli(main)
