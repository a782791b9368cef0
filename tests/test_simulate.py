"""A step on a card that isn't there: what its kernels are, and what they would take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.fake_cuda import stub
from benchmarks.simulate import CARDS, Kernel, Kernels, bounds
from eval.cost.macs import clip
from training.clip.models import add_model_configs

MODELS = [str(Path(__file__).parent / "models" / f"tiny-{m}.json") for m in ("student", "teacher")]
ROWS = 8
WAYS = {
    "plain": [],
    "cached": ["--teacher-cache=none-yet", "--views=1"],
    "accumulation": [f"--batch-size={ROWS // 2}", "--accum-freq=2"],
    "compiled": ["--torchcompile"],
    "stage 1": ["--distill=rdm"],
}
SCRIPT = """
import json, sys
from benchmarks.simulate import kernels
from eval.cost.config import parse
common, ways = json.loads(sys.argv[1])
print(json.dumps({way: kernels(parse([*common, *flags])) for way, flags in ways.items()}))
"""


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """The kernels of a step of cifd, in every way."""
    environment = stub(folder := tmp_path_factory.mktemp("cuda"))
    if environment is None:
        pytest.skip("no C compiler for the stub of CUDA, or a torch built without CUDA")
    (folder / "teacher.pt").touch()
    common = ["--train-num-samples=1", f"--batch-size={ROWS}", "--precision=amp_bf16"]
    common += ["--model=tiny-student", "--model-config", *MODELS, "--distill=cifd", "--rates=100"]
    common += ["--distill-model=tiny-teacher", f"--distill-pretrained={folder / 'teacher.pt'}"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps([common, WAYS])],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    listed = json.loads(done.stdout.splitlines()[-1])
    return {way: [Kernel(*kernel) for kernel in own] for way, own in listed.items()}


def flops(kernels, part):
    return sum(k.flops for k in kernels if k.part == part)


def test_a_step_has_the_products_that_eval_cost_counts(steps):
    add_model_configs(MODELS)
    student, teacher = (2 * ROWS * clip(f"tiny-{name}").macs for name in ("student", "teacher"))
    step = steps["plain"]
    assert flops(step, "teacher") == pytest.approx(teacher, rel=1e-6)
    assert flops(steps["cached"], "teacher") == flops(steps["stage 1"], "student forward") == 0
    projections = 1.05  # which the losses' half of the step computes
    for way, passes in {"plain": 1, "accumulation": 2}.items():
        forward = flops(steps[way], "student forward")
        assert passes * student / projections < forward <= passes * student
    backward = flops(step, "student backward") / flops(step, "student forward")
    assert 1.5 < backward < 2.6  # flash attention's backward computes its forward again


def test_a_compiled_step_has_the_same_products_in_fewer_kernels(steps):
    plain, compiled = steps["plain"], steps["compiled"]
    assert sum(k.flops for k in plain) == sum(k.flops for k in compiled)
    assert len(compiled) < 0.8 * len(plain)
    assert sum(k.bytes for k in compiled) < sum(k.bytes for k in plain)
    densities = [k for k in plain if k.part == "density"]
    assert len(densities) < 100, "a GPU runs them compiled in any case"


def test_what_is_fused_reads_its_inputs_and_writes_what_is_held():
    a, size = torch.ones(1000), 4000
    with Kernels(True) as listed:
        listed.begin("alone")
        b = (a + 1).mul(2).exp()
        listed.begin("fused", True)
        c = (b + 1).mul(2).exp()
        d = c.sum() + 1
        listed.flush()
    alone, fused = ([k.bytes for k in listed.seen if k.part == p] for p in ("alone", "fused"))
    assert alone == [2 * size] * 3
    assert fused == [2 * size + 4, 4 + 4], "a reduction ends a kernel"
    assert d.item() > 0


def test_a_kernel_takes_the_longest_of_products_bytes_and_launch():
    card = CARDS["h100"]
    rate, speed = card.tflops * card.shares["product"], card.tb_per_s * card.shares["memory"]
    large = Kernel("", "product", rate * 1e12, 1e6)
    listed = [large, Kernel("", "memory", 0, speed * 1e12), Kernel("", "memory", 0, 1)]
    assert bounds(listed, card) == {
        "compute": pytest.approx(1), "memory": pytest.approx(1), "launch": 6e-6,
    }  # fmt: skip
    slow = large._replace(float32=True)
    assert bounds([slow], card).total() == pytest.approx(card.tflops / card.float32_tflops)
