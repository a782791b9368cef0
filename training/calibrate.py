"""``python -m training.calibrate``: choose the rates R by what their RDMs keep of the teacher."""

from training.clip.flags import calibration_config, parse_calibration
from training.errors import cli


def main(argv: list[str]) -> int:
    """Run a command line; a wrong one ends before torch is imported."""
    given = parse_calibration(argv)
    calibration_config(given)

    from training.clip.calibrate import start

    return start(given)


if __name__ == "__main__":
    cli(main)
