"""``python -m training.calibrate``: choose the rates R by what their RDMs keep of the teacher."""

from training.clip.calibrate import main
from training.errors import cli

if __name__ == "__main__":
    cli(main)
