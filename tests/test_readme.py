"""README is true: its code runs, commands are read by their own parsers, files are there."""

import json
import re
import shlex
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from eval import bank, benchmark, cost, report
from experiments.map.__main__ import SCALES, SUBSETS, cells
from experiments.map.table import Cell, read_cell
from runs import CONFIGS
from slurm.plan import grid_path
from test_layers import ROOT
from training import check_data, pack, prefetch, reinforced
from training.classifier import config as classifier
from training.clip import flags
from training.commands import COMMANDS
from training.intervals import paired
from training.tuning import plan

PAGE = (ROOT / "README.md").read_text()
PARSERS: dict[str, Callable] = {
    "training.main": lambda words: flags.resolve(flags.parse(words)),
    "training.cache_teacher": lambda words: flags.cache_config(flags.parse_cache(words)),
    "training.calibrate": lambda words: flags.calibration_config(flags.parse_calibration(words)),
    "training.classify": lambda words: classifier.resolve(classifier.parse(words)),
    "training.check_data": lambda words: check_data._parser().parse_args(words),
    "training.prefetch": lambda words: prefetch._parser().parse_args(words),
    "training.pack": pack.parse,
    "training.reinforced": reinforced.parse,
    "training.tune": plan.parse,
    "eval.benchmark": benchmark.parse,
    "eval.bank": bank.parse,
    "eval.cost": cost.parse,
    "eval.report": report.parse,
    "slurm.plan": lambda words: [grid_path(word) for word in words if word[0] != "-"],
}


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return [text for its, text in fenced if its == language]


def commands(shell: str) -> list[tuple[str, list[str]]]:
    """(module, its words) of every line of shell blocks."""
    lines = shell.replace("\\\n", "").splitlines()
    found = []
    for words in (shlex.split(line, comments=True) for line in lines):
        if "-m" in words and words[0] in ("python", "torchrun"):
            place = words.index("-m")
            found.append((words[place + 1], words[place + 2 :]))
        elif words and words[0] in COMMANDS:
            found.append((COMMANDS[words[0]], words[1:]))
        elif words and words[0] == "slurm/submit.sh":
            found.append(("slurm.plan", words[1:]))
    return found


*SHELL, TREE = blocks("")
EVERY = commands("".join(SHELL))


def test_it_is_short_enough_to_read():
    assert len(PAGE.splitlines()) <= 200


def test_its_speed_on_a_gpu_is_what_was_measured():
    students = json.loads((ROOT / "results/gpu/steps.json").read_text())["students"]
    rows = re.findall(r"\| (ViT-\S+) \| (.*) \|\n", PAGE)
    assert len(rows) == 2
    for student, figures in rows:
        measured = students[student]["compiled"]
        speeds = [
            measured[w]["images_per_s"][m] for w in ("cached", "live") for m in ("fd", "cifd")
        ]
        assert figures == " | ".join(f"{speed:,.0f}" for speed in speeds)


def test_its_python_runs():
    assert blocks("python")
    for code in blocks("python"):
        exec(code, {})


@pytest.mark.parametrize(("module", "words"), EVERY, ids=lambda each: str(each)[:60])
def test_its_commands_are_read_by_their_own_parsers(module, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert find_spec(module), f"there is no {module}"
    if module in PARSERS:
        PARSERS[module](words)
    else:
        assert module == "cifd_clip.export", f"nothing reads the flags of {module}"


def test_every_command_is_shown():
    assert {module for module, _ in EVERY} >= set(COMMANDS.values())


def test_its_pictures_are_there_and_light():
    report, drawn = re.findall(r"!\[[^]]+\]\((\S+)\)", PAGE)
    for picture in (report, drawn):
        assert (ROOT / picture).stat().st_size <= 200_000
    assert report in (ROOT / "Makefile").read_text(), "the command that makes it"
    assert drawn == "results/map/map.png" and "python -m experiments.map" in PAGE


def test_the_maps_figures_are_those_of_its_records():
    def read(folder: str, name: str) -> Cell:
        files = {s: ROOT / f"results/map/{folder}/{name}-{s}.json" for s in SUBSETS}
        return read_cell({s: json.loads(path.read_text()) for s, path in files.items()}, {})

    runs = {path.stem for path in (ROOT / "results/map/runs").glob("*.json")}
    names = [cell.name for cell in cells(SCALES["full"])]
    maps = [name for name in names if runs.issuperset(f"{name}-{subset}" for subset in SUBSETS)]
    by_cell = [read("runs", name).differences() for name in maps]

    def lead(row: str, sign: int = -1) -> str:
        *others, last = [f"{sign * own[row].mean:.1f} ± {own[row].half:.1f}" for own in by_cell]
        return f"{', '.join(others)} and {last}"

    page = " ".join(PAGE.split())
    for said in (
        f"distilling brings {lead('none')} points",
        f"contrastive and similarity terms {lead('fd')} of them",
        f"repairs {lead('clipkd-published')} over its code",
        f"CIFD is {lead('cifd')} behind",
    ):
        assert said in page, said
    best = [
        json.loads(path.read_text())
        for path in sorted((ROOT / "results/map/runs").glob("*-a.json"))
    ]
    weights = [row["best"] for study in best for row in study["rows"] if row["row"] == "clipkd"]
    published = {"lambda_crd": 1.0, "lambda_icl": 1.0, "lambda_fd": 2000.0}
    assert weights == [published] * len(maps) and "code, tuning nothing." in page
    results = " ".join((ROOT / "docs/results.md").read_text().split())
    defaults, chosen = (read(folder, maps[0]).scores for folder in ("defaults", "runs"))
    again = paired(defaults["clipkd+rdm"], chosen["clipkd"])
    assert f"it is {again} from CLIP-KD" in results
    asked = read("weights", "gap10-20000").scores
    for row, before, how in (
        ("cifd-drawn", "cifd", "over what it had before"),
        ("rkd-drawn", "rkd", "over its authors' 25 and 50"),
    ):
        assert f"{paired(asked[row], asked[before])} {how}" in results
    large = read("weights", "gap3-20000").scores["cifd-drawn"]
    lag = paired(large, read("runs", "gap3-20000").scores["clipkd"])
    assert f"With them CIFD is {lag} from CLIP-KD for the larger student" in results
    assert f"{-lag.mean:.1f} ± {lag.half:.1f} with its defaults of now" in page
    assert f"the λ_I alone {paired(asked['cifd-rate'], asked['cifd'])}" in results
    for row in {row for own in by_cell for row in own}:
        told = [str(own[row]) for own in by_cell if row in own]
        assert f"| {' | '.join(told)} |" in results, row


def test_its_files_are_there():
    folder = None
    for line in TREE.splitlines():
        indent, name = re.match(r"( *)(\S+)?", line).groups()
        if len(indent) == 2:
            assert (ROOT / folder / name).exists(), f"{folder}{name}"
        elif not indent:
            folder = name
            assert (ROOT / name).exists(), name


def test_your_own_data_are_a_student_and_its_report(scenes, teacher, tmp_path, monkeypatch):
    """The block's own commands in an empty folder, with small data and models in their places."""
    (block,) = (text for text in SHELL if "cifd-train" in text)
    run = Path(teacher.removeprefix("local-dir:")).parent
    places = {
        "mine/*.tar": f"{scenes}/train/*.tar",
        "--distill-model ViT-B-32 --distill-pretrained laion2b_s34b_b79k": f"--distill-model {run}",
        "ViT-S-32-alt": f"tiny-student --model-config {shlex.join(CONFIGS)} --workers 1",
        "--epochs 16 --rdm-epochs 4 --batch-size 512": "--epochs 1 --rdm-epochs 1 --batch-size 12",
        "--val-fraction 0.01": "--val-fraction 0.3",
        "eval_data --datasets imagenetv2 flickr30k": f"{scenes}/benchmark --datasets digits",
    }
    for said, here in places.items():
        assert said in block, f"README no longer says {said}"
        block = block.replace(said, here)
    monkeypatch.chdir(tmp_path)
    for module, words in commands(block):
        if module not in ("training.prefetch", "training.pack"):  # teacher and shards are here
            assert not import_module(module).main(words), module
    assert (tmp_path / "logs" / "mine" / "student" / "open_clip_model.safetensors").is_file()
    assert "digits" in (tmp_path / "report.md").read_text()
