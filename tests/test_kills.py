"""A run survives being killed at any moment."""

import json
import subprocess
import sys
from pathlib import Path

from disk import lacking

ROOT = Path(__file__).parent.parent


def test_kills_full_disks_power_cuts_pairs_and_purges_cost_no_more_than_the_last_steps():
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", "--kills", "50", "--others", "3"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    story = json.loads(done.stdout.splitlines()[-1])
    assert story["problems"] == [], story
    assert sum(story["kills"].values()) >= 50
    assert story["full_disks"] >= 3, "a disk was full, and the newest file truncated, in some runs"
    assert min(story["kills"].values()) >= 20, "kills at random moments and inside writes"
    assert story["pairs"] == story["purges"] == 3 and story["power_cuts"] >= (0 if lacking() else 3)
