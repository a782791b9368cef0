"""``python -m training.main``: train a CLIP model, an RDM bank, or a distilled student."""

from training.clip.flags import named_files, parse, resolve
from training.errors import cli


def main(argv: list[str]) -> int:
    """Run a command line; a wrong one ends before torch is imported."""
    given = parse(argv)
    files = named_files(given)
    resolve(given, device_type="cuda", **files)  # what some device allows

    from training.clip.run import start

    return start(given, files)


if __name__ == "__main__":
    cli(main)
