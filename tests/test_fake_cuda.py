"""No step waits for the device, and none launches more kernels than it must: without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.fake_cuda import stub

#: Kernels of a step of one-layer towers, at most: what reaches a GPU as launches of 6 µs each. With
#: an IBM or in stage 1 most are the densities', which a GPU runs compiled to some fifteen each.
LAUNCHES = {
    "none": 300, "fd": 370, "tinyclip": 420, "kd": 420, "mobileclip, two teachers": 540,
    "clipkd": 540, "rkd": 610, "cifd, no IBM": 500, "cifd": 1450, "cifd, embedding, clean": 1450,
    "rdm": 1160,
}  # fmt: skip


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """What each step did on fake CUDA tensors, in a process that finds our CUDA."""
    folder = tmp_path_factory.mktemp("cuda")
    environment = stub(folder)
    if environment is None:
        pytest.skip("no C compiler for the stub of CUDA, or a torch built without CUDA")
    here = Path(__file__).parent
    environment |= {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(here / "fake_cuda.py"), str(folder)],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_no_step_of_any_method_in_any_way_reads_the_device(steps):
    failed = {name: error for name, error in steps.items() if isinstance(error, str)}
    assert not failed, "\n".join(f"{name}: {error}" for name, error in failed.items())


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_step_launches_no_more_kernels_than_it_did(steps, name):
    launches = steps[name]
    assert sum(launches.values()) <= LAUNCHES[name], launches


def test_reading_a_fake_tensor_is_seen():
    """Or the first test could not fail."""
    with torch._subclasses.FakeTensorMode(), pytest.raises(Exception, match="_local_scalar_dense"):
        float(torch.ones(2).sum())
