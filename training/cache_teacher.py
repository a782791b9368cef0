"""``python -m training.cache_teacher``: compute the teachers' embeddings once."""

from training.clip.flags import cache_config, parse_cache
from training.errors import cli


def main(argv: list[str]) -> int:
    """Run a command line; a wrong one ends before torch is imported."""
    given = parse_cache(argv)
    cache_config(given)

    from training.clip.cache_teacher import start

    return start(given)


if __name__ == "__main__":
    cli(main)
