"""The command for a machine with a GPU runs here too, small: every stage leaves its figures."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.gpu import speed
from benchmarks.gpu.__main__ import STAGES, main
from training.errors import Failure

ROOT = Path(__file__).parent.parent
STUCK = """
import sys, time
from benchmarks.gpu import __main__ as gpu

def stuck(bench, figures):
    figures["so far"] = 1
    while True:
        try:
            time.sleep(60)
        except gpu.Late:  # as in a backward, where no signal is heard
            pass

gpu.STAGES["memory"], gpu.GRACE = gpu.Stage(stuck, 0.1), 0.5
gpu.main([*sys.argv[1:], "--stages", "memory", "card"])
"""


def test_every_stage_leaves_its_figures_and_the_table_has_every_form(tmp_path, capsys):
    with torch.compiler.set_stance("force_eager"):
        main(["--out", str(tmp_path), "--rounds", "1", "--batch-size", "8", "--minutes", "5"])
    figures = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in STAGES}
    assert not any("error" in own for own in figures.values())
    assert len(list(tmp_path.iterdir())) <= 6, "more files than some machines give back"
    for method, away in figures["correct"]["to_cpu_fp32"].items():
        assert away["fp32"] == {"loss": 0, "gradient": 0}, f"{method} differs from itself"
    assert figures["correct"]["resumed"] == {"none": 0, "cifd": 0}
    assert figures["correct"]["infinite_gradient"] == {
        "weights_kept": True, "counted": 1, "goes_on": True,
    }  # fmt: skip
    (student,) = figures["steps"]["students"].values()
    for form in ("before", "default", "compiled"):
        for way in ("cached", "live"):
            assert student[form][way]["to_fd"]["cifd"]["median"] > 0
    shown = capsys.readouterr().out
    assert shown.count("tiny-gap10-vit") == 6 and "cifd / fd" in shown


def test_a_stage_whose_time_is_up_keeps_what_it_has(tmp_path):
    main(["--out", str(tmp_path), "--stages", "card", "memory", "--minutes", "0"])
    for name in ("card", "memory"):
        figures = json.loads((tmp_path / f"{name}.json").read_text())
        assert figures["error"] == "its time was up" and "environment" in figures


def test_a_stage_that_does_not_come_back_says_where_it_is_and_the_others_run(tmp_path):
    flags = ["--out", str(tmp_path), "--rounds", "1", "--batch-size", "8", "--minutes", "5"]
    quick = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    subprocess.run([sys.executable, "-c", STUCK, *flags], cwd=ROOT, env=quick, check=True)
    stuck, card = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("memory", "card"))
    assert "it did not come back" in stuck["error"] and "in stuck" in stuck["error"]
    assert stuck["so far"] == 1 and stuck["environment"]
    assert card["ceilings"]


def test_a_stage_in_which_the_process_ends_leaves_a_word(tmp_path):
    script = STUCK.replace("while True:", "import os; os._exit(1)\n    while True:")
    flags = ["--out", str(tmp_path), "--minutes", "5"]
    assert subprocess.run([sys.executable, "-c", script, *flags], cwd=ROOT, check=False).returncode
    assert json.loads((tmp_path / "memory.json").read_text())["error"] == "the process ended in it"


def test_a_full_memory_is_a_figure():
    """Of a step it is the trainer's failure, not torch's."""

    def full(*args):
        raise Failure("the GPU's memory is too small") from torch.OutOfMemoryError()

    args = SimpleNamespace(students=["a"], batch_size=8)
    figures = {}
    speed.memory(SimpleNamespace(args=args, student=full, on_gpu=False), figures)
    assert len(figures) == 4
    assert all(own == {"peak_gib": "out of memory"} for own in figures.values())
