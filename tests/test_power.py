"""A power cut at any moment: what the disk holds then is a run that goes on, or has finished."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from disk import after_a_power_cut, disk, lacking, stopped
from runs import ROOT, final
from training.engine import lease
from training.engine.checkpoint import Checkpoints
from training.main import main

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())


def test_a_run_goes_on_from_what_a_power_cut_leaves(flags, tmp_path, monkeypatch):
    """After its first save, in later ones, and the moment it has finished."""
    monkeypatch.setattr(lease, "DEAD", 1)  # the process that is stopped is still there
    command = [*flags, "--epochs", "6", "--save-every-n-steps", "1", "--name", "run"]
    with disk(tmp_path / "disk") as root:
        run = root / "logs" / "run"
        start = [sys.executable, "-m", "training.main", *command, "--logs", str(root / "logs")]
        child = subprocess.Popen(start, cwd=ROOT, stderr=subprocess.DEVNULL)
        try:
            for cut in range(3):
                time.sleep(0.3 * cut)
                while not (run / "checkpoints.json").exists():
                    assert child.poll() is None
                    time.sleep(0.002)
                os.kill(child.pid, signal.SIGSTOP)
                stopped(child.pid)
                saved = json.loads((run / "checkpoints" / "latest.json").read_text())["step"]
                with after_a_power_cut(tmp_path / "disk", tmp_path / "copy") as left:
                    there = left / "logs" / "run"
                    assert final(there)["progress"]["step"] == saved
                    resume = [*command, "--logs", str(left / "logs"), "--resume", "latest"]
                    assert main(resume) == 0, "it goes on, with another disk as its --logs"
                os.kill(child.pid, signal.SIGCONT)
            assert child.wait() == 0
        finally:
            child.kill()
            child.wait()
        with after_a_power_cut(tmp_path / "disk", tmp_path / "copy") as left:
            there = left / "logs" / "run"
            for path in run.rglob("*"):
                if path.is_file() and path.name != "out.log":
                    assert (there / path.relative_to(run)).read_bytes() == path.read_bytes(), path
            assert load_file(there / "student" / "open_clip_model.safetensors")
            assert json.loads((there / "finished.json").read_text())["step"] == 24
            assert Checkpoints(there / "checkpoints").newest()
